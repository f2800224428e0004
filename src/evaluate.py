"""The command `mambaseg evaluate` as a script of a checkout: python src/evaluate.py ..."""

import sys

from mambaseg.app.console import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
