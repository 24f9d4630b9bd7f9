"""Questions from a teacher, batches of them, and the run that trains an adapter."""
