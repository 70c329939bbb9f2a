"""Bounds on an update, and the norms they are made of; each matrix of a stack by itself."""

import torch
from torch import Tensor


def norm_of_matrices(values: Tensor) -> Tensor:
    """Frobenius norm over the last two dimensions, kept as size 1; over everything for fewer dimensions."""
    if values.ndim < 2:
        return torch.sqrt(values.square().sum()).reshape((1,) * values.ndim)
    norm: Tensor = torch.linalg.vector_norm(values, dim=(-2, -1), keepdim=True)
    return norm


def limit_norm_growth(values: Tensor, last_norm: Tensor, limit: float) -> Tensor:
    """Scale `values` down to `limit` times the last norm, in place, and remember the new norm (arXiv 2410.01623).

    Args:
        values: The update.
        last_norm: Norm of the last update after limiting; 0 (none yet, or nothing changed) limits nothing.
        limit: Largest ratio of the two.
    """
    norm = norm_of_matrices(values)
    bound = limit * last_norm
    limited = (last_norm > 0) & (norm > bound)
    values.mul_(torch.where(limited, bound / torch.where(norm > 0, norm, 1.0), 1.0))
    last_norm.copy_(torch.where(limited, bound, norm))
    return values


def limit_update_rms(values: Tensor, limit: float) -> Tensor:
    """Scale `values` down, in place, to a root mean square of at most `limit` (arXiv 1804.04235, section 6)."""
    num_values = values.shape[-2:].numel() if values.ndim >= 2 else values.numel()
    rms = norm_of_matrices(values) / num_values**0.5
    return values.div_((rms / limit).clamp_min_(1.0))


def norm_ratio(direction: Tensor, projected: Tensor, *, per: str) -> Tensor:
    """||N|| / ||R|| per channel (column) or per tensor, 0 where R is 0."""
    if per == "channel":
        upper = torch.linalg.vector_norm(direction, dim=-2, keepdim=True)
        lower = torch.linalg.vector_norm(projected, dim=-2, keepdim=True)
    else:
        upper, lower = norm_of_matrices(direction), norm_of_matrices(projected)
    return torch.where(lower > 0, upper / torch.where(lower > 0, lower, 1.0), 0.0)
