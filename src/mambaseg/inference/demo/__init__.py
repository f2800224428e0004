"""A local page for trying a trained network out: `study` (numbers), `parts` (HTML), `page`."""
