"""HTTP: the OpenAI surface of the router."""
