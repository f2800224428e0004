"""The command `mambaseg train` as a script of a checkout: python src/train.py ..."""

import sys

from mambaseg.app.console import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
