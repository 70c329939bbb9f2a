"""Weights that are stored in few bits: how each format lies in a checkpoint, and how its values are made again."""
