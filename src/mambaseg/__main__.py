"""`python -m mambaseg` is the command `mambaseg`."""

from mambaseg.app.console import main

if __name__ == "__main__":
    main()
