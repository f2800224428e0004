"""The command `mambaseg benchmark` as a script of a checkout: python src/benchmark.py ..."""

import sys

from mambaseg.app.console import main

if __name__ == "__main__":
    main(["benchmark", *sys.argv[1:]])
