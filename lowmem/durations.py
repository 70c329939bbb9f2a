"""Durations as people read them."""


def format_seconds(seconds: float) -> str:
    """Write a duration: ``"320 ms"``, ``"12.3 s"``, ``"8.4 min"``, ``"3.1 h"``."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
