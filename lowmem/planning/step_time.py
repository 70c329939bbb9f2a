"""How fast bytes are read and copied and how fast the device computes: measured, or assumed and said so.

How long a step takes at these rates, and what it waits for.

Each pass over the weights takes as long as its slowest lane: reading the streamed blocks, copying to the device, or
computing. A backward computes twice what a forward does (recomputation, then the gradient of each product's input;
frozen weights get none), which for training with P active parameters and T tokens makes 6 P T operations in all; 8 P T
where every weight is trained. Updates of state on disk move with the next forward, gradients with the backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from lowmem.experts.visiting import EXPERT_PASSES, MOST_HIT, expected_share
from lowmem.internals.unread import is_attention_ever_kept
from lowmem.planning.job import DeviceKind, Job
from lowmem.planning.optimizer_sizes import state_traffic
from lowmem.planning.shapes import BlockShape, ModelShapes, itemsize
from lowmem.planning.step_memory import Choice, as_moved, kept_bytes, kept_linears, product_bytes
from offload import Placement, PlacementPlan, ceil_div

_DISK_BYTES_PER_S = 1.0e9
"""One NVMe drive of the slower kind, or a virtual disk."""

_COPY_BYTES_PER_S = {"cpu": 8.0e9, "cuda": 10.0e9}
"""Conversion of a block on a processor; pinned copies over PCIe 3.0 x16."""

_FLOPS_PER_S = {"cpu": 50.0e9, "cuda": 30.0e12}
"""Sustained in matrix products: two cores with AVX2 in fp32; a consumer GPU in bf16."""

Lane = Literal["compute", "disk", "copy"]
"""What a step keeps busy."""


Trained = Literal["nothing", "lora", "lora of experts", "dora", "full"]
"""What a block's backward differentiates, as far as it changes how long that takes; of experts: of stacked ones too."""


@dataclass(frozen=True, kw_only=True)
class ShapeRates:
    """What a model's own shapes take on one device, measured: seconds of its mean block and of its head.

    A call is one micro-batch, or one chunk of it, through one block.
    """

    trains: Trained
    """What the blocks were measured with."""
    call_tokens: tuple[int, ...]
    """Tokens of the calls that were timed, ascending: few tokens are multiplied less efficiently than many."""
    forward_calls_s: tuple[float, ...]
    """What each took without gradients, the scores of attention aside."""
    backward_calls_s: tuple[float, ...]
    """What each took recomputed with gradients and differentiated, the scores aside."""
    chunk_forward_s: float
    """What a chunk of a sequence takes beyond a call of as many tokens, without gradients."""
    chunk_backward_s: float
    """The same, recomputed and differentiated; keys and values that are made again are not in it."""
    visit_forward_s: float
    """What a visit takes beyond its calls: its weights are in no cache."""
    visit_backward_s: float
    """The same of a backward; where every weight is trained, memory is given back and touched again."""
    attention_flops_per_s: float
    """Scores and weighted values, without gradients."""
    attention_backward_flops_per_s: float
    """The same operations, counted once: recomputed and differentiated."""
    chunk_attention_flops_per_s: tuple[float, ...] = ()
    """Both of a chunk of a sequence and what came before it, where another kernel computes that; else empty."""
    head_token_s: float
    """Of one token's loss, without gradients."""
    head_backward_token_s: float
    """Of its gradient."""
    unpack_s: float
    """Of making one block's parameters from its stored tensors; 0 where they are used as they lie. Experts that are
    unpacked one by one are not in it: calls make those that their tokens go to."""
    update_s_per_param: float
    """Of AdamW in fp32, where the update runs."""
    update_beside_s_per_param: float
    """Of the same on one core, with checksums of what is written: state on disk. 0 where adapters are trained."""
    dropout_s: float
    """Of dropping one value of an adapter's input, in a forward; DoRA multiplies it by the weight as well."""

    def __post_init__(self) -> None:
        if not 2 <= len(self.call_tokens) == len(self.forward_calls_s) == len(self.backward_calls_s):
            raise ValueError(f"ShapeRates: expected two calls or more, each with both times, got {self.call_tokens}")
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and min(value if isinstance(value, tuple) else (value,), default=0) < 0:
                raise ValueError(f"ShapeRates.{field.name} is {value}; expected 0 or more")

    def both_attentions(self, *, in_chunks: bool) -> tuple[float, ...]:
        """Operations per second of attention without gradients, and recomputed and differentiated."""
        whole = self.attention_flops_per_s, self.attention_backward_flops_per_s
        return (self.chunk_attention_flops_per_s or whole) if in_chunks else whole

    def forward_call_s(self, num_tokens: float) -> float:
        """Seconds of a call without gradients, the scores of attention aside."""
        return _between(self.call_tokens, self.forward_calls_s, num_tokens)

    def backward_call_s(self, num_tokens: float) -> float:
        """Seconds of a call that recomputes and differentiates, the scores aside."""
        return _between(self.call_tokens, self.backward_calls_s, num_tokens)


def _between(sizes: Sequence[int], seconds: Sequence[float], size: float) -> float:
    """What a call of some size takes, on the line through the two measured ones that are next to it; never less than 0.

    Beyond the last, as many times as much as it has tokens: from there on products are as efficient as they get.
    """
    if size >= sizes[-1]:
        return seconds[-1] * size / sizes[-1]
    after = next(index for index in range(1, len(sizes)) if sizes[index] >= size)
    share = (size - sizes[after - 1]) / (sizes[after] - sizes[after - 1])
    return max(0.0, seconds[after - 1] + share * (seconds[after] - seconds[after - 1]))


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the predicted step time is made of."""

    disk_bytes_per_s: float = _DISK_BYTES_PER_S
    """Reading the checkpoint, past the page cache."""
    copy_bytes_per_s: float = _COPY_BYTES_PER_S["cpu"]
    """To the device; on a CPU, writing a block's parameters in the compute dtype."""
    compute_flops_per_s: float = _FLOPS_PER_S["cpu"]
    """Matrix products in the compute dtype, a multiplication and an addition counted as two."""
    disk_num_threads: int = 8
    """Requests in flight."""
    disk_request_bytes: int = 4 << 20
    """Size of a request."""
    scratch_bytes_per_s: float | None = None
    """What a step writes and reads back, in the budget's folder; None for as fast as the checkpoint is read."""
    measured: tuple[Lane, ...] = ()
    """Which were measured on this machine; the others are assumed."""
    shape: ShapeRates | None = None
    """What this model's blocks and head take, where that was measured; else it follows from `compute_flops_per_s`."""
    caveat: str = ""
    """What to know of the measurement, in words: a machine that was disturbed, another kind of job; else empty."""

    def __post_init__(self) -> None:
        given = () if self.scratch_bytes_per_s is None else ("scratch_bytes_per_s",)
        for name in ("disk_bytes_per_s", "copy_bytes_per_s", "compute_flops_per_s", "disk_num_threads", *given):
            if getattr(self, name) <= 0:
                raise ValueError(f"Rates.{name} is {getattr(self, name)}; expected a positive number")

    @property
    def moved_bytes_per_s(self) -> float:
        """What a step writes and reads back."""
        return self.scratch_bytes_per_s or self.disk_bytes_per_s


def assumed_rates(device: DeviceKind) -> Rates:
    """Conservative rates for a kind of device, none of them measured."""
    return Rates(copy_bytes_per_s=_COPY_BYTES_PER_S[device], compute_flops_per_s=_FLOPS_PER_S[device])


_UPDATE_S_PER_PARAM = 1.5e-9
"""torch's fused AdamW on a processor: it is limited by memory, 28 bytes for each parameter."""

UPDATE_BESIDE_S_PER_PARAM = 6.5e-9
"""The same on one core with two copies, 3.1, and checksums of 12 bytes, 3.4: `python -m benchmarks.plan_accuracy`."""


_GRADIENT_BESIDE = 0.3
"""Of that, what a gradient on its way to the disk takes: 0.9 for its copy and 1.1 for its checksum."""

_HOST_S_PER_BYTE = 9e-11
"""Of a core, for what is read and written: 60 ms for the 750 MB of an update there, 4 x 128 with state on disk."""


def update_bytes_each(shapes: ModelShapes) -> tuple[float, float]:
    """Bytes of a parameter that an update reads (weight, moments, gradient) and writes (weight, moments)."""
    return shapes.state_bytes_each + itemsize("float32"), shapes.state_bytes_each


def update_s_each(shapes: ModelShapes, rates: Rates, *, on_disk: bool = False) -> float:
    """Seconds for each parameter of its update, by all cores; by one beside the model where state is on disk."""
    if on_disk:
        fp32_s = UPDATE_BESIDE_S_PER_PARAM if rates.shape is None else rates.shape.update_beside_s_per_param
    else:
        fp32_s = _UPDATE_S_PER_PARAM if rates.shape is None else rates.shape.update_s_per_param
    return fp32_s if shapes.optimizer is None else fp32_s * shapes.optimizer.relative_time


_STEP_S: dict[DeviceKind, float] = {"cpu": 0.03, "cuda": 0.02}
"""What a trainer does between steps, by what computes, where everything else was measured: clipping, schedule, log."""

_READ_LATENCY_S = 1e-4
"""One small random read of a solid-state drive."""


def bus_traffic(shapes: ModelShapes, job: Job, choice: Choice, placement: PlacementPlan) -> tuple[int, int]:
    """Bytes that go to a GPU, and that come from it, in one optimizer step once the run is under way; 0 on a CPU.

    Ids, labels, losses and norms are left out.

    Weights go up for each visit that does not find them in the ring, what lies between blocks comes down in the forward
    and goes up in the backward. Where every weight is trained, gradients come down with each backward, and what is
    outside the blocks once a step, whose new weights go up.
    """
    if job.device == "cpu":
        return 0, 0
    is_full = job.tuning == "full"
    up = as_moved(shapes, placement).step_copied_bytes(changes=is_full)
    down = 0
    if choice.boundary_tier != "device":
        down = job.num_backwards * kept_bytes(shapes, job, choice)
        up += down
    if is_full:
        share = choice.update_share / job.num_sharing
        read, written = (round(share * nbytes * shapes.num_params) for nbytes in update_bytes_each(shapes))
        up += shapes.outer_bytes + read
        # What is outside the blocks has no other master than the device's: its gradient comes, and what is updated.
        down += shapes.outer_bytes + ceil_div(shapes.outer_bytes, job.num_sharing)
        bases, gradients = _gradient_traffic(shapes, choice)
        up += job.num_backwards * bases
        down += job.num_backwards * gradients
        down += written
    return up, down


def _gradient_traffic(shapes: ModelShapes, choice: Choice) -> tuple[int, int]:
    """Bytes that go to a GPU for a backward's gradients of blocks, and that come from it.

    As weights are moved, of those that are trained; of those that are reduced, what is left in a step that takes no new
    basis.
    """
    optimizer, moved = shapes.optimizer, sum(shapes.moved_bytes)
    if optimizer is None or not choice.reduces_gradients:
        return 0, round(moved * (1.0 if optimizer is None else optimizer.block_share))
    left_out = optimizer.reduction.num_params * itemsize(shapes.moved_dtype or shapes.compute_dtype)
    return optimizer.reduction.basis_bytes, moved - left_out + optimizer.reduction.reduced_bytes


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
    update_s: float = 0.0
    """The part of `compute_s` that the optimizer's update takes."""
    late_s: float = 0.0
    """The part of `step_s` for which the update before keeps a forward waiting; the first step has none."""
    up_bytes: int = 0
    """Bytes that go to a GPU."""
    down_bytes: int = 0
    """Bytes that come from it."""

    @property
    def bottleneck(self) -> Lane:
        """What the step waits for longest."""
        lanes: dict[Lane, float] = {"compute": self.compute_s, "disk": self.disk_s, "copy": self.copy_s}
        return max(lanes, key=lambda lane: lanes[lane])


@dataclass(frozen=True, kw_only=True)
class _Passes:
    """Some equal passes over the weights."""

    count: int
    compute_s: float
    copy_bytes: float = 0.0
    disk_bytes: float = 0.0
    """Read or written besides weights."""
    read_share: float = 1.0
    """Part of the streamed weights that is read: without the experts that few tokens do not go to."""
    unpack_share: float = 1.0
    """Part of the values that is made of packed weights."""
    alone_share: float = 0.0
    """Part of the streamed weights whose reading nothing hides: experts are asked for when their tokens are known."""
    update_bytes: float = 0.0
    """Of `disk_bytes`, those of the update before; what its first block has of them nothing hides."""
    beside_s: float = 0.0
    """In which one core of the host carries out the update before, or copies and checks gradients for the disk."""


def predict(shapes: ModelShapes, job: Job, *, choice: Choice, placement: PlacementPlan, rates: Rates) -> StepTime:
    """Predict one step.

    Args:
        shapes: The model.
        job: The step; the kind of device in it decides whether blocks are copied.
        choice: Micro-batch and tiers.
        placement: Where the blocks are; its `num_passes` must be the job's.
        rates: Of disk, copies and computation.
    """
    moving = as_moved(shapes, placement)
    moved = sum(
        size for size, place in zip(moving.block_bytes, moving.placements, strict=True) if place != Placement.RESIDENT
    )
    on_cpu = job.device == "cpu"
    costs = _Costs(shapes, job, choice, rates)
    copy_s = 0.0 if on_cpu else moved / rates.copy_bytes_per_s
    disk_s = placement.step_read_bytes / job.num_passes / rates.disk_bytes_per_s
    total = dict.fromkeys(("step", "compute", "disk", "copy"), 0.0)
    num_passes, read_passes, late_s = 0, 0.0, 0.0
    for passes in _passes(shapes, job, choice, costs):
        num_passes, read_passes = num_passes + passes.count, read_passes + passes.count * passes.read_share
        compute = passes.compute_s + costs.unpack_s * (passes.unpack_share if rates.shape is None else 1.0)
        copy = copy_s * passes.read_share + (0.0 if on_cpu else passes.copy_bytes / rates.copy_bytes_per_s)
        # Blocks are read once for all ranks of a machine; what each writes and reads back goes over the same disk.
        disk = disk_s * passes.read_share + passes.disk_bytes * job.num_sharing / rates.moved_bytes_per_s
        update = passes.update_bytes * job.num_sharing / rates.moved_bytes_per_s
        alone = disk_s * passes.alone_share + update / len(shapes.blocks)
        without = max(compute, disk - update, copy)
        # A processor's model waits for the core that it has lost: its threads meet after each product.
        compute += passes.beside_s if on_cpu else 0.0
        step = alone + max(compute, disk - alone, copy, passes.beside_s)
        late_s += step - without if update else 0.0
        for lane, seconds in (("step", step), ("compute", compute), ("disk", disk), ("copy", copy)):
            total[lane] += passes.count * seconds
    gather_s = _gather_s(shapes, job, rates) if choice.embedding_on_disk else 0.0
    moved_bytes = job.num_backwards * kept_bytes(shapes, job, choice) if choice.boundary_tier == "disk" else 0
    state = state_traffic(shapes, job, choice)
    update_s = max(costs.update_s, costs.outer_read_s) if job.trains else 0.0
    # An update that runs within the optimizer's step hides behind nothing.
    alone_s = 0.0 if _updates_move_with_forward(shapes) else state.update_bytes / rates.moved_bytes_per_s
    # The share is such that both end together; a GPU that updates waits for what goes up and comes down.
    updated_bytes = choice.update_share * sum(update_bytes_each(shapes)) * shapes.num_params / job.num_sharing
    up_bytes, down_bytes = bus_traffic(shapes, job, choice, placement)
    return StepTime(
        step_s=total["step"] + gather_s + update_s + alone_s,
        compute_s=total["compute"] + update_s,
        disk_s=total["disk"] + gather_s + alone_s,
        copy_s=total["copy"] + updated_bytes / rates.copy_bytes_per_s,
        read_bytes=int(placement.step_read_bytes * read_passes / num_passes) + moved_bytes + state.read_bytes,
        written_bytes=moved_bytes + state.written_bytes,
        update_s=update_s,
        late_s=late_s,
        up_bytes=up_bytes,
        down_bytes=down_bytes,
    )


_VALUES_BYTES_PER_S = 2.3e9
"""Values that a processor makes of packed weights, fp32, one thread: `python -m benchmarks.dequantisation`."""

_CARD_VALUES_BYTES_PER_S = 1.4e11
"""Values that a card makes: half of what an RTX 4060's memory takes by its data sheet, 272 GB/s; a guess until
`lowmem bench` has measured the card.
"""


def _unpack_s(block: BlockShape, rates: Rates) -> float:
    if block.packed_values_bytes:
        return block.packed_values_bytes / _VALUES_BYTES_PER_S
    return block.workspace_bytes / rates.copy_bytes_per_s


class _Costs:
    """Seconds of computing, from what was measured with these shapes or from operations and one rate."""

    def __init__(self, shapes: ModelShapes, job: Job, choice: Choice, rates: Rates) -> None:
        self._shapes, self._job, self._choice, self._rates = shapes, job, choice, rates
        self._shape = rates.shape
        num_parts = ceil_div(job.seq_len, choice.chunk_tokens or job.seq_len)
        self._num_calls = len(shapes.blocks) * ceil_div(job.num_sequences, choice.micro_batch) * num_parts

    @property
    def unpack_s(self) -> float:
        """Of all blocks in one pass. A processor converts weights itself; a GPU waits for copies, and unpacks only."""
        if self._shape is not None:
            return self._shape.unpack_s * len(self._shapes.blocks)
        if self._job.device != "cpu":
            return sum(block.packed_values_bytes for block in self._shapes.blocks) / _CARD_VALUES_BYTES_PER_S
        return sum(_unpack_s(block, self._rates) for block in self._shapes.blocks)

    @property
    def update_s(self) -> float:
        """Of the optimizer's step: as AdamW takes for each parameter, and the products of those that project.

        Without what a GPU updates beside the processor, and without blocks whose updates move with a forward.
        """
        shapes, optimizer, is_deferred = self._shapes, self._shapes.optimizer, self._is_deferred
        num_updated: float = shapes.num_trainable if optimizer is None else optimizer.num_updated
        num_updated -= round((1.0 if is_deferred else self._choice.update_share) * shapes.num_params)
        products_s = 0.0 if optimizer is None else optimizer.update_flops / self._rates.compute_flops_per_s
        if self._shape is None and self._job.tuning != "full":
            return 0.0
        trainer_s = 0.0 if self._shape is None else _STEP_S[self._job.device]
        return update_s_each(shapes, self._rates, on_disk=is_deferred) * num_updated + products_s + trainer_s

    def updates_beside_s(self, moved_bytes: float) -> float:
        """Of one core that updates blocks while the next forward goes on, and reads and writes so much for it."""
        num_updated = (1 - self._choice.update_share) * self._shapes.num_params
        return num_updated * update_s_each(self._shapes, self._rates, on_disk=True) + _HOST_S_PER_BYTE * moved_bytes

    def gradients_beside_s(self, moved_bytes: float) -> float:
        """Of one core that copies and checks a backward's gradients for the disk, and reads and writes so much."""
        num_written = self._block_share * self._shapes.num_params if moved_bytes else 0.0
        each_s = _GRADIENT_BESIDE * update_s_each(self._shapes, self._rates, on_disk=True)
        return each_s * num_written + _HOST_S_PER_BYTE * moved_bytes

    @property
    def outer_read_s(self) -> float:
        """Of reading the moments of what is outside the blocks, which the optimizer's step waits for."""
        outer = 1 - self._shapes.num_params / max(1, self._shapes.num_trainable)
        return outer * self._shapes.moments_bytes / self._rates.moved_bytes_per_s if self._is_deferred else 0.0

    @property
    def _is_deferred(self) -> bool:
        on_disk = self._job.tuning == "full" and self._choice.state_tier == "disk"
        return on_disk and _updates_move_with_forward(self._shapes)

    @property
    def _block_share(self) -> float:
        """Which part of the blocks' weights gets gradients, where every weight is trained."""
        optimizer = self._shapes.optimizer
        return 1.0 if optimizer is None else optimizer.block_share

    def forward_s(self, *, num_sequences: int, seq_len: int, num_calls: int | None = None) -> float:
        """All blocks once, without gradients."""
        num_tokens, shape = num_sequences * seq_len, self._shape
        attention = self._shapes.attention_flops(num_sequences=num_sequences, seq_len=seq_len)
        if shape is None:
            return (self._shapes.product_flops(num_tokens) + attention) / self._rates.compute_flops_per_s
        calls = self._num_calls if num_calls is None else num_calls
        calls_s = calls * shape.forward_call_s(len(self._shapes.blocks) * num_tokens / calls)
        # With a cache, blocks take whole sequences.
        in_chunks = self._choice.chunk_tokens is not None and num_calls is None
        if in_chunks:
            calls_s += calls * shape.chunk_forward_s
        calls_s += len(self._shapes.blocks) * shape.visit_forward_s
        return calls_s + self._dropout_s(num_tokens) + attention / shape.both_attentions(in_chunks=in_chunks)[0]

    def _dropout_s(self, num_tokens: int) -> float:
        """Of drawing what adapters' inputs lose, in one pass of a model that trains; a backward draws it again."""
        if self._shape is None or not self._job.has_dropout:
            return 0.0
        dropped = sum(linear.in_features for block in self._shapes.blocks for linear in block.linears if linear.rank)
        return self._shape.dropout_s * dropped * num_tokens

    def backward_s(self) -> float:
        """All blocks once, recomputed and differentiated."""
        job, shape, shapes = self._job, self._shape, self._shapes
        attention = shapes.attention_flops(num_sequences=job.num_sequences, seq_len=job.seq_len)
        # Keys and values of all chunks are computed once more, before the first chunk is.
        again = self._choice.chunk_tokens is not None and not self._choice.keeps_keys_values
        key_values = shapes.key_value_share * shapes.product_flops(job.num_tokens) if again else 0.0
        spared, reading_s = self._spared()
        if shape is None:
            times = 2.5 if self._keeps_attention else 3.5
            flops = 2 * shapes.product_flops(job.num_tokens) + times * attention + key_values - spared
            if job.tuning == "full":
                # The gradient of each product's weight.
                flops += 2.0 * self._block_share * shapes.num_active_params * job.num_tokens
            return flops / self._rates.compute_flops_per_s + reading_s
        tokens = len(shapes.blocks) * job.num_tokens / self._num_calls
        share = (key_values - spared) / shapes.product_flops(job.num_tokens)
        backward_s = shape.backward_call_s(tokens)
        if shape.trains == "full":
            # Of a product, what it gives, its input's gradient and its weight's, where that is wanted.
            backward_s *= (2 + self._block_share) / 3
        if self._choice.chunk_tokens is not None:
            backward_s += shape.chunk_backward_s
        calls_s = self._num_calls * (backward_s + share * shape.forward_call_s(tokens))
        both = shape.both_attentions(in_chunks=self._choice.chunk_tokens is not None)
        without_s, attention_s = (attention / flops_per_s for flops_per_s in both)
        if self._keeps_attention:
            attention_s = max(0.0, attention_s - without_s)
        visits_s = len(shapes.blocks) * shape.visit_backward_s
        dropped_s = self._dropout_s(job.num_tokens) * (2 if shape.trains == "dora" else 1)  # A gradient, too.
        return calls_s + dropped_s + attention_s + reading_s + visits_s

    @property
    def _keeps_attention(self) -> bool:
        return self._choice.keeps_products and is_attention_ever_kept(self._job.seq_len)

    def _spared(self) -> tuple[float, float]:
        """Operations that kept products spare a backward, and seconds that it takes to have them back."""
        job, choice = self._job, self._choice
        if not choice.keeps_products:
            return 0.0, 0.0
        linears = (one for block in self._shapes.blocks for one in kept_linears(block, only_read=True))
        flops = 2.0 * sum(one.num_weights for one in linears) * job.num_tokens
        nbytes = product_bytes(self._shapes, job, only_read=True)
        # They come one by one, when they are asked for, and are copied.
        disk_s = nbytes / self._rates.moved_bytes_per_s if choice.boundary_tier == "disk" else 0.0
        return flops, disk_s + nbytes / _COPY_BYTES_PER_S["cpu"]

    def head_s(self, num_tokens: int) -> float:
        """The head and its loss, without gradients."""
        if self._shape is not None:
            return num_tokens * self._shape.head_token_s
        return 2.0 * self._shapes.num_head_params * num_tokens / self._rates.compute_flops_per_s

    def head_backward_s(self, num_tokens: int) -> float:
        """Their gradient."""
        if self._shape is not None:
            return num_tokens * self._shape.head_backward_token_s
        factor = 3.0 if self._job.tuning == "full" else 2.0
        return factor * self.head_s(num_tokens)


def _passes(shapes: ModelShapes, job: Job, choice: Choice, costs: _Costs) -> Iterable[_Passes]:
    boundary = float(kept_bytes(shapes, job, choice)) if choice.boundary_tier != "device" else 0.0
    on_disk = boundary if choice.boundary_tier == "disk" else 0.0
    state = state_traffic(shapes, job, choice)
    if job.num_backwards:
        forward_s = costs.forward_s(num_sequences=job.num_sequences, seq_len=job.seq_len)
        evaluation_s = (forward_s + costs.head_s(job.num_tokens)) * job.num_evaluations / job.num_forwards
        # Only forwards that a backward follows leave boundary activations behind.
        plain = _Passes(count=job.num_backwards, compute_s=evaluation_s, copy_bytes=boundary, disk_bytes=on_disk)
        if state.update_bytes and _updates_move_with_forward(shapes):
            # With the first of them, which waits for its first block.
            update = float(state.update_bytes)
            first = replace(plain, count=1, disk_bytes=on_disk + update, update_bytes=update)
            yield replace(first, beside_s=costs.updates_beside_s(update))
            plain = replace(plain, count=job.num_backwards - 1)
        yield plain
        yield _Passes(count=job.num_forwards - job.num_backwards, compute_s=evaluation_s)
        backward_s = costs.backward_s() + costs.head_backward_s(job.num_tokens)
        written = state.gradient_bytes / job.num_backwards
        # Down to the host, in the blocks' own dtype; copies both ways share what a measurement of one way gave.
        gradients = sum(_gradient_traffic(shapes, choice)) if job.tuning == "full" else 0
        yield _Passes(
            count=job.num_backwards,
            compute_s=backward_s,
            copy_bytes=boundary + gradients,
            disk_bytes=on_disk + written,
            beside_s=costs.gradients_beside_s(written),
        )
    if job.num_decodes:
        num, num_blocks = job.num_generated, len(shapes.blocks)
        first_s = costs.forward_s(num_sequences=num, seq_len=max(1, job.num_prompt_tokens), num_calls=num_blocks)
        token_s = costs.forward_s(num_sequences=num, seq_len=1, num_calls=num_blocks) + costs.head_s(num)
        first = _Passes(count=1, compute_s=first_s + costs.head_s(num))
        yield _of_experts_hit(first, shapes, num * max(1, job.num_prompt_tokens))
        yield _of_experts_hit(_Passes(count=job.num_decodes - 1, compute_s=token_s), shapes, num)


def _of_experts_hit(passes: _Passes, shapes: ModelShapes, num_tokens: int) -> _Passes:
    """Passes that read, and make of packed weights, only the experts that some tokens go to."""
    read = stored = made = values = asked = 0.0
    for block in shapes.blocks:
        stored, values = stored + block.buffer_bytes, values + block.packed_values_bytes
        read, made = read + block.buffer_bytes, made + block.packed_values_bytes
        if block.experts is None or not block.expert_bytes:
            continue
        num_experts, num_each = block.experts.num_experts, block.experts.num_per_token
        hit = expected_share(num_tokens, num_experts=num_experts, num_per_token=num_each)
        made -= block.expert_values_bytes * (EXPERT_PASSES - hit)
        if hit <= MOST_HIT:
            read -= block.expert_bytes * (1 - hit)
            asked += block.expert_bytes * hit
    unpack = made / values if values else 1.0
    return replace(passes, read_share=read / stored, unpack_share=unpack, alone_share=asked / stored)


def _updates_move_with_forward(shapes: ModelShapes) -> bool:
    """Whether updates of blocks on disk are carried out as these are fetched for the next forward."""
    return shapes.optimizer is None or shapes.optimizer.is_flat


def _gather_s(shapes: ModelShapes, job: Job, rates: Rates) -> float:
    """Reading embedding rows one by one: once for each forward, and one row of each sequence for each token."""
    row_bytes = shapes.hidden_size * itemsize(shapes.compute_dtype)
    rows = job.num_evaluations * min(job.num_tokens, shapes.vocab_size) + job.num_decodes * job.num_generated
    latency_s = _READ_LATENCY_S / rates.disk_num_threads
    return rows * (latency_s + row_bytes / rates.disk_bytes_per_s)
