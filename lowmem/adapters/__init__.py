"""Adapters on streamed models: DoRA without dense temporaries, what is supported, and merging shard by shard."""
