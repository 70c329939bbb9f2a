"""Training adapters without gradients: an evolution strategy over their singular values."""
