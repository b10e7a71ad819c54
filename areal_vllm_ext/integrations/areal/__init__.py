"""AReaL, unchanged: its routes on a vLLM server, as a client of all engines."""
