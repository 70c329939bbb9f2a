"""What the planner knows of a model: sizes and widths, as plain numbers. No tensor, no module, no file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from offload import PAGE_BYTES, round_up


class Part(StrEnum):
    """Where in a decoder block a linear layer stands; it decides what of its input is kept for the backward."""

    ATTENTION_IN = "attention_in"
    """Projects the normed hidden states: q, k, v and what leads to them."""
    ATTENTION_OUT = "attention_out"
    """Projects what the heads made back to the hidden size."""
    MLP_IN = "mlp_in"
    """Expands the hidden states: gate and up."""
    MLP_OUT = "mlp_out"
    """Projects the expanded states back: down."""


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """One linear layer of a block."""

    part: Part
    """Where it stands."""
    in_features: int
    """Width of its input."""
    out_features: int
    """Width of its output."""
    rank: int = 0
    """Rank of its adapter; 0 where it has none."""
    has_dropout: bool = False
    """Whether its adapter drops inputs."""
    is_dora: bool = False
    """Whether its adapter scales the rows of the adapted weight (DoRA)."""

    def __post_init__(self) -> None:
        if min(self.in_features, self.out_features) < 1 or self.rank < 0:
            raise ValueError(f"a linear layer of {self.in_features} x {self.out_features}, rank {self.rank}")

    @property
    def num_weights(self) -> int:
        """Weights of the layer."""
        return self.in_features * self.out_features


@dataclass(frozen=True, kw_only=True)
class ExpertsShape:
    """The routed experts of a block, stored as stacked weights."""

    num_experts: int
    """How many there are."""
    num_per_token: int
    """How many each token goes through."""
    expanded_size: int
    """Width that one expert expands a token to before the gate: twice `product_size` where gated."""
    product_size: int
    """Width that one expert's second projection reads."""
    adapted_bytes: tuple[int, ...] = ()
    """Compute bytes of each stack that an adapter changes, in the order of use; PEFT forms a changed stack whole."""


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """One decoder block."""

    buffer_bytes: int
    """Bytes it takes in a buffer: its stored tensors with what page alignment adds."""
    moved_bytes: int = 0
    """Bytes that a visit brings to a GPU, where these are not those of the buffer: matrices in another type."""
    num_params: int
    """Weights, adapters not counted."""
    num_active_params: int
    """Weights that one token is multiplied with: all but the experts that it does not go through."""
    workspace_bytes: int
    """Bytes that unpacking it writes: the parameters that are not used where they were read."""
    packed_values_bytes: int = 0
    """Bytes of the values that a pass makes of packed weights, on average over forward and backward."""
    expert_bytes: int = 0
    """Stored bytes of its experts, where they can be read and unpacked one by one."""
    expert_values_bytes: int = 0
    """Bytes of their values."""
    hidden_size: int
    """Width of its input and output."""
    query_size: int
    """Width of all heads' queries together."""
    key_size: int
    """Width of all heads' keys together; fewer heads than queries have is usual."""
    value_size: int
    """Width of all heads' values together."""
    num_heads: int
    """Query heads."""
    linears: tuple[LinearShape, ...]
    """Its linear layers outside the routed experts."""
    num_norms: int = 2
    """Norms over the hidden size."""
    has_query_key_norm: bool = False
    """Whether queries and keys are normed per head."""
    activation_copies: int = 1
    """Expanded-size tensors that the activation function keeps: 1 for one kernel, more for one written in Python."""
    experts: ExpertsShape | None = None
    """Its routed experts, if any."""
    num_adapter_params: int = 0
    """Trainable parameters in it."""
    adapter_bytes: int = 0
    """Bytes of the trainable parameters in it."""
    correction: float = 1.0
    """What the activations that its widths give are multiplied with: known from a dry run of its own code."""

    def __post_init__(self) -> None:
        for name in ("buffer_bytes", "num_params", "hidden_size", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"BlockShape.{name} is {getattr(self, name)}; expected a positive number")

    def with_lora(self, rank: int) -> BlockShape:
        """The same block with a LoRA adapter in fp32 on each of its linear layers."""
        num_params = sum(rank * (linear.in_features + linear.out_features) for linear in self.linears)
        return replace(
            self,
            linears=tuple(replace(linear, rank=rank) for linear in self.linears),
            num_adapter_params=num_params,
            adapter_bytes=num_params * itemsize("float32"),
        )

    @property
    def fp32_bytes(self) -> int:
        """Bytes of its weights in fp32, in whole pages."""
        return round_up(self.num_params * itemsize("float32"), PAGE_BYTES)

    def of_part(self, part: Part) -> tuple[LinearShape, ...]:
        """Its linear layers that stand in one place."""
        return tuple(linear for linear in self.linears if linear.part == part)

    @property
    def mlp_sizes(self) -> tuple[int, int]:
        """Widths that the MLP's first layers expand to, together, and that its last ones read."""
        expanded = sum(linear.out_features for linear in self.of_part(Part.MLP_IN))
        return expanded, sum(linear.in_features for linear in self.of_part(Part.MLP_OUT))


@dataclass(frozen=True, kw_only=True)
class ReductionShape:
    """Gradients of which an optimizer wants a projection only, in all decoder blocks together."""

    num_params: int = 0
    """Weights that have them."""
    reduced_bytes: int = 0
    """Bytes of what is left of them."""
    basis_bytes: int = 0
    """Bytes of what they are projected with."""


@dataclass(frozen=True, kw_only=True)
class OptimizerShape:
    """What an optimizer keeps of a model's trained parameters, and how much of them a step changes."""

    name: str
    """Its name."""
    state_bytes: int
    """Bytes of its state, in all."""
    is_own: bool = False
    """Whether it is one of `lowmem.optim`, which runs by rules."""
    is_flat: bool = False
    """Whether it is AdamW as `lowmem.optim` runs it on flat buffers: its moments are where the weights are."""
    num_updated: int
    """Parameters that a step changes."""
    block_share: float = 1.0
    """Which part of the decoder blocks' weights a step changes: all of it but for methods that go by blocks."""
    update_flops: int = 0
    """Operations of its products in one step."""
    relative_time: float = 1.0
    """What it does to each element besides, in the time that AdamW takes."""
    reduction: ReductionShape = ReductionShape()
    """What of the gradients it can do without, in most steps."""
    temporary_bytes: int = 0
    """Bytes that updating one parameter takes besides, at most, where it is updated as a whole."""

    def __post_init__(self) -> None:
        if min(self.state_bytes, self.num_updated, self.update_flops) < 0 or not 0 <= self.block_share <= 1:
            raise ValueError(f"{self.name}: {self.state_bytes} bytes of state, {self.num_updated} parameters updated")


@dataclass(frozen=True, kw_only=True)
class ModelShapes:
    """A model and its adapter."""

    name: str
    """Name people know it by."""
    blocks: tuple[BlockShape, ...]
    """Decoder blocks in visiting order."""
    vocab_size: int
    """Rows of the embedding table."""
    embedding_bytes: int
    """The embedding table in the compute dtype; 0 where the head is the same tensor, which then counts it."""
    embedding_stored_bytes: int
    """The embedding table as stored; 0 where the head is the same tensor."""
    embedding_gatherable: bool = False
    """Whether single rows of the table can be read from the checkpoint."""
    head_bytes: int
    """The output head in the compute dtype."""
    num_head_params: int
    """Weights that each token's hidden state is multiplied with in the head."""
    other_bytes: int
    """Everything else outside the blocks in the compute dtype: norms, position tables, buffers."""
    num_outer_params: int = 0
    """Weights outside the blocks, tied ones once."""
    trains_every_weight: bool = False
    """Whether the weights themselves are trained, and not an adapter."""
    moved_dtype: str | None = None
    """Type in which matrices of the blocks go to a GPU for forwards under autocast, by torch's name; None: as they
    are."""
    compute_dtype: str = "float32"
    """Dtype the model computes in, by torch's name."""
    adapter: str = "none"
    """The adapter in words."""
    num_outer_adapter_params: int = 0
    """Trainable parameters outside the blocks (`modules_to_save`, an adapted head)."""
    outer_adapter_bytes: int = 0
    """Bytes of the trainable parameters outside the blocks."""
    stored_dtypes: tuple[str, ...] = ()
    """Dtypes the blocks are stored in, by torch's name."""
    unchunkable: str = ""
    """Why its blocks cannot be walked along the sequence in chunks; empty if they can."""
    optimizer: OptimizerShape | None = None
    """What updates the parameters that are trained; None for AdamW: with an adapter torch's, else lowmem's."""
    max_positions: int | None = None
    """Tokens of the longest sequence that its configuration says it was made for; None where it says nothing."""

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError(f"{self.name}: expected at least one decoder block")

    def with_score_head(self) -> ModelShapes:
        """The same model with one score for a head, as reward models have; a tied embedding stays for itself."""
        is_tied = self.embedding_bytes == 0
        return replace(
            self,
            embedding_bytes=self.head_bytes if is_tied else self.embedding_bytes,
            embedding_stored_bytes=self.head_bytes if is_tied else self.embedding_stored_bytes,
            head_bytes=self.hidden_size * itemsize(self.compute_dtype),
            num_head_params=self.hidden_size,
        )

    def with_lora(self, rank: int) -> ModelShapes:
        """The same model with a LoRA adapter in fp32 on every linear layer outside the routed experts."""
        return replace(
            self,
            blocks=tuple(block.with_lora(rank) for block in self.blocks),
            adapter=f"LoRA r={rank} on all linear layers (assumed)",
        )

    def with_every_weight(self, moved_dtype: str | None = None) -> ModelShapes:
        """The same model with every weight trained: each linear layer keeps its input, as one with an adapter does.

        Args:
            moved_dtype: See the field.
        """

        def moved_bytes(block: BlockShape) -> int:
            if moved_dtype is None:
                return 0
            matrices = sum(linear.num_weights for linear in block.linears)
            rest = (block.num_params - matrices) * itemsize(self.compute_dtype)
            return round_up(matrices * itemsize(moved_dtype), PAGE_BYTES) + round_up(rest, PAGE_BYTES)

        blocks = tuple(
            replace(
                block,
                linears=tuple(replace(linear, rank=1) for linear in block.linears),
                workspace_bytes=0,
                buffer_bytes=round_up(block.num_params * itemsize(self.compute_dtype), PAGE_BYTES),
                moved_bytes=moved_bytes(block),
            )
            for block in self.blocks
        )
        return replace(
            self,
            blocks=blocks,
            adapter="every weight",
            embedding_gatherable=False,
            trains_every_weight=True,
            moved_dtype=moved_dtype,
        )

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states between blocks."""
        return self.blocks[0].hidden_size

    @property
    def num_params(self) -> int:
        """Weights of all blocks."""
        return sum(block.num_params for block in self.blocks)

    @property
    def num_active_params(self) -> int:
        """Weights of all blocks that one token is multiplied with."""
        return sum(block.num_active_params for block in self.blocks)

    def product_flops(self, num_tokens: int) -> float:
        """Operations of a forward's products in all blocks, two per multiplication and addition."""
        return 2.0 * (self.num_active_params + self.num_adapter_params) * num_tokens

    def attention_flops(self, *, num_sequences: int, seq_len: int) -> float:
        """Scores and weighted values of causal attention: half of all pairs, 2 products of 2 operations each."""
        return sum(2.0 * num_sequences * seq_len**2 * block.query_size for block in self.blocks)

    @property
    def outputs_per_dora_input(self) -> float:
        """Outputs that a value of the input of a layer with DoRA is multiplied for, on average; 0 without DoRA."""
        linears = [linear for block in self.blocks for linear in block.linears if linear.is_dora]
        products = sum(linear.num_weights for linear in linears)
        return products / max(1, sum(linear.in_features for linear in linears))

    @property
    def key_value_share(self) -> float:
        """Which part of a block's products keys and values, and what comes before them in attention, take."""
        widths = sum(linear.num_weights for block in self.blocks for linear in block.of_part(Part.ATTENTION_IN))
        return 2.0 * widths / self.product_flops(1)

    @property
    def num_adapter_params(self) -> int:
        """All trainable parameters."""
        return self.num_outer_adapter_params + sum(block.num_adapter_params for block in self.blocks)

    @property
    def num_trainable(self) -> int:
        """Parameters that are trained: the adapter's, or every weight."""
        return self.num_outer_params + self.num_params if self.trains_every_weight else self.num_adapter_params

    @property
    def adapter_bytes(self) -> int:
        """Bytes of all trainable parameters."""
        return self.outer_adapter_bytes + sum(block.adapter_bytes for block in self.blocks)

    @property
    def stored_bytes(self) -> int:
        """Buffer bytes of all blocks."""
        return sum(block.buffer_bytes for block in self.blocks)

    @property
    def moved_bytes(self) -> tuple[int, ...]:
        """Bytes of each block that a visit brings to a GPU; where every weight is trained, those of its gradients."""
        return tuple(block.moved_bytes or block.buffer_bytes for block in self.blocks)

    @property
    def fp32_bytes(self) -> int:
        """Bytes of all blocks' weights in fp32: of their gradients, and of either of AdamW's moments."""
        return sum(block.fp32_bytes for block in self.blocks)

    @property
    def outer_bytes(self) -> int:
        """Bytes of everything outside the blocks in the compute dtype."""
        return self.embedding_bytes + self.head_bytes + self.other_bytes

    @property
    def moments_bytes(self) -> int:
        """Bytes of both of AdamW's moments of every weight: in fp32, or as the optimizer that is known stores them."""
        if self.optimizer is not None and not self._has_fp32_moments:
            return self.optimizer.state_bytes
        return 2 * (self.fp32_bytes + self.outer_bytes * itemsize("float32") // itemsize(self.compute_dtype))

    @property
    def is_updated_flat(self) -> bool:
        """Whether AdamW updates flat buffers, of which a GPU can do a part."""
        return self.optimizer is None or self.optimizer.is_flat

    @property
    def state_bytes_each(self) -> float:
        """Bytes of a weight and its moments, on average."""
        if self.optimizer is None or self._has_fp32_moments:
            return 2 * itemsize("float32") + itemsize(self.compute_dtype)
        return self.optimizer.state_bytes / self.optimizer.num_updated + itemsize(self.compute_dtype)

    @property
    def optimizer_of_whole_params(self) -> str | None:
        """Name of the optimizer, if it is one of `lowmem.optim` that takes or rounds whole parameters."""
        optimizer = self.optimizer
        if optimizer is None or not optimizer.is_own or (optimizer.is_flat and self._has_fp32_moments):
            return None
        return optimizer.name

    @property
    def _has_fp32_moments(self) -> bool:
        optimizer = self.optimizer
        return optimizer is None or optimizer.state_bytes >= 2 * itemsize("float32") * optimizer.num_updated

    @property
    def workspace_bytes(self) -> int:
        """Size of the one workspace that blocks are unpacked into."""
        return max(block.workspace_bytes for block in self.blocks)

    @property
    def key_value_bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes in the K/V cache of a generation."""
        return sum(block.key_size + block.value_size for block in self.blocks) * itemsize(self.compute_dtype)


def itemsize(dtype: str) -> int:
    """Bytes of one element of a floating-point dtype, by torch's name ("bfloat16").

    Raises:
        ValueError: Not a floating-point type that models compute in.
    """
    sizes = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
    if dtype not in sizes:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(sizes)}")
    return sizes[dtype]
