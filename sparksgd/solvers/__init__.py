"""Solvers: who owns the parameters and decides each update."""
