"""The public names and their signatures, as recorded in public_face.json: nothing a script uses changes unnoticed.

LOWMEM_RECORD=1 python -m pytest tests/golden      writes them anew
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path

import lowmem
import lowmem.full
import lowmem.optim
import offload

RECORDED = Path(__file__).parent / "public_face.json"


def described(value: object) -> str | dict[str, str]:
    """A signature, or a class's public members with theirs."""
    if inspect.isclass(value):
        return {
            name: signature(member) if callable(member) else type(member).__name__
            for name, member in inspect.getmembers(value)
            if (not name.startswith("_") or name == "__init__")
            and any(
                name in vars(base) for base in value.__mro__ if base.__module__.split(".")[0] in ("lowmem", "offload")
            )
        }
    return signature(value) if callable(value) else type(value).__name__


def signature(value: Callable[..., object]) -> str:
    """Names, kinds and defaults; how a type is spelled depends on imports and is not compared."""
    bare = inspect.signature(value)
    params = [param.replace(annotation=inspect.Parameter.empty) for param in bare.parameters.values()]
    return str(inspect.Signature(params))


def test_public_face_is_as_recorded() -> None:
    errors = [
        name for name in offload.__all__ if name.endswith("Error") or name in ("Closed", "SourceChanged", "TierFull")
    ]
    faces = (lowmem, lowmem.optim, lowmem.full)
    names = [(package, name) for package in faces for name in package.__all__]
    found = {
        f"{package.__name__}.{name}": described(getattr(package, name))
        for package, name in [*names, *((offload, name) for name in errors)]
    }
    if os.environ.get("LOWMEM_RECORD"):
        RECORDED.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        return
    assert found == json.loads(RECORDED.read_text())
