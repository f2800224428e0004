"""The command line and its configurations: checked, settled, and made into objects."""
