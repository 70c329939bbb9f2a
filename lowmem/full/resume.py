"""Going on after a run was killed: from the last step whose state is on disk."""

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
        UnsupportedError: State was kept in memory.
        SourceError: No step has been committed in the folder.
    """
    engine = engine_of(optimizer.param_groups[0]["params"][0])
    if not isinstance(engine, OptimizerEngine) or not isinstance(optimizer, RuleOptimizer):
        raise ValueError("expected an optimizer of lowmem.optim on a model opened with tuning='full'")
    return engine.resume(optimizer)


__all__ = ["resume_last_step"]
