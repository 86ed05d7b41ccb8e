"""What the jobs share: terminal, logs, exit status, packing."""
