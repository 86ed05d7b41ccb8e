"""The training loop, and the checks before it."""
