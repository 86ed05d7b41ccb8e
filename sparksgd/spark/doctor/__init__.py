"""Whether a cluster can train: looks at it, and what they find."""
