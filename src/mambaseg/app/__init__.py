"""What stands between a command and the work: which keys and values a configuration may have."""
