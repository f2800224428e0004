"""The command `mambaseg report` as a script of a checkout: python src/report.py ..."""

import sys

from mambaseg.app.console import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
