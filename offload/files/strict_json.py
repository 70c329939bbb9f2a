"""JSON from files that anybody may have written: nothing in it is believed before it has been looked at."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeGuard

from offload.errors import SourceError
from offload.files.file import read_small_file

MAX_JSON_BYTES = 100_000_000
"""Length of the longest JSON that is read."""

_MOST_NESTED = 32
"""Objects in objects; transformers goes through its files recursively."""


@dataclass(frozen=True, kw_only=True)
class JsonObject:
    """The members of an object, each checked as it is taken; what cannot be true is a `SourceError`."""

    file: Path
    """Where it comes from, for errors."""
    remedy: str
    """What to do about a file that is damaged, for errors."""
    prefix: str
    """What errors put before a member's name."""
    members: Mapping[str, object]
    """What it holds."""

    def refuse(self, key: str, problem: str) -> NoReturn:
        """Raise `SourceError` about a member."""
        raise SourceError(self.file, field=self.prefix + key, problem=problem, remedy=self.remedy)

    def text(self, key: str) -> str:
        """A member that is text."""
        value = self.members.get(key)
        if not isinstance(value, str) or not is_text(value):
            self.refuse(key, f"expected text, got {short(value)}")
        return value

    def natural(self, key: str) -> int:
        """A member that is a whole number, 0 or more."""
        value = self.members.get(key)
        if not is_natural(value):
            self.refuse(key, f"expected a whole number, 0 or more, got {short(value)}")
        return value

    def naturals(self, key: str) -> tuple[int, ...]:
        """A member that is a list of whole numbers, 0 or more."""
        value = self.members.get(key)
        if not isinstance(value, list) or not all(is_natural(item) for item in value):
            self.refuse(key, f"expected a list of whole numbers, 0 or more, got {short(value)}")
        return tuple(value)

    def inner(self, key: str, *, prefix: str | None = None) -> JsonObject:
        """A member that is an object itself; errors put `prefix` before the names in it, or else `key` and a dot."""
        value = self.members.get(key)
        if not isinstance(value, dict):
            self.refuse(key, f"expected an object, got {short(value)}")
        shown = key if key.isprintable() and len(key) <= 200 else short(key)
        prefix = f"{self.prefix}{shown}." if prefix is None else prefix
        return JsonObject(file=self.file, remedy=self.remedy, prefix=prefix, members=value)

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)


def parse_json_object(file: Path, raw: bytes, *, field: str, remedy: str) -> JsonObject:
    """Parse bytes as one JSON object.

    Args:
        file: Where they come from.
        raw: The bytes.
        field: What errors call them.
        remedy: What to do about a file that is damaged.

    Raises:
        SourceError: Too long, not UTF-8, not JSON, not an object, nested too deep, or an object in it has the same key
            twice.
    """

    def refuse(problem: str, cause: BaseException | None = None) -> NoReturn:
        raise SourceError(file, field=field, problem=problem, remedy=remedy) from cause

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        members = dict(pairs)
        for key in members:
            if not is_text(key):
                refuse(f"key {short(key)} is no text: it has half of a surrogate pair")
        if len(members) != len(pairs):
            refuse(f"key {short(Counter(key for key, _ in pairs).most_common(1)[0][0])} occurs twice")
        return members

    if len(raw) > MAX_JSON_BYTES:
        refuse(f"expected at most {MAX_JSON_BYTES} bytes of JSON, got {len(raw)}")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        refuse(f"not UTF-8 ({error})", error)
    except SourceError:
        raise
    except (ValueError, RecursionError) as error:
        refuse(f"not valid JSON ({error})", error)
    if not isinstance(value, dict):
        refuse(f"expected a JSON object, got {type(value).__name__}")
    if _depth(value, _MOST_NESTED) > _MOST_NESTED:
        refuse(f"lists and objects are nested more than {_MOST_NESTED} deep")
    return JsonObject(file=file, remedy=remedy, prefix="", members=value)


def _depth(value: object, limit: int) -> int:
    """How deep lists and objects are nested, counted no further than one beyond the limit."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if limit < 0:
        return 1
    return 1 + max((_depth(item, limit - 1) for item in inner if isinstance(item, dict | list)), default=0)


def read_json_object(file: Path, *, field: str, remedy: str, max_bytes: int = MAX_JSON_BYTES) -> JsonObject:
    """Read a regular file of a believable size as one JSON object.

    Args:
        file: The file; a link is followed.
        field: What errors call its content.
        remedy: What to do about a file that is damaged.
        max_bytes: Length of the longest file that is read.

    Raises:
        SourceError: It cannot be read, is no regular file or too long, or as for `parse_json_object`.
    """
    try:
        raw = read_small_file(file, max_bytes=max_bytes)
    except OSError as error:
        raise SourceError(file, field="file", problem=f"it cannot be read ({error.strerror})", remedy=remedy) from error
    return parse_json_object(file, raw, field=field, remedy=remedy)


def is_natural(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number that torch can count to."""
    # JSON's true is an int to Python, and torch counts in 64 bits.
    return type(value) is int and 0 <= value < 2**63


def is_text(value: str) -> bool:
    """Whether a string can be written down: JSON's escapes can give halves of surrogate pairs, which cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def short(value: object) -> str:
    """A value as errors show it: on one line, in ASCII, of bounded length."""
    text = ascii(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
