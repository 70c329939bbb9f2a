"""Commands that measure; each prints one JSON line per result."""
