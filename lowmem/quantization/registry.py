"""Which format a checkpoint is in, as its config.json says; and its packed weights, found and checked."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING

import torch

from lowmem.errors import UnsupportedError
from lowmem.quantization.float8 import Float8
from lowmem.quantization.format import Format, PackedWeight, refuse_weight
from lowmem.quantization.four_bit import FourBit
from lowmem.quantization.int4 import Awq, Gptq
from lowmem.quantization.int8 import Int8
from lowmem.quantization.mxfp4 import Mxfp4
from offload import SourceError, TensorReader, TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

FORMATS: tuple[type[Format], ...] = (FourBit, Int8, Float8, Mxfp4, Gptq, Awq)
"""All that can be read in place; the first that recognises a configuration takes it."""

_LARGEST_DESCRIPTION_BYTES = 1 << 20


def format_of(quantization: object) -> Format:
    """The format that a checkpoint's configuration names.

    Args:
        quantization: `quantization_config` of its config.json.

    Raises:
        UnsupportedError: The format, or an option in it, is not known; names it.
    """
    settings = _as_mapping(quantization)
    for kind in FORMATS:
        found = kind.from_config(settings)
        if found is not None:
            return found
    method = settings.get("quant_method")
    raise UnsupportedError(
        f"a checkpoint quantised with {ascii(method)[:60] if not isinstance(method, str) else method[:60]}",
        reason=f"its packed weights cannot be unpacked block by block; {', '.join(names())} can",
        instead="the bf16, fp16 or fp32 checkpoint of the same model",
    )


def names() -> list[str]:
    """Formats that can be read, for messages."""
    return sorted({name for kind in FORMATS for name in kind.reads})


def _as_mapping(quantization: object) -> Mapping[str, object]:
    if isinstance(quantization, Mapping):
        return quantization
    to_dict = getattr(quantization, "to_dict", None)
    settings = to_dict() if callable(to_dict) else None
    if isinstance(settings, Mapping):
        return settings
    raise UnsupportedError(
        f"quantization_config {ascii(quantization)[:60]}",
        reason="it is not an object of settings",
        instead="the config.json that belongs to these weights",
    )


def find_packed(quantization: object, tensors: Mapping[str, TensorSpec], *, file: Path) -> dict[str, PackedWeight]:
    """The packed weights of a quantised checkpoint, by the names that they would have if they were not.

    Args:
        quantization: `quantization_config` of its config.json.
        tensors: Its stored tensors by name.
        file: Its config.json, for errors.

    Raises:
        UnsupportedError: The format, or an option in it, is not known.
        SourceError: A weight's parts do not belong together, or none is packed.
    """
    described = format_of(quantization)
    with closing(TensorReader()) as reader:

        def read(spec: TensorSpec) -> bytes:
            if spec.nbytes > _LARGEST_DESCRIPTION_BYTES:
                refuse_weight(spec.name, spec, f"expected a description of at most 1 MiB, got {spec.nbytes} bytes")
            return bytes(reader.read(spec, 0, nbytes=spec.nbytes).view(torch.uint8).numpy())

        found = described.find(tensors, read)
    if not found:
        raise SourceError(
            file,
            field="quantization_config",
            problem=f"it says that weights are stored as {described.name}, and the files hold no such tensor",
            remedy="remove the field if the weights are stored plainly, or download the checkpoint again",
        )
    return found
