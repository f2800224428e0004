"""Data: cases and their readers, splits, the decoded cache, geometry and augmentation."""
