"""The index folder: SQLite, gist files, vectors, search, and the builder that fills it."""
