"""Whether the weights are the right ones: digests of tensors, and what a checkpoint holds."""
