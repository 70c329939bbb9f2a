"""Where the parameters of one unit lie in its flat buffers: one place for weight, gradient and both moments."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

_ALIGN_ELEMENTS = 16
"""A cache line of fp32: vector instructions cover a parameter from its first element on."""
PAGE_ELEMENTS = 1024
"""A page of fp32: buffers end on one, so that they can be read and written past the page cache."""


@dataclass(frozen=True, kw_only=True)
class ParamPlace:
    """One parameter's elements in a flat buffer."""

    key: str
    """Fully qualified name in the model."""
    shape: torch.Size
    """Shape in the model."""
    start: int
    """First element."""

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.shape.numel()


@dataclass(frozen=True, kw_only=True)
class UnitLayout:
    """The flat buffers of one unit: a decoder block, or one parameter outside the blocks."""

    name: str
    """The unit's name, for errors and files."""
    places: tuple[ParamPlace, ...]
    """Its parameters in the order of the buffer."""
    numel: int
    """Elements of one buffer, a whole number of pages; what belongs to no parameter stays zero."""


def lay_out_unit(name: str, shapes: Iterable[tuple[str, torch.Size]]) -> UnitLayout:
    """Lay out a unit: matrices first, then vectors.

    Norms and biases usually have a decay of their own. Apart from the matrices, they leave two long runs of equal
    settings, each of which is one call of the fused update.

    Args:
        name: The unit's name.
        shapes: Name and shape of each parameter.
    """
    places: list[ParamPlace] = []
    end = 0
    for key, shape in sorted(shapes, key=lambda entry: len(entry[1]) < 2):
        places.append(ParamPlace(key=key, shape=shape, start=end))
        end += -(-shape.numel() // _ALIGN_ELEMENTS) * _ALIGN_ELEMENTS
    return UnitLayout(name=name, places=tuple(places), numel=max(1, -(-end // PAGE_ELEMENTS)) * PAGE_ELEMENTS)


__all__ = ["PAGE_ELEMENTS", "ParamPlace", "UnitLayout", "lay_out_unit"]
