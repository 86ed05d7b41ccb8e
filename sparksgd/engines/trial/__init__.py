"""The trial: a few steps before training, on copies, that find what would train wrongly."""
