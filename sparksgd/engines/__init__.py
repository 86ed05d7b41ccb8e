"""Engines: they move vectors between workers and the solver, and decide nothing about the update."""
