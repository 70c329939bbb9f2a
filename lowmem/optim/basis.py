"""Bases of projection: how they are made, and what projecting and lifting mean for each kind.

Everything here sees a gradient with the projected side first: shape (..., m, n), a stack of matrices where it has more
than two dimensions (experts), each with a basis of its own; coordinates are chosen once for a whole stack.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.optim.method import Projector
from lowmem.optim.rule import generator

# Extra columns of the random sketch, cut off in the end (Halko et al., arXiv 0909.4061, section 4.2).
_OVERSAMPLING = 8


class Basis(ABC):
    """A basis P of r columns in m dimensions."""

    @abstractmethod
    def project(self, full: Tensor) -> Tensor:
        """P^T G: (..., m, n) to (..., r, n)."""

    @abstractmethod
    def lift(self, low: Tensor) -> Tensor:
        """P N: (..., r, n) to (..., m, n)."""

    @abstractmethod
    def overlap(self, old: Basis) -> Tensor:
        """P^T P_old, (..., r, r): what takes coordinates of the old basis into this one."""


@dataclass(frozen=True)
class DenseBasis(Basis):
    """A basis by its matrix, (..., m, r), fp32."""

    matrix: Tensor

    def project(self, full: Tensor) -> Tensor:
        return self.matrix.mT @ full

    def lift(self, low: Tensor) -> Tensor:
        return self.matrix @ low

    def overlap(self, old: Basis) -> Tensor:
        assert isinstance(old, DenseBasis)
        return self.matrix.mT @ old.matrix


@dataclass(frozen=True)
class Selection(Basis):
    """Some of the m coordinates, in increasing order."""

    indices: Tensor
    num_coordinates: int

    def project(self, full: Tensor) -> Tensor:
        """The chosen rows."""
        return full.index_select(-2, self.indices)

    def lift(self, low: Tensor) -> Tensor:
        """The chosen rows in place, zeros elsewhere."""
        full = low.new_zeros((*low.shape[:-2], self.num_coordinates, low.shape[-1]))
        return full.index_copy_(-2, self.indices, low)

    def overlap(self, old: Basis) -> Tensor:
        """1 where a coordinate was chosen before as well."""
        assert isinstance(old, Selection)
        return (self.indices[:, None] == old.indices[None, :]).float()


def rsvd_basis(full: Tensor, rank: int, *, seed: int) -> Tensor:
    """Nearly the SVD's, from a random sketch and one power iteration (arXiv 0909.4061, algorithms 4.4 and 5.1)."""
    *batch, num_rows, num_columns = full.shape
    width = min(rank + _OVERSAMPLING, num_rows, num_columns)
    source = generator(seed, full.device)
    sketch = torch.randn((*batch, num_columns, width), generator=source, device=full.device)
    frame = _orthonormal(full @ sketch)
    frame = _orthonormal(full @ (full.mT @ frame))
    small: Tensor = torch.linalg.svd(frame.mT @ full, full_matrices=False).U
    return (frame @ small)[..., :rank].contiguous()


def warm_basis(full: Tensor, rank: int, *, old: Tensor | None, seed: int) -> Tensor:
    """One power iteration from the last basis, orth(G G^T P_old); two from random columns where there is none."""
    if old is None:
        *batch, num_rows, _ = full.shape
        start = torch.randn((*batch, num_rows, rank), generator=generator(seed, full.device), device=full.device)
        old = _orthonormal(full @ (full.mT @ start))
    return _orthonormal(full @ (full.mT @ old))


def gaussian_basis(shape: tuple[int, ...], *, seed: int, device: torch.device) -> Tensor:
    """Independent normal entries of variance 1/r (APOLLO, arXiv 2412.05270, algorithm 1); shape (..., m, r)."""
    return torch.randn(shape, generator=generator(seed, device), device=device).mul_(shape[-1] ** -0.5)


def choose_coordinates(num_coordinates: int, count: int, *, seed: int, device: torch.device) -> Selection:
    """`count` of the coordinates at random, the same on every device."""
    order = torch.randperm(num_coordinates, generator=generator(seed, torch.device("cpu")))
    return Selection(order[:count].sort().values.to(device), num_coordinates)


def gradient_basis(kind: Projector, full: Tensor, rank: int, *, old: Tensor | None, seed: int) -> Tensor:
    """A basis read off the gradient, (..., m, rank) in fp32 with orthonormal columns."""
    if kind == "svd":
        # The first left singular vectors (GaLore, arXiv 2403.03507, algorithm 2).
        left: Tensor = torch.linalg.svd(full, full_matrices=False).U
        return left[..., :rank].contiguous()
    if kind == "rsvd":
        return rsvd_basis(full, rank, seed=seed)
    return warm_basis(full, rank, old=old, seed=seed)


def _orthonormal(columns: Tensor) -> Tensor:
    frame: Tensor = torch.linalg.qr(columns).Q
    return frame
