"""OpenAI-compatible router: HTTP in, one stream per worker out. Imports no torch."""
