"""Checks that the weights are the right ones: digests of tensors, checkpoints, and the comparison of engines."""
