"""The pages of docs/ that are made from the code: what is refused, and which architectures are supported.

    python -m docs.make_tables refusals architectures

`tests/test_docs.py` holds the first against the code in every run, and the second with --slow.
"""

import ast
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

_REFUSALS = """# What is refused

Made from the code by `python -m docs.make_tables refusals`; `…` stands for what a message fills in. Anything that
cannot be honoured exactly raises `lowmem.UnsupportedError` before a weight is read or changed.
[Troubleshooting](troubleshooting.md) has the errors of files, budgets and machines.

"""

_ARCHITECTURES = """# Supported architectures

Made by `python -m docs.make_tables architectures`, which builds a tiny checkpoint of every decoder-only causal
language model of transformers {version} and plans for it. **Streams**: blocks are streamed, and training equals the
plain model's (`tests/lowmem/test_architectures.py`). **In chunks**: long sequences may also walk a block piece by
piece; others take whole sequences.

"""


class Refusal(NamedTuple):
    """One call of UnsupportedError in the code, with what it fills in left open."""

    place: str
    what: str
    reason: str
    instead: str


def refusals() -> list[Refusal]:
    """Every refusal in the code, in the order of files and lines."""
    return [found for path in sorted((ROOT / "lowmem").rglob("*.py")) for found in _refusals_in(path)]


def _refusals_in(path: Path) -> Iterator[Refusal]:
    tree = ast.parse(path.read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node.func) == "UnsupportedError"]
    for call in sorted(calls, key=lambda call: call.lineno):
        words = {keyword.arg: _text(keyword.value) for keyword in call.keywords}
        what = _text(call.args[0]) if call.args else words.get("what", "…")
        place = str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
        yield Refusal(place, what, words.get("reason", "…"), words.get("instead", "…"))


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _text(node: ast.expr) -> str:
    """A literal as it is, and what a message fills in as an ellipsis."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
        case _:
            return "…"


def refusals_page() -> str:
    """The page, by the part of the code that refuses."""
    lines, place = [_REFUSALS], ""
    for refusal in refusals():
        if refusal.place != place:
            place = refusal.place
            lines.append(f"\n## {place}\n\n| refused | because | instead |\n|---|---|---|\n")
        lines.append(f"| {' | '.join(_cell(text) for text in refusal[1:])} |\n")
    return "".join(lines).replace("\n\n\n", "\n\n")


def _cell(text: str) -> str:
    """Text for a cell of a table, in which nothing is markup."""
    for mark in "\\|<>*_`[]{}":
        text = text.replace(mark, f"\\{mark}" if mark not in "<>" else {"<": "&lt;", ">": "&gt;"}[mark])
    return " ".join(text.split())


def architectures_page() -> str:
    """The page, from a plan for a tiny checkpoint of each; takes minutes."""
    import transformers

    import lowmem
    from tests.zoo.architectures import ARCHITECTURES, build

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    lines = [
        _ARCHITECTURES.format(version=transformers.__version__),
        "| model type | streams | in chunks |\n|---|---|---|\n",
    ]
    for name in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = build(name, Path(scratch))
            try:
                plan = lowmem.plan(folder, batch_size=1, seq_len=16, device="cpu", budget=lowmem.Budget(device="4GiB"))
            except lowmem.UnsupportedError as error:
                reason = str(error).replace(str(folder), "…")
                lines.append(f"| {_cell(name)} | no: {_cell(reason)} | |\n")
                continue
        # Why not is the same for all: they were not found exact.
        lines.append(f"| {_cell(name)} | yes | {'no' if plan.unchunkable else 'yes'} |\n")
    return "".join(lines)


PAGES = {"refusals": refusals_page, "architectures": architectures_page}


def main() -> None:
    for name in sys.argv[1:] or PAGES:
        (DOCS / f"{name}.md").write_text(PAGES[name]())
        print(DOCS / f"{name}.md")


if __name__ == "__main__":
    main()
