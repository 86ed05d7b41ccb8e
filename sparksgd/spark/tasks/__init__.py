"""What executors run.  It imports nothing of the driver's side."""
