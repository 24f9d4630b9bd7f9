"""From a chunk to its gist cache, and from passages to one memory."""
