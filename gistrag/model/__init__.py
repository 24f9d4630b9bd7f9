"""The language model: finding, loading, reading with it, generating, and its adapter."""
