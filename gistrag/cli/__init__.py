"""The program `gistrag`: one file a command."""
