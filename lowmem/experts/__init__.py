"""Routed experts of a block taken one by one: found among stored tensors, read, unpacked and multiplied singly."""
