"""Keys and values: gist caches, moving and joining them, 8-bit storage, one cache as one file."""
