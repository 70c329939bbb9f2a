"""A model's sizes and types where its weights are not here: from the hub's shards' headers, or config.json alone."""
