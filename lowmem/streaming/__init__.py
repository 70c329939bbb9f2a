"""Running a model block by block: visits, the block Function, boundary activations, the head."""
