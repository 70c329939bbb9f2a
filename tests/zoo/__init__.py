"""Tiny random models of the architectures that transformers ships, for tests only."""
