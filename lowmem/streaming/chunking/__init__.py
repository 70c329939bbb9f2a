"""A block walked along the sequence in chunks: keys and values carried, attention, masks."""
