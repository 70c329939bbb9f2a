"""What a training loop can ask of full tuning: to go on from the last step on disk, to update within the backward."""

from __future__ import annotations

import torch

from lowmem.full.optimizer_engine import OptimizerEngine
from lowmem.optim.offloaded import engine_of
from lowmem.optim.optimizer import RuleOptimizer


def resume_last_step(optimizer: torch.optim.Optimizer) -> int:
    """Bring weights, moments and the optimizer's settings to the last whole step that `Budget.disk` holds.

    For training loops of one's own; the Trainer resumes from its checkpoints. Data order, random numbers and
    learning-rate schedulers are the caller's.

    Args:
        optimizer: Of `lowmem.optim`, made as in the run that was killed, on a model opened in the same way with the
            same folder.

    Returns:
        The number of steps that have been taken.

    Raises:
        ValueError: The optimizer is not one of a model opened with ``tuning="full"``, or has other groups.
        UnsupportedError: State was kept in memory (`state_on_disk` for optimizers other than AdamW in fp32).
        SourceError: No step has been committed in the folder.
    """
    engine, own = _engine(optimizer)
    return engine.resume(own)


def state_on_disk(optimizer: torch.optim.Optimizer) -> None:
    """Keep the state of an optimizer that is not AdamW in fp32 on disk, beside the weights, instead of in RAM.

    GaLore and its kin, and AdamW with bf16 or 8-bit moments. Their state is then committed with each step as AdamW's
    is: a killed run goes on with `resume_last_step`, and `state_dict()` stays small. Each step reads and writes it.

    Args:
        optimizer: Of `lowmem.optim`, before its first step, on a model opened with ``tuning="full"`` and state on disk.

    Raises:
        ValueError: The optimizer is not one of a model opened with ``tuning="full"``.
        UnsupportedError: The weights are in memory.
        RuntimeError: A step has been taken.
    """
    engine, own = _engine(optimizer)
    engine.state_on_disk(own)


def update_in_backward(optimizer: torch.optim.Optimizer) -> None:
    """Update each block with state on disk within its backward, which saves writing and reading its gradient.

    The norm of all gradients is not known then: clipping is refused when it would change something, and so is gradient
    accumulation. The logged norm is right all the same. Settings are those that the groups have during the backward.

    Args:
        optimizer: `lowmem.optim.AdamW` on a model opened with ``tuning="full"`` and state on disk.

    Raises:
        ValueError: The optimizer is not one of a model opened with ``tuning="full"``.
        UnsupportedError: State is in memory, or the optimizer is not AdamW in fp32.
    """
    engine, own = _engine(optimizer)
    engine.update_in_backward(own)


def _engine(optimizer: torch.optim.Optimizer) -> tuple[OptimizerEngine, RuleOptimizer]:
    engine = engine_of(optimizer.param_groups[0]["params"][0])
    if not isinstance(engine, OptimizerEngine) or not isinstance(optimizer, RuleOptimizer):
        raise ValueError("expected an optimizer of lowmem.optim on a model opened with tuning='full'")
    return engine, optimizer


__all__ = ["resume_last_step", "state_on_disk", "update_in_backward"]
