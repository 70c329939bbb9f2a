"""How long one step takes at these rates, and what it waits for. Pure arithmetic.

Each pass over the weights takes as long as its slowest lane: reading the streamed blocks, copying to the device, or
computing. A backward computes twice what a forward does (recomputation, then the gradient of each product's input;
frozen weights get none), which for training with P active parameters and T tokens makes 6 P T operations in all; 8 P T
where every weight is trained. Updates of state on disk move with the next forward, gradients with the backward.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lowmem.costs import Choice, boundary_bytes, key_value_bytes
from lowmem.full.traffic import UPDATE_S_PER_PARAM, state_traffic
from lowmem.job import Job
from lowmem.rates import Rates
from lowmem.shapes import ModelShapes, Part, itemsize
from offload import Placement, PlacementPlan

_READ_LATENCY_S = 1e-4
"""One small random read of a solid-state drive."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The parts of a predicted step."""

    step_s: float
    """Seconds of one optimizer step, or of one generation."""
    compute_s: float
    """Time that the device computes."""
    disk_s: float
    """Time that the disk reads and writes; both are supposed to be equally fast, and add up."""
    copy_s: float
    """Time that the copy engine is busy."""
    read_bytes: int
    """Bytes read from disk."""
    written_bytes: int
    """Bytes written to disk."""

    @property
    def bottleneck(self) -> str:
        """What the step waits for longest: "compute", "disk" or "copy"."""
        lanes = {"compute": self.compute_s, "disk": self.disk_s, "copy": self.copy_s}
        return max(lanes, key=lambda lane: lanes[lane])


@dataclass(frozen=True, kw_only=True)
class _Passes:
    """Some equal passes over the weights."""

    count: int
    flops: float
    copy_bytes: float = 0.0
    disk_bytes: float = 0.0
    """Read or written besides weights."""


def predict(shapes: ModelShapes, job: Job, *, choice: Choice, placement: PlacementPlan, rates: Rates) -> StepTime:
    """Predict one step.

    Args:
        shapes: The model.
        job: The step; the kind of device in it decides whether blocks are copied.
        choice: Micro-batch and tiers.
        placement: Where the blocks are; its `num_passes` must be the job's.
        rates: Of disk, copies and computation.
    """
    moved = sum(
        size
        for size, place in zip(placement.block_bytes, placement.placements, strict=True)
        if place != Placement.RESIDENT
    )
    on_cpu = job.device == "cpu"
    # A processor converts weights itself: that is computation. A GPU waits for copies and converts for nothing.
    unpack_s = sum(block.workspace_bytes for block in shapes.blocks) / rates.copy_bytes_per_s if on_cpu else 0.0
    copy_s = 0.0 if on_cpu else moved / rates.copy_bytes_per_s
    disk_s = placement.step_read_bytes / job.num_passes / rates.disk_bytes_per_s
    total = dict.fromkeys(("step", "compute", "disk", "copy"), 0.0)
    for passes in _passes(shapes, job, choice):
        compute = passes.flops / rates.compute_flops_per_s + unpack_s
        copy = copy_s + (0.0 if on_cpu else passes.copy_bytes / rates.copy_bytes_per_s)
        disk = disk_s + passes.disk_bytes / rates.disk_bytes_per_s
        for lane, seconds in (
            ("step", max(compute, disk, copy)),
            ("compute", compute),
            ("disk", disk),
            ("copy", copy),
        ):
            total[lane] += passes.count * seconds
    gather_s = _gather_s(shapes, job, rates) if choice.embedding_on_disk else 0.0
    moved_bytes = _boundary_disk_bytes(shapes, job, choice)
    state = state_traffic(shapes, job, choice)
    update_s = UPDATE_S_PER_PARAM * shapes.num_params if job.tuning == "full" and job.trains else 0.0
    return StepTime(
        step_s=total["step"] + gather_s + update_s,
        compute_s=total["compute"] + update_s,
        disk_s=total["disk"] + gather_s,
        copy_s=total["copy"],
        read_bytes=placement.step_read_bytes + moved_bytes + state.read_bytes,
        written_bytes=moved_bytes + state.written_bytes,
    )


def _passes(shapes: ModelShapes, job: Job, choice: Choice) -> Iterable[_Passes]:
    forward = _forward_flops(shapes, num_sequences=job.num_sequences, seq_len=job.seq_len)
    kept_bytes = boundary_bytes(shapes, job) + (key_value_bytes(shapes, job) if choice.keeps_keys_values else 0)
    boundary = float(kept_bytes) if choice.boundary_tier != "device" else 0.0
    on_disk = boundary if choice.boundary_tier == "disk" else 0.0
    head = 2.0 * shapes.num_head_params * job.num_tokens
    state = state_traffic(shapes, job, choice)
    if job.num_backwards:
        evaluation = (forward + head) * job.num_evaluations / job.num_forwards
        # Only forwards that a backward follows leave boundary activations behind.
        update = state.update_bytes / job.num_backwards
        yield _Passes(count=job.num_backwards, flops=evaluation, copy_bytes=boundary, disk_bytes=on_disk + update)
        yield _Passes(count=job.num_forwards - job.num_backwards, flops=evaluation)
        backward = 2 * forward + 1.5 * _attention_flops(shapes, num_sequences=job.num_sequences, seq_len=job.seq_len)
        if choice.chunk_tokens is not None and not choice.keeps_keys_values:
            backward += _key_value_flops(shapes, job)
        backward += 2 * head
        if job.tuning == "full":
            # The gradient of each product's weight.
            backward += 2.0 * shapes.num_active_params * job.num_tokens + head
        disk = on_disk + state.gradient_bytes / job.num_backwards
        yield _Passes(count=job.num_backwards, flops=backward, copy_bytes=boundary, disk_bytes=disk)
    if job.num_decodes:
        num = job.num_generated
        first = _forward_flops(shapes, num_sequences=num, seq_len=max(1, job.num_prompt_tokens))
        token = 2.0 * num * (shapes.num_active_params + shapes.num_adapter_params + shapes.num_head_params)
        yield _Passes(count=1, flops=first + 2.0 * num * shapes.num_head_params)
        yield _Passes(count=job.num_decodes - 1, flops=token)


def _forward_flops(shapes: ModelShapes, *, num_sequences: int, seq_len: int) -> float:
    products = 2.0 * (shapes.num_active_params + shapes.num_adapter_params) * num_sequences * seq_len
    return products + _attention_flops(shapes, num_sequences=num_sequences, seq_len=seq_len)


def _key_value_flops(shapes: ModelShapes, job: Job) -> float:
    """What a backward in chunks computes once more to have all keys and values first."""
    widths = sum(
        linear.in_features * linear.out_features
        for block in shapes.blocks
        for linear in block.of_part(Part.ATTENTION_IN)
    )
    return 2.0 * widths * job.num_tokens


def _boundary_disk_bytes(shapes: ModelShapes, job: Job, choice: Choice) -> int:
    """Bytes of boundary activations that go to disk in one optimizer step, and come back."""
    if choice.boundary_tier != "disk":
        return 0
    kept_bytes = key_value_bytes(shapes, job) if choice.keeps_keys_values else 0
    return (boundary_bytes(shapes, job) + kept_bytes) * job.num_backwards


def _attention_flops(shapes: ModelShapes, *, num_sequences: int, seq_len: int) -> float:
    """Scores and weighted values of causal attention: half of all pairs, 2 products of 2 operations each."""
    return sum(2.0 * num_sequences * seq_len**2 * block.query_size for block in shapes.blocks)


def _gather_s(shapes: ModelShapes, job: Job, rates: Rates) -> float:
    """Reading embedding rows one by one: once for each forward, and one row of each sequence for each token."""
    row_bytes = shapes.hidden_size * itemsize(shapes.compute_dtype)
    rows = job.num_evaluations * min(job.num_tokens, shapes.vocab_size) + job.num_decodes * job.num_generated
    latency_s = _READ_LATENCY_S / rates.disk_num_threads
    return rows * (latency_s + row_bytes / rates.disk_bytes_per_s)
