"""data-check: is a folder fit for training? `python -m mambaseg.data.check ROOT`."""
