"""What counts as a clear refusal, and what as the same result."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowmem import UnsupportedError
from offload import BudgetError, OffloadError
from tests.fuzz.workers import Fault

_ROOT = Path(__file__).parents[2]
_OURS = (str(_ROOT / "lowmem"), str(_ROOT / "offload"))
_LONGEST = 700
"""Characters of a refusal: about four lines."""
_LARGEST = 1e6
"""Values above this come of damaged weights; how far two kernels differ there says nothing."""


def check_refusal(error: Exception, folder: Path) -> None:
    """See that an error is one clear sentence of ours that names a file.

    Args:
        error: What the library raised.
        folder: What was damaged; its name, or that of anything that is or was in it, has to be in the message.

    Raises:
        Exception: `error` itself, if it is of a type that users are not told about, or another library's.
        Fault: The message names no file, or is a page long.
    """
    if not isinstance(error, OffloadError | UnsupportedError | ValueError | FileNotFoundError | FileExistsError):
        raise error
    # One of another library is let through when it says all that ours would: which file.
    raised = traceback.extract_tb(error.__traceback__)[-1].filename
    message = str(error)
    if not raised.startswith(_OURS):
        raise error
    if len(message) > _LONGEST:
        raise Fault(f"{type(error).__name__} of {len(message) // 1000} thousand characters: {message}") from error
    if not isinstance(error, UnsupportedError | BudgetError) and not _names_a_file(message, folder):
        place = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} of {Path(place.filename).name} {place.name} names no file"
        raise Fault(f"{kind}: {message}") from error


def _names_a_file(message: str, folder: Path) -> bool:
    return str(folder) in message or any(
        suffix in message for suffix in (".json", ".safetensors", ".bin", ".pt", ".lock", ".pth")
    )


def check_equal(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """See that tensors are the same up to rounding in another order.

    Raises:
        Fault: They are not.
    """
    if got.keys() != expected.keys():
        raise Fault(f"{what} has other tensors: {sorted(got.keys() ^ expected.keys())[:4]}")
    for name, value in expected.items():
        mine, theirs = got[name].double(), value.double()
        if mine.shape != theirs.shape:
            raise Fault(f"{what} has another shape: {name}, {tuple(mine.shape)} instead of {tuple(theirs.shape)}")
        if not bool(theirs.isfinite().all()) or float(theirs.abs().max() if theirs.numel() else 0) > _LARGEST:
            continue
        if not torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6):
            worst = float((mine - theirs).abs().max())
            raise Fault(f"{what} differs: {name} by {worst:.3g}")


__all__ = ["check_equal", "check_refusal"]
