"""`python -m gistrag` is `gistrag`."""

from gistrag.cli.main import run

if __name__ == "__main__":
    run()
