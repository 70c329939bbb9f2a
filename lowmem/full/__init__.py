"""Training every weight: master weights, gradients and AdamW's state in the tier that the plan names."""

from lowmem.full.resume import resume_last_step

__all__ = ["resume_last_step"]
