"""Generating with streamed models: one visit of each block per token, for all sequences of a batch."""
