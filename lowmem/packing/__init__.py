"""Packing a checkpoint into few bits a weight: what is packed, the bake that can be killed, where results are kept."""
