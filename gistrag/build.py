"""`python -m gistrag.build` is `gistrag build`."""

from gistrag.cli.main import run

if __name__ == "__main__":
    run("build")
