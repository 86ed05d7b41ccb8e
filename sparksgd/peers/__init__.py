"""Connections between workers, and sums over them."""
