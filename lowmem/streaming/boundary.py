"""Boundary activations: each block's input, kept in its tier from the forward until the block's backward."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Boundary(Protocol):
    """One kept activation."""

    def take(self) -> Tensor:
        """Give it back on the compute device, once; its tier's memory is free afterwards."""


class DeviceBoundary:
    """Kept where it is, by reference."""

    def __init__(self, value: Tensor) -> None:
        self._value: Tensor | None = value.detach()
        self._version = value._version

    def take(self) -> Tensor:
        """Give the activation back.

        Raises:
            RuntimeError: It was changed in place since the forward, or was taken before.
        """
        value = self._value
        if value is None:
            raise RuntimeError(
                "backward ran twice through a streamed block; run the forward again (retain_graph is "
                "not supported: the block keeps nothing for a second backward)"
            )
        if value._version != self._version:
            raise RuntimeError(
                "a boundary activation was changed in place after its block's forward; clone it before changing it"
            )
        self._value = None
        return value


def bytes_of(value: Tensor) -> int:
    """Bytes of an activation."""
    return value.numel() * value.element_size()


__all__ = ["Boundary", "DeviceBoundary", "bytes_of"]
