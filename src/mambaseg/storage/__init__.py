"""Files on disk: run folders, locks, what others may have written."""
