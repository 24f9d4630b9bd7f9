"""The program `gistrag`: one file for each command."""
