"""The command `mambaseg demo` as a script of a checkout: python src/demo.py ..."""

import sys

from mambaseg.app.console import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
