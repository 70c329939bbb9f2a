"""Training every weight: master weights, gradients and AdamW's state in the tier that the plan names."""

from lowmem.full.optimizer_engine import resume_last_step, state_on_disk, update_in_backward

__all__ = ["resume_last_step", "state_on_disk", "update_in_backward"]
