"""The OpenAI-compatible server, the page, and the MCP tools."""
