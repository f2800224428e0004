"""One command of the command line per file; `mambaseg.app.console` lists them."""
