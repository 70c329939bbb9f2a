"""Training every weight: master weights, gradients and AdamW's state in the tier that the plan names."""
