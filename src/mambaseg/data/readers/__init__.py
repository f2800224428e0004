"""Data sets as they circulate: one module a layout, from a folder to its cases."""
