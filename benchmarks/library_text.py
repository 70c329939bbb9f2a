"""Real text that every Python installation has: the standard library's docstrings, and its code without them."""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "__pycache__", "pydoc_data"}


@dataclass(frozen=True)
class Texts:
    """Bytes as tokens, each a flat tensor of int64 below 256."""

    docstrings: Tensor
    """What the base model is trained on."""
    code: Tensor
    """What it is then trained on: code without docstrings and comments."""
    held_out_code: Tensor
    """Code of other files."""


def collect(*, num_docstring_bytes: int, num_code_bytes: int, num_held_out_bytes: int) -> Texts:
    """Read modules in an order that mixes packages and is the same everywhere, until there is enough.

    Raises:
        ValueError: The standard library is smaller than that.
    """
    docstrings, code, held_out = bytearray(), bytearray(), bytearray()
    for number, (docs, body) in enumerate(_modules()):
        docstrings += docs
        if number % 8 == 0:
            held_out += body
        else:
            code += body
        wanted = (num_docstring_bytes, num_code_bytes, num_held_out_bytes)
        if all(len(text) >= size for text, size in zip((docstrings, code, held_out), wanted, strict=True)):
            return Texts(
                *(_tokens(text[:size]) for text, size in zip((docstrings, code, held_out), wanted, strict=True))
            )
    raise ValueError(
        f"the standard library has {len(docstrings)} bytes of docstrings; {num_docstring_bytes} were wanted"
    )


def _modules() -> Iterator[tuple[bytes, bytes]]:
    """Docstrings, and code without them, of one module after the other."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts)]
    for path in sorted(paths, key=lambda path: hashlib.sha1(str(path.relative_to(root)).encode()).digest()):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        docs = _take_docstrings(tree)
        yield "\n\n".join([*docs, ""]).encode(), (ast.unparse(tree) + "\n\n").encode()


def _take_docstrings(tree: ast.Module) -> list[str]:
    """Remove the docstrings from a tree and return them."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is not None:
            found.append(docstring)
            node.body = node.body[1:] or [ast.Pass()]
    return found


def _tokens(text: bytearray) -> Tensor:
    return torch.frombuffer(text, dtype=torch.uint8).long()
