"""`python -m gistrag.build` is `gistrag build`."""

from gistrag.cli.build import main

if __name__ == "__main__":
    main()
