"""vLLM seen from outside: servers and their clients, offline generation."""
