"""Random numbers that follow from integers alone: nothing to save, the same after a resume."""

import torch

_MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """A seed from several integers, by SplitMix64's finaliser; below 2**63."""
    seed = 0
    for value in values:
        seed = (seed + (value & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) & _MASK
        seed ^= seed >> 31
    return seed >> 1


def generator(seed: int, device: torch.device) -> torch.Generator:
    """A generator on `device`. Its numbers are the same on every device of that kind, not between CPU and CUDA."""
    return torch.Generator(device=device).manual_seed(seed)
