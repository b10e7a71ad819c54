"""A small but real RL run on a vLLM deployment that it starts itself: ``areal-vllm demo``."""
