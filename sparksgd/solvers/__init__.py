"""Solvers: they own the parameters, and decide each update."""
