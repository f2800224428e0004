"""The command `mambaseg export` as a script of a checkout: python src/export.py ..."""

import sys

from mambaseg.app.console import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
