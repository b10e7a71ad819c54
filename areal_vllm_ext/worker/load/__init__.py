"""How staged tensors become the live model."""
