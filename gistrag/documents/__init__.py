"""From a folder to chunks: which files count, how each format becomes text, where a text is cut."""
