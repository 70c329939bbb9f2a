"""Moves bytes and tensors between disk, host memory and a compute device. Knows nothing of models."""
