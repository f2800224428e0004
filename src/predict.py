"""The command `mambaseg predict` as a script of a checkout: python src/predict.py ..."""

import sys

from mambaseg.app.console import main

if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
