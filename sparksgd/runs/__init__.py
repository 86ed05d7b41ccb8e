"""The folder of a run: what a run writes, and what later runs read."""
