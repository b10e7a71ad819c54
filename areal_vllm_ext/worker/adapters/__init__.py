"""LoRA adapters in a worker: staged and checked before the vote, and served from host memory."""
