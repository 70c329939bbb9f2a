"""What one training step is to do: the task, the batch and its lengths. Plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal, cast, get_args

import torch

from offload import ceil_div

Task = Literal["sft", "dpo", "kto", "reward", "grpo", "rloo", "generate"]
"""What can be planned: TRL's trainers by their short names, and generation alone."""


Tuning = Literal["adapter", "full"]
"""What is trained: PEFT adapters on frozen weights, or every weight."""


DeviceKind = Literal["cpu", "cuda"]
"""What computes."""


_PAIRED = frozenset({"dpo", "reward"})


_GENERATING = frozenset({"grpo", "rloo", "generate"})


# TRL's defaults: beta is 0 in GRPO and 0.05 in RLOO; DPO and KTO compare with a reference always.
_WITH_REFERENCE = frozenset({"dpo", "kto", "rloo"})


_DEFAULT_COMPLETION_TOKENS = 256


_MOST_EPOCHS = 1_000_000
"""More is a slip of the finger."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One optimizer step of a task."""

    task: Task = "sft"
    """What is run."""
    batch_size: int = 1
    """Examples of one forward on this device (`per_device_train_batch_size`); pairs in DPO and Reward."""
    seq_len: int
    """Tokens of one sequence, prompt and completion together, padding included."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients one optimizer step sums. Each passes over all weights anew."""
    completion_tokens: int | None = None
    """Tokens that are generated for each sequence. None, which becomes what TRL does by default: 256, or half of
    `seq_len`, where the task generates, else 0."""
    uses_reference: bool | None = None
    """Whether reference log-probabilities are computed within the step. None, which becomes what TRL's trainer does by
    default. False for DPO and KTO with `precompute_ref_log_probs=True`, True for GRPO with `beta` above 0."""
    has_mask: bool | None = None
    """Whether attention gets a mask, as it does for batches of sequences of unequal length, which None becomes."""
    device: DeviceKind = "cpu"
    """Kind of the compute device."""
    autocast: bool = True
    """Whether forwards of a model in a half type run under autocast to it, as TRL's trainers have them unless told
    otherwise. In fp32 it changes nothing; of a GPU, rates alone."""
    micro_batch: int | None = None
    """Sequences that go through a block at a time; None for the planner's choice."""
    chunk_tokens: int | None = None
    """Tokens of a sequence that go through a block at a time; None for the planner's choice."""
    tuning: Tuning = "adapter"
    """What is trained."""
    has_dropout: bool = False
    """Whether the adapter draws random numbers in training."""
    num_steps: int | None = None
    """Optimizer steps of the whole run, where its duration is to be predicted."""
    num_examples: int | None = None
    """Examples of the data set, in place of `num_steps`."""
    num_epochs: float = 1.0
    """How often a run goes through them."""
    num_sharing: int = 1
    """Processes of a machine, each with a part of its host memory, that keep one copy of what they cache there."""

    def __post_init__(self) -> None:
        for name, kind in (("task", Task), ("tuning", Tuning)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(get_args(kind))}")
        for name, unit, none in (
            ("batch_size", "", ""),
            ("seq_len", "", ""),
            ("gradient_accumulation_steps", "", ""),
            ("micro_batch", " sequence", ", or None to let lowmem choose"),
            ("chunk_tokens", " token", ", or None to let lowmem choose"),
            ("num_steps", "", ", or None"),
            ("num_examples", "", ", or None"),
            ("num_sharing", "", ""),
            ("completion_tokens", None, ""),
        ):
            value = getattr(self, name)
            if value is None and (none or unit is None):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r}: expected a whole number{none}")
            if unit is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1{unit}{none}")
        if not isinstance(self.autocast, bool):
            raise TypeError(f"autocast={self.autocast!r}: expected True or False")
        self._check_length()
        self._fill_in()
        if self.generates != (self.num_decodes > 0):
            expected = "at least 1" if self.generates else "0, because nothing is generated"
            raise ValueError(f"completion_tokens={self.completion_tokens} for task {self.task}: expected {expected}")
        if self.num_decodes > self.seq_len:
            raise ValueError(
                f"completion_tokens={self.completion_tokens} are more than seq_len={self.seq_len}, which counts prompt "
                "and completion together"
            )

    def _check_length(self) -> None:
        """Refuse what contradicts itself about how long the run is."""
        epochs = self.num_epochs
        if isinstance(epochs, bool) or not isinstance(epochs, int | float) or not 0 < epochs <= _MOST_EPOCHS:
            raise ValueError(f"num_epochs={epochs!r}: expected a number above 0 and at most {_MOST_EPOCHS:,}")
        if epochs != 1 and self.num_examples is None:
            raise ValueError(f"num_epochs={epochs!r} without num_examples: say how many examples a run goes through")
        if self.num_steps is not None and self.num_examples is not None:
            raise ValueError("give num_steps or num_examples, not both: each says how long the run is")

    def _fill_in(self) -> None:
        """Give fields that are None what TRL's trainers do."""
        if self.uses_reference and self.task in ("sft", "reward", "generate"):
            raise ValueError(f"use_reference=True: task {self.task} has no reference")
        completion = min(_DEFAULT_COMPLETION_TOKENS, max(1, self.seq_len // 2)) if self.generates else 0
        for name, default in (
            ("completion_tokens", completion),
            ("uses_reference", self.task in _WITH_REFERENCE),
            ("has_mask", self.batch_size > 1 or self.task not in ("sft", "generate")),
        ):
            if getattr(self, name) is None:
                # Frozen: fields can be set only past the class's own __setattr__.
                object.__setattr__(self, name, default)

    @property
    def generates(self) -> bool:
        """Whether sequences are generated."""
        return self.task in _GENERATING

    @property
    def trains(self) -> bool:
        """Whether there is a backward."""
        return self.task != "generate"

    @property
    def num_sequences(self) -> int:
        """Sequences that go through the model in one forward."""
        return self.batch_size * (2 if self.task in _PAIRED else 1)

    @property
    def num_generated(self) -> int:
        """Sequences that are generated together: GRPO and RLOO generate for all accumulated batches at once."""
        return self.batch_size * self.gradient_accumulation_steps if self.generates else 0

    @property
    def num_tokens(self) -> int:
        """Tokens of one forward."""
        return self.num_sequences * self.seq_len

    @property
    def step_tokens(self) -> int:
        """Tokens that one optimizer step trains on, or that one generation ends with."""
        return self.num_tokens * self.gradient_accumulation_steps

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of each sequence that are given."""
        return self.seq_len - self.num_decodes

    @property
    def num_evaluations(self) -> int:
        """How often whole sequences are evaluated in one optimizer step, by policy and reference.

        KTO runs its mismatched completions as a forward of their own, and so does its reference; RLOO always computes
        the log-probabilities of the policy that generated.
        """
        if not self.trains:
            return 0
        per_batch = {"kto": 2, "rloo": 2}.get(self.task, 1)
        if self.uses_reference:
            per_batch += 2 if self.task == "kto" else 1
        return per_batch * self.gradient_accumulation_steps

    @property
    def num_forwards(self) -> int:
        """Passes over the weights that compute activations of whole sequences, in one optimizer step.

        Evaluations of the same sequences share a pass, from the second step on. In GRPO and RLOO those that precede the
        policy's own do so if they see the same batch (no accumulation) and it draws no random numbers.
        """
        batches = self.gradient_accumulation_steps
        if self.task not in ("grpo", "rloo"):
            return self.num_evaluations // (2 if self.uses_reference else 1)
        if batches > 1:
            return self.num_evaluations
        return min(self.num_evaluations, 2) if self.has_dropout else 1

    @property
    def num_beside(self) -> int:
        """Most evaluations that another one takes along."""
        return ceil_div(self.num_evaluations, max(1, self.num_forwards)) - 1 if self.trains else 0

    @property
    def num_backwards(self) -> int:
        """Passes over the weights that recompute and differentiate, in one optimizer step."""
        return self.gradient_accumulation_steps if self.trains else 0

    @property
    def num_decodes(self) -> int:
        """Passes over the weights that generate one token for every sequence; the first of them reads the prompts."""
        return self.completion_tokens or 0

    @property
    def run_steps(self) -> int | None:
        """Optimizer steps of the whole run, as far as anybody said how long it is."""
        if self.num_examples is None:
            return self.num_steps
        examples = self.batch_size * self.gradient_accumulation_steps
        return max(1, ceil(self.num_epochs * ceil_div(self.num_examples, examples)))

    @property
    def num_passes(self) -> int:
        """All passes over the weights in one optimizer step, or in one generation."""
        return self.num_forwards + self.num_backwards + self.num_decodes


def kind_of(device: torch.device) -> DeviceKind:
    """The kind of a compute device.

    Raises:
        ValueError: Neither a CPU nor a GPU of CUDA's.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device.type!r}: expected one of {', '.join(get_args(DeviceKind))}")
    return cast("DeviceKind", device.type)
