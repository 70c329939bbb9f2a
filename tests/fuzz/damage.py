"""Ways to damage a file or a folder, each drawn from a seeded generator and described in a few words."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

_DEEP = 40_000
"""Levels of nesting: more than any reader's recursion limit."""

_LARGEST_BYTES = 1 << 24
"""Of a file that is damaged; one that is larger was made sparse before."""

ODD_VALUES: tuple[object, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    7,
    2**31,
    2**32,
    2**63,
    2**64,
    10**30,
    0.0,
    -0.5,
    1.5,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "0",
    "../x",
    "/etc/passwd",
    "a" * 5000,
    "\ud800",
    "\x00",
    [],
    {},
    [0],
    [[[]]],
    [None],
    {"x": 1},
    {"": {}},
)
"""What a field may be instead of what it should be."""


def damage_bytes(file: Path, rng: random.Random) -> str:
    """Change some bytes of a file, or how many there are."""
    if file.stat().st_size > _LARGEST_BYTES:
        return f"{file.name} left as it is"
    data = bytearray(file.read_bytes())
    size = len(data)
    kind = rng.choice(("flip", "flip", "flip many", "overwrite", "zero", "cut", "extend", "insert", "delete", "swap"))
    at = rng.randrange(size) if size else 0
    span = rng.choice((1, 2, 4, 8, 16, 100, 4096))
    if kind == "flip" and size:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "flip many" and size:
        for _ in range(rng.randrange(2, 40)):
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif kind == "overwrite":
        data[at : at + span] = rng.randbytes(len(data[at : at + span]))
    elif kind == "zero":
        data[at : at + span] = bytes(len(data[at : at + span]))
    elif kind == "cut":
        del data[at:]
    elif kind == "extend":
        data += rng.choice((bytes(span), rng.randbytes(span)))
    elif kind == "insert":
        data[at:at] = rng.randbytes(span)
    elif kind == "delete":
        del data[at : at + span]
    elif kind == "swap" and size:
        other = rng.randrange(size)
        first, second = data[at : at + span], data[other : other + span]
        common = min(len(first), len(second))
        data[at : at + common], data[other : other + common] = second[:common], first[:common]
    file.write_bytes(data)
    return f"{kind} {span} at {at} of {size} bytes of {file.name}"


def damage_json(file: Path, rng: random.Random) -> str:
    """Change one node of a JSON file, or its text as a whole."""
    content = _parsed(file)
    if content is None:
        return damage_bytes(file, rng)
    if rng.random() < 0.12:
        return _odd_text(file, rng)
    changed, what = damage_node(content, rng)
    try:
        text = json.dumps(changed)
    except RecursionError:
        return _odd_text(file, rng)
    if rng.random() < 0.05 and isinstance(content, dict) and content:
        key = rng.choice(sorted(content))
        text = text[:-1] + f", {json.dumps(key)}: {json.dumps(rng.choice(ODD_VALUES))}" + "}"
        what += f", and {key} a second time"
    file.write_text(text)
    return f"{what} in {file.name}"


def _parsed(file: Path) -> object:
    """A file's JSON; None if it has none, or is too deep or too large to be written again."""
    if file.stat().st_size > _LARGEST_BYTES:
        return None
    try:
        content: object = json.loads(file.read_bytes())
        json.dumps(content)
    except (ValueError, RecursionError):
        return None
    return content


def damage_node(content: object, rng: random.Random) -> tuple[object, str]:
    """Change one node of parsed JSON, drawn from all that there are.

    Returns:
        The changed content, in the same containers, and what was done.
    """
    places: list[tuple[dict[str, object] | list[object], str | int]] = []

    def collect(node: object) -> None:
        entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in entries:
            places.append((node, key))  # type: ignore[arg-type]
            collect(value)

    collect(content)
    if not places:
        return rng.choice(ODD_VALUES), "all of it replaced"
    # Half of the time near the root: that is where most readers look.
    near = [place for place in places if place[0] is content]
    holder, key = rng.choice(near if near and rng.random() < 0.5 else places)
    value = holder[key]  # type: ignore[index]
    kind = rng.choice(("odd", "odd", "odd", "drop", "rename", "text", "wrap", "near", "swap", "deep"))
    if kind == "drop":
        del holder[key]  # type: ignore[arg-type]
    elif kind == "rename" and isinstance(holder, dict):
        del holder[str(key)]
        holder[str(key) + rng.choice(("x", " ", "\n", "_"))] = value
    elif kind == "text":
        holder[key] = str(value)  # type: ignore[index]
    elif kind == "wrap":
        holder[key] = rng.choice(([value], {"x": value}, {str(key): value}))  # type: ignore[index]
    elif kind == "near" and isinstance(value, int | float):
        holder[key] = rng.choice((value + 1, value - 1, value * 2, value * 1000, -value, float(value)))  # type: ignore[index]
    elif kind == "swap":
        other = rng.choice([place for place in places if place[0] is holder])[1]
        holder[key], holder[other] = holder[other], value  # type: ignore[index]
    elif kind == "deep":
        nested: object = value
        for _ in range(rng.choice((10, 500))):
            nested = [nested]
        holder[key] = nested  # type: ignore[index]
    else:
        kind = "odd"
        holder[key] = rng.choice(ODD_VALUES)  # type: ignore[index]
    shown = repr(holder[key])[:60] if (key in holder if isinstance(holder, dict) else False) else ""  # type: ignore[index]
    return content, f"{kind} {str(key)[:60]} {shown}".rstrip()


def _odd_text(file: Path, rng: random.Random) -> str:
    """Replace a text by one that is no JSON, or JSON of another kind."""
    text = file.read_text(errors="replace")
    texts: dict[str, bytes] = {
        "nothing": b"",
        "null": b"null",
        "a list": b"[]",
        "a list of it": f"[{text}]".encode(),
        "a number": b"7",
        "text": b'"text"',
        "an empty object": b"{}",
        "blanks": b" \n\t ",
        "zeros": bytes(200),
        "with a byte order mark": b"\xef\xbb\xbf" + text.encode(),
        "UTF-16": text.encode("utf-16"),
        "Latin-1": text.encode() + b"\xe9",
        "deep lists": b"[" * _DEEP,
        "deep objects": b'{"a":' * _DEEP,
        "closed deep lists": b"[" * _DEEP + b"]" * _DEEP,
        "a deep field": text.rstrip()[:-1].encode() + b', "deep": ' + b"[" * _DEEP + b"]" * _DEEP + b"}",
        "a huge number": text.rstrip()[:-1].encode() + b', "huge": ' + b"9" * 6000 + b"}",
        "a comment": b"// a comment\n" + text.encode(),
        "twice": (text + text).encode(),
        "with a comma": text.rstrip()[:-1].encode() + b",}",
        "NaN": text.rstrip()[:-1].encode() + b', "odd": NaN}',
    }
    kind = rng.choice(sorted(texts))
    file.write_bytes(texts[kind])
    return f"{file.name} is {kind}"


def damage_safetensors(file: Path, rng: random.Random) -> str:
    """Change a safetensors file's header as JSON, its length, its bytes or its data."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    kind = rng.choice(("header", "header", "header", "length", "header bytes", "values", "values", "bytes"))
    if kind == "values" and len(data) > 8 + length:
        return _damage_values(file, data, start=8 + length, rng=rng)
    if kind == "bytes" or len(data) < 8 + length:
        return damage_bytes(file, rng)
    if kind == "length":
        lie = rng.choice((0, 1, 2, length - 1, length + 1, length + 8, len(data), 2**31, 2**32, 2**60, 2**64 - 1))
        file.write_bytes(lie.to_bytes(8, "little") + data[8:])
        return f"header of {length} bytes said to have {lie} in {file.name}"
    if kind == "header bytes":
        alone = file.with_name(".header")
        alone.write_bytes(data[8 : 8 + length])
        what = damage_bytes(alone, rng)
        changed = alone.read_bytes()
        alone.unlink()
    else:
        try:
            header = json.loads(data[8 : 8 + length])
        except ValueError:
            return damage_bytes(file, rng)
        if not isinstance(header, dict):
            return damage_bytes(file, rng)
        content, what = _damage_header(header, rng)
        changed = json.dumps(content).encode("utf-8", "surrogatepass")
        changed += b" " * (-len(changed) % 8)
    said = length if rng.random() < 0.1 else len(changed)
    file.write_bytes(said.to_bytes(8, "little") + changed + data[8 + length :])
    return f"{what} in the header of {file.name}"


def _damage_header(header: dict[str, dict[str, object]], rng: random.Random) -> tuple[object, str]:
    names = [name for name in header if name != "__metadata__"]
    kind = rng.choice(("node", "node", "dtype", "shape", "offsets", "overlap", "exchange", "drop", "rename", "add"))
    if kind == "node" or len(names) < 2:
        return damage_node(header, rng)
    name, other = rng.sample(names, 2)
    entry = header[name]
    begin, end = entry["data_offsets"]  # type: ignore[misc]
    if kind == "dtype":
        entry["dtype"] = rng.choice(("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "f32", "X", ""))
    elif kind == "shape":
        shape = list(entry["shape"])  # type: ignore[call-overload]
        choices = (
            [],
            shape[::-1],
            [*shape, 1],
            [1, *shape],
            [0],
            [-1],
            [2**62, 4],
            [s * 2 for s in shape],
            [end - begin],
        )
        entry["shape"] = rng.choice(choices)
    elif kind == "offsets":
        shift = rng.choice((-8, -4, -1, 1, 4, 8, 64))
        entry["data_offsets"] = rng.choice(
            ([begin + shift, end + shift], [begin, end + shift], [end, begin], [begin], [begin, end, end], [-4, end])
        )
    elif kind == "overlap":
        entry["data_offsets"] = header[other]["data_offsets"]
    elif kind == "exchange":
        header[name], header[other] = header[other], entry
    elif kind == "drop":
        del header[name]
    elif kind == "rename":
        header[rng.choice((name + "x", name.replace("0", "1"), "__metadata__", "", "../x"))] = header.pop(name)
    else:
        header["added.weight"] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    return header, f"{kind} {name}"


def _damage_values(file: Path, data: bytes, *, start: int, rng: random.Random) -> str:
    changed = bytearray(data)
    at = rng.randrange(start, len(data))
    kind = rng.choice(("bit", "bit", "zeros", "noise"))
    if kind == "bit":
        changed[at] ^= 1 << rng.randrange(8)
    else:
        num = min(rng.choice((4, 64, 1024)), len(data) - at)
        changed[at : at + num] = bytes(num) if kind == "zeros" else rng.randbytes(num)
    file.write_bytes(changed)
    return f"values of {file.name}: {kind} at {at}"


_LINK_TARGETS = (
    "/dev/zero",
    "/dev/random",
    "/dev/null",
    "/dev/full",
    "/etc/passwd",
    "/proc/self/mem",
    "/nonexistent/x",
    "/",
)


def damage_entry(file: Path, rng: random.Random) -> str:
    """Remove, exchange or replace a file by something else that a folder may hold."""
    kind = rng.choice(
        ("remove", "rename", "folder", "fifo", "socket", "link", "loop", "empty", "sparse", "exchange", "linked copy")
    )
    # An earlier damage may have left a folder or a FIFO.
    of_suffix = (other for other in file.parent.iterdir() if other != file and other.suffix == file.suffix)
    others = [other for other in of_suffix if stat.S_ISREG(other.lstat().st_mode)]
    if kind == "exchange" and others:
        other = rng.choice(sorted(others))
        kept = file.read_bytes()
        file.write_bytes(other.read_bytes())
        other.write_bytes(kept)
        return f"{file.name} and {other.name} exchanged"
    if kind == "linked copy":
        outside = file.parent.with_name(f"{file.parent.name}-outside")
        outside.mkdir(exist_ok=True)
        file.replace(outside / file.name)
        file.symlink_to(outside / file.name)
        return f"{file.name} is a link to a file outside"
    content_size = file.stat().st_size
    file.unlink()
    if kind == "rename":
        file.with_name(rng.choice((file.name + ".bak", "x" + file.name, file.name.upper()))).write_bytes(b"x")
    elif kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "socket":
        _bind_socket(file)
    elif kind == "link":
        target = rng.choice(_LINK_TARGETS)
        file.symlink_to(target)
        return f"{file.name} is a link to {target}"
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "empty":
        file.touch()
    elif kind == "sparse":
        with file.open("wb") as opened:
            opened.truncate(rng.choice((content_size, 1 << 31, 1 << 40)))
    else:
        kind = "removed"
    return f"{file.name}: {kind}"


def _bind_socket(file: Path) -> None:
    """A socket's entry; its path may be longer than an address can be."""
    previous = Path.cwd()
    os.chdir(file.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(file.name)
    finally:
        os.chdir(previous)


def damage_file(file: Path, rng: random.Random) -> str:
    """Damage a regular file in a way that suits its kind."""
    if not file.exists() or not stat.S_ISREG(file.lstat().st_mode) or file.stat().st_size > _LARGEST_BYTES:
        return f"{file.name} left as it is"
    if rng.random() < 0.15:
        return damage_entry(file, rng)
    by_suffix: dict[str, Callable[[Path, random.Random], str]] = {
        ".json": damage_json,
        ".safetensors": damage_safetensors,
    }
    damages = by_suffix.get(file.suffix, damage_bytes)
    if rng.random() < 0.15:
        damages = damage_bytes
    return damages(file, rng)


def edit_json(file: Path, fields: dict[str, object]) -> None:
    """Set fields of a JSON file that is an object; any other is left alone."""
    content = _parsed(file)
    if isinstance(content, dict):
        file.write_text(json.dumps(content | fields))


def copy_folder(source: Path, target: Path) -> Path:
    """A fresh copy to be damaged."""
    return Path(shutil.copytree(source, target))


__all__ = [
    "ODD_VALUES",
    "copy_folder",
    "damage_bytes",
    "damage_entry",
    "damage_file",
    "damage_json",
    "damage_node",
    "damage_safetensors",
    "edit_json",
]
