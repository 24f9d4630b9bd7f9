"""Questions about contexts: reading data sets, planted facts, scores."""
