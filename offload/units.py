"""Sizes as people write them, and back."""

import re
from fractions import Fraction

_UNIT_BYTES = {
    "": 1,
    "B": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_bytes(size: str | int, *, field: str = "size") -> int:
    """Read a size such as ``"2.4GiB"``, ``"900MiB"``, ``"20 GB"``, ``"0"`` or a plain number of bytes.

    Args:
        size: The size; a number without a unit is bytes. GiB is 2**30, GB is 10**9; case does not matter.
        field: What the size is for; named in the error.

    Returns:
        Whole bytes, rounded down.

    Raises:
        ValueError: `size` is negative, has no known unit or is not a number.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise ValueError(f"{field}: {size} bytes is negative; give 0 or more")
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    unit_bytes = _UNIT_BYTES.get(match[2].upper()) if match else None
    if match is None or unit_bytes is None:
        raise ValueError(
            f'{field}: expected bytes as an int or text such as "900MiB", "2.4GiB", "20GB" or "0", got {size!r}'
        )
    return int(Fraction(match[1]) * unit_bytes)


def format_bytes(nbytes: int) -> str:
    """Write a number of bytes for people: ``"512 B"``, ``"1.21 GiB"``."""
    if abs(nbytes) < 1024:
        return f"{nbytes} B"
    size = nbytes / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if abs(size) < 1023.995:
            return f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"
