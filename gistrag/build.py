"""`python -m gistrag.build` is `gistrag build`."""

import sys

from gistrag.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["build", *sys.argv[1:]]))
