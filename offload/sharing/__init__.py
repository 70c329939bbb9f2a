"""One reader and one copy of blocks for all processes of a machine."""
