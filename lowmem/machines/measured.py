"""What a model's own shapes take on this machine: its blocks, its attention, its head, what unpacks its weights.

One block of each kind is made in memory, with numbers of no meaning and the adapter that is to be timed, and run as the
model runs it; the others are skipped. So nothing is read, a configuration is enough, and of the largest models a few
gigabytes and seconds are needed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from lowmem.adapters.dora import install as install_dora
from lowmem.experts.products import lend, run_experts
from lowmem.experts.stacks import RoutedExperts, without_stacks
from lowmem.experts.visiting import MatrixSlots, VisitedStack, experts_by_block, num_matrices
from lowmem.host_memory import give_back_freed, products_for
from lowmem.internals.experts import use_experts_forward
from lowmem.internals.peft import inputs_cast_once
from lowmem.internals.torch import buffer_table, parameter_table, put_parameter
from lowmem.internals.unread import PuttingOff, is_worth_putting_off
from lowmem.machines.rates import Clock, Stopwatch, probe_update, probe_update_beside
from lowmem.models.blocks import can_chunk
from lowmem.models.build import StreamedBlock, Unpacker
from lowmem.planning.dry_run import BlockRun, BlockWalk
from lowmem.planning.shapes import ModelShapes
from lowmem.planning.step_time import ShapeRates, Trained
from lowmem.streaming.call import CallArguments
from lowmem.streaming.chunking.attention import enable_chunks
from lowmem.streaming.chunking.carrier import Workspace
from lowmem.streaming.chunking.chunks import ChunkedCall, ForwardChunks, backward_chunks, forward_chunks
from lowmem.streaming.head import TiledLogProbFunction
from lowmem.streaming.recompute import Sought
from offload import BlockSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowmem.models.checkpoint import Described

_FEWEST_CALLS = (1, 8)
"""Tokens of a step of generation: of a mixture they reach few of the experts, 32 reach nearly all."""

_SMALL_CALL, _MIDDLE_CALL = 32, 128
"""Tokens of the calls that a block is timed with besides."""

_MOST_TOKENS = {"cpu": 1024, "cuda": 8192}
"""The most of the largest one: a GPU waits for the next kernel to be launched where it gets less."""

_LARGE_CALLS = (512, 2048)
"""Tokens of those between the middle one and the largest, where that is far from them."""

_LONGEST = 2048
"""Tokens of a sequence; larger calls have several."""

_CHUNK_TOKENS, _NUM_CHUNKS = 128, 4
"""The sequence that is timed in chunks."""

_CALL_S = 1.0
"""What the largest call may take at most, or twice what the middle one took."""

_ATTENTION_TOKENS = {"cpu": (512, 1024), "cuda": (2048, 8192)}
"""Tokens of the two sequences whose attention is timed; of the first alone where there is no memory for the other."""

_HEAD_TOKENS = {"cpu": 256, "cuda": 4096}

_HEAD_WORDS, _DROPPED_VALUES = 32_768, 1 << 20

_CACHE_BYTES = 1 << 27
"""More than a processor keeps in its caches for two cores."""


def measure_shape(
    opened: Described,
    shapes: ModelShapes,
    *,
    trains: Trained,
    autocast: bool = True,
    clock: Clock = time.perf_counter,
) -> ShapeRates:
    """Measure what a model's blocks and head take; some seconds, and the memory of one block of each kind.

    Args:
        opened: The model; where an adapter is timed, its meta model has the adapter's modules. Can no longer be loaded.
        shapes: Its sizes with what trains.
        trains: What that is.
        autocast: Run blocks of a half type under autocast to it, as in `Job`.
        clock: Seconds; another than the wall clock's where other programs run.

    Raises:
        NotImplementedError: The model's code cannot be run so.
    """
    watch = Stopwatch(opened.device, clock)
    timing = _BlockTiming(opened, shapes, watch, trains=trains, autocast=autocast)
    calls, in_chunks = timing.measured()
    attention, backward, *in_parts = _attention_rates(shapes, opened, watch)
    # Operations of attention of one sequence, of the mean block.
    mean_size = sum(block.query_size for block in shapes.blocks) / len(shapes.blocks)

    def without_scores(call: _Call) -> _Call:
        flops = 2.0 * call.num_tokens * min(call.num_tokens, timing.longest) * mean_size
        return _Call(
            call.num_tokens, max(0.0, call.forward_s - flops / attention), max(0.0, call.backward_s - flops / backward)
        )

    visit = timing.beyond()
    calls = [without_scores(call) for call in calls]
    more = _Call(0, 0.0, 0.0)
    if in_chunks is not None:
        more = _beyond(without_scores(in_chunks), alone=calls, key_values=shapes.key_value_share)
    head_s, head_backward_s = _head_rates(shapes, opened, watch)
    return ShapeRates(
        trains=trains,
        call_tokens=tuple(call.num_tokens for call in calls),
        forward_calls_s=tuple(call.forward_s for call in calls),
        backward_calls_s=tuple(call.backward_s for call in calls),
        chunk_forward_s=more.forward_s,
        chunk_backward_s=more.backward_s,
        visit_forward_s=visit.forward_s,
        visit_backward_s=visit.backward_s,
        attention_flops_per_s=attention,
        attention_backward_flops_per_s=backward,
        chunk_attention_flops_per_s=tuple(in_parts),
        head_token_s=head_s,
        head_backward_token_s=head_backward_s,
        unpack_s=_unpack_s(opened, watch),
        update_s_per_param=probe_update(watch),
        update_beside_s_per_param=probe_update_beside(clock) if trains == "full" else 0.0,
        dropout_s=_dropout_s(opened, watch)
        + (_dora_dropout_s(opened, shapes, watch, autocast=autocast) if trains == "dora" else 0.0),
    )


@dataclass(frozen=True)
class _Call:
    num_tokens: int
    forward_s: float
    backward_s: float


def _beyond(in_chunks: _Call, *, alone: Sequence[_Call], key_values: float) -> _Call:
    """What each chunk of a sequence takes more than a call of as many tokens, keys and values made again aside.

    Args:
        in_chunks: The sequence.
        alone: Calls, one of them of a chunk's tokens.
        key_values: The part of a forward that makes them, which a backward in chunks does first.
    """
    call = next(call for call in alone if call.num_tokens == _CHUNK_TOKENS)
    forward_s, backward_s = in_chunks.forward_s / _NUM_CHUNKS, in_chunks.backward_s / _NUM_CHUNKS
    backward_s -= key_values * call.forward_s
    return _Call(_CHUNK_TOKENS, max(0.0, forward_s - call.forward_s), max(0.0, backward_s - call.backward_s))


@dataclass(frozen=True, eq=False)
class _Runs:
    """A block's call, to be run as often as one likes."""

    forward: Callable[[], object]
    backward: Callable[[], object]


Make = Callable[[BlockRun, Tensor, nn.Module], tuple[_Runs, object]]
"""Makes the runs of a block on an input; returns them and the block's output."""


class _BlockTiming:
    """The mean block's calls, small ones and large ones, and a sequence in chunks."""

    def __init__(
        self, opened: Described, shapes: ModelShapes, watch: Stopwatch, *, trains: Trained, autocast: bool
    ) -> None:
        self._opened, self._shapes, self._watch, self._is_full = opened, shapes, watch, trains == "full"
        blocks = [streamed.block for streamed in opened.built.blocks]
        trained = [any(param.requires_grad for param in block.module.parameters()) for block in blocks]
        adapted = [index for index, is_trained in enumerate(trained) if is_trained]
        self._kinds = _stand_ins(shapes, adapted or range(len(blocks)))
        if trains == "full":
            for index in set(self._kinds):
                blocks[index].module.requires_grad_(True)
        config = opened.built.model.config.get_text_config()
        self._most = _MOST_TOKENS[opened.device.type]
        self.longest = min(self._most, _LONGEST, getattr(config, "max_position_embeddings", None) or self._most)
        """Tokens of the longest sequence that is timed."""
        if self._most <= _LONGEST:
            self._most = self.longest
        self._middle: Sequence[_Runs] = ()
        self._single: dict[int, _SingleExperts] = {}
        self._as_trained = partial(_as_trained, device=opened.device, dtype=opened.dtype, autocast=autocast)
        self._can_chunk = can_chunk(opened.built.model) is None

    def measured(self) -> tuple[list[_Call], _Call | None]:
        """The calls, by their tokens, and the sequence in chunks; None where it cannot be cut."""
        built = self._opened.built
        used = {id(built.blocks[index].block.module) for index in set(self._kinds)}
        skipped = {id(streamed.block.module) for streamed in built.blocks} - used
        for streamed in (built.blocks[index] for index in set(self._kinds)):
            (experts,) = experts_by_block([streamed])
            if experts is not None and not experts.is_adapted:
                self._single[id(streamed.block.module)] = _SingleExperts(streamed, experts, self._opened.device)
        unread = {id(param) for experts in self._single.values() for param in experts.params()}
        if self._single:
            use_experts_forward(built.model, "lowmem_grouped_mm", run_experts)
        _make_real(built.model, skipped=skipped, unread=unread, device=self._opened.device)
        # As before the first block of a streamed model: PEFT's own norm forms the adapted weight.
        install_dora(built.model, frozen_base=True)
        if self._can_chunk:
            enable_chunks(built.model)
        runs = {size: self._runs(size, self._whole) for size in (*_FEWEST_CALLS, _SMALL_CALL, self.middle_tokens)}
        self._middle = runs[self.middle_tokens]
        small, middle = self._timed([(size, runs[size]) for size in (_SMALL_CALL, self.middle_tokens)])
        largest = _largest_call(small, middle, most=self._most)
        for size in (*_LARGE_CALLS, largest):
            if size == largest > middle.num_tokens or largest >= 3 * size // 2:
                with suppress(torch.cuda.OutOfMemoryError):
                    found = self._runs(size, self._whole)
                    if self._opened.device.type == "cuda":
                        # There may be memory for forwards alone.
                        for one in found:
                            one.backward()
                    runs[size] = found
        chunked = self._runs_in_chunks()
        if not chunked:
            return self._timed([*runs.items()]), None
        *calls, in_chunks = self._timed([*runs.items(), (_NUM_CHUNKS * _CHUNK_TOKENS, chunked)])
        return calls, in_chunks

    @property
    def middle_tokens(self) -> int:
        """Tokens of a call that is neither small nor large."""
        return min(_MIDDLE_CALL, max(2 * _SMALL_CALL, self.longest))

    def beyond(self) -> _Call:
        """What a visit takes more than a call that is repeated: the block's weights are in no cache.

        Where every weight is trained, what a backward has freed is given back besides, and touched again the next time.
        Told from both in turn: two measurements some seconds apart differ by more than this.
        """
        if self._opened.device.type != "cpu":
            return _Call(0, 0.0, 0.0)
        other = torch.empty(_CACHE_BYTES, dtype=torch.uint8)

        def backward_of(runs: _Runs) -> Callable[[], object]:
            def visited() -> None:
                runs.backward()
                if self._is_full:
                    give_back_freed()

            return visited

        def more_s(repeated: Callable[[], object], visited: Callable[[], object]) -> float:
            both_s = self._watch.usual_in_turn([repeated, visited], before=[None, lambda: other.fill_(1)])
            return both_s[1] - both_s[0]

        each = {
            id(runs): (more_s(runs.forward, runs.forward), more_s(runs.backward, backward_of(runs)))
            for runs in set(self._middle)
        }
        means = [statistics.mean(times) for times in zip(*(each[id(runs)] for runs in self._middle), strict=True)]
        return _Call(0, *(max(0.0, seconds) for seconds in means))

    def _timed(self, sizes: Sequence[tuple[int, Sequence[_Runs]]]) -> list[_Call]:
        """Time calls, by their tokens, in turn; of each the mean over the blocks."""
        each = list({id(runs): runs for _, found in sizes for runs in found}.values())
        times_s = self._watch.usual_in_turn([run for runs in each for run in (runs.forward, runs.backward)])
        took = {id(runs): times for runs, times in zip(each, zip(*[iter(times_s)] * 2, strict=True), strict=True)}
        return [
            _Call(size, *(sum(times) / len(found) for times in zip(*(took[id(runs)] for runs in found), strict=True)))
            for size, found in sizes
        ]

    def _runs_in_chunks(self) -> Sequence[_Runs]:
        num_tokens = _NUM_CHUNKS * _CHUNK_TOKENS
        if not self._can_chunk or num_tokens > self.longest or self.middle_tokens != _CHUNK_TOKENS:
            return ()
        try:
            return self._runs(num_tokens, self._in_chunks)
        except NotImplementedError:
            return ()

    def _runs(self, num_tokens: int, make: Make) -> Sequence[_Runs]:
        """A call of each block."""
        model, device = self._opened.built.model, self._opened.device
        walk = BlockWalk(self._opened.built, stand_ins=self._kinds, measure=make)
        seq_len = min(num_tokens, self.longest)
        states = num_tokens // seq_len, seq_len, self._shapes.hidden_size
        hidden = torch.randn(states, device=device).to(self._opened.dtype)
        try:
            with walk.watching(), torch.no_grad():
                model.base_model(inputs_embeds=hidden, use_cache=False)
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise NotImplementedError(f"{type(model).__name__} cannot be timed block by block: {error}") from error
        return walk.results

    def _whole(self, run: BlockRun, hidden: Tensor, module: nn.Module) -> tuple[_Runs, object]:
        params = [param for param in module.parameters() if param.requires_grad]
        gradient, shapes = torch.randn_like(hidden), [param.shape for param in module.parameters()]
        num_tokens = hidden.shape[:2].numel()
        # As blocks are recomputed.
        puts_off = is_worth_putting_off(hidden.device, shapes, num_tokens=num_tokens)
        visit = self._single[id(module)].visit if id(module) in self._single else nullcontext

        def forward() -> object:
            visit()
            products = products_for(hidden.device, shapes, num_tokens=num_tokens)
            with torch.no_grad(), self._as_trained(module), products:
                return run(hidden)

        def backward() -> None:
            visit()
            leaf = hidden.detach().requires_grad_()
            products = products_for(hidden.device, shapes, num_tokens=num_tokens)
            with torch.enable_grad():
                with self._as_trained(module), PuttingOff() if puts_off else nullcontext(), products:
                    result = _first_tensor(run(leaf))
                torch.autograd.grad(result, [leaf, *params], gradient, allow_unused=True)

        return _Runs(forward, backward), forward()

    def _in_chunks(self, run: BlockRun, hidden: Tensor, module: nn.Module) -> tuple[_Runs, object]:
        params = [param for param in module.parameters() if param.requires_grad]
        gradient, shapes = torch.randn_like(hidden), [param.shape for param in module.parameters()]
        device, workspace = hidden.device, Workspace()

        if id(module) in self._single:
            raise NotImplementedError("experts that are unpacked one by one are timed in whole sequences")

        def run_chunk(arguments: CallArguments) -> object:
            with self._as_trained(module), products_for(device, shapes, num_tokens=_CHUNK_TOKENS):
                return run.raw_forward(module, *arguments[0], **arguments[1])

        def forward() -> ForwardChunks:
            call = ChunkedCall(run.raw_forward, *run.with_input(hidden))
            return forward_chunks(run_chunk, call, chunk_tokens=_CHUNK_TOKENS, device=device, workspace=workspace)

        done = forward()

        def backward() -> None:
            leaf = hidden.detach()
            call = ChunkedCall(run.raw_forward, *run.with_input(leaf))
            sought = Sought(inputs=[leaf], wanted=[True], params=params, grads=[gradient])
            backward_chunks(run_chunk, call, sought, record=done.record, device=device, workspace=workspace)

        return _Runs(forward, backward), done.output


@contextmanager
def _as_trained(module: nn.Module, *, device: torch.device, dtype: torch.dtype, autocast: bool) -> Iterator[None]:
    """Under autocast to a half type, as TRL's trainers run a model that is in one unless they are told otherwise."""
    if dtype == torch.float32 or not autocast:
        yield
        return
    with torch.autocast(device.type, dtype=dtype, cache_enabled=False), inputs_cast_once(module, device):
        yield


class _SingleExperts:
    """Lends a module of experts stacks that are unpacked as they are used, as a visit to their block does."""

    def __init__(self, streamed: StreamedBlock, experts: RoutedExperts, device: torch.device) -> None:
        self._experts, self._stored, self._visits = experts, _zeros(streamed.spec, device), count()
        self._slots: dict[torch.Size, MatrixSlots] = {}
        for stack in experts.stacks.values():
            shape = stack.slot.shape[1:]
            num = num_matrices(experts)
            self._slots[shape] = MatrixSlots(shape, stack.slot.dtype, num=num, device=device)

    def params(self) -> Iterator[nn.Parameter | None]:
        """The stacks, which are not read."""
        return (parameter_table(self._experts.module)[name] for name in self._experts.stacks)

    def visit(self) -> None:
        """Begin another visit, which finds nothing unpacked."""
        number, stored = next(self._visits), self._stored
        stacks = {
            name: VisitedStack(
                stack, name=name, block=number, stored=stored, slots=self._slots[stack.slot.shape[1:]], reader=None
            )
            for name, stack in self._experts.stacks.items()
        }
        lend(self._experts.module, stacks)


def _largest_call(small: _Call, middle: _Call, *, most: int) -> int:
    """Tokens of the largest call that can be timed: by what each token adds.

    That is little where a mixture's experts take most of the time for their weights alone.
    """
    token_s = (middle.backward_s - small.backward_s) / (middle.num_tokens - small.num_tokens)
    more = max(_CALL_S - middle.backward_s, middle.backward_s) / max(token_s, 1e-9)
    largest = int(min(most, middle.num_tokens + more)) // _SMALL_CALL * _SMALL_CALL
    return largest if largest <= _LONGEST else largest // _LONGEST * _LONGEST


def _first_tensor(value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value
    assert isinstance(value, tuple | list)
    return _first_tensor(value[0])


def _stand_ins(shapes: ModelShapes, usable: Sequence[int]) -> tuple[int, ...]:
    """For each block one that can be run and is like it, by its widths."""
    kinds: dict[tuple[object, ...], int] = {}
    for index in usable:
        kinds.setdefault(_key(shapes, index), index)
    return tuple(kinds.get(_key(shapes, index), usable[0]) for index in range(len(shapes.blocks)))


def _key(shapes: ModelShapes, index: int) -> tuple[object, ...]:
    block = shapes.blocks[index]
    return block.linears, block.experts, block.num_params, block.query_size, block.key_size


def _make_real(model: PreTrainedModel, *, skipped: set[int], unread: set[int], device: torch.device) -> None:
    """Memory for what runs, with small numbers in it; embeddings, head, and what is skipped or unread stay on meta."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for module in _modules(model, skipped):
        if module in ends:
            continue
        for name, param in [*parameter_table(module).items()]:
            if param is not None and param.is_meta and id(param) not in unread:
                made = nn.Parameter(_numbers(param, device), requires_grad=param.requires_grad)
                put_parameter(module, name, made)
        for name, buffer in [*buffer_table(module).items()]:
            if buffer is not None and buffer.is_meta:
                buffer_table(module)[name] = _numbers(buffer, device)


def _numbers(like: Tensor, device: torch.device) -> Tensor:
    """Small ones, where a type has any: they take as long as others, which denormal ones and infinities do not."""
    made = torch.empty(like.shape, dtype=like.dtype, device=device)
    if not made.is_floating_point():
        return made.zero_()
    return made.normal_(0.0, 0.02) if made.dim() > 1 else made.fill_(0.5)


def _modules(module: nn.Module, skipped: set[int]) -> Iterator[nn.Module]:
    if id(module) in skipped:
        return
    yield module
    for child in module.children():
        yield from _modules(child, skipped)


def _attention_rates(shapes: ModelShapes, opened: Described, watch: Stopwatch) -> tuple[float, ...]:
    """Operations per second of causal attention without gradients, and recomputed with them, of the widest block.

    Of what grows with the square of a sequence's length. Kernels compute whole tiles, of which a causal mask leaves
    half on the diagonal: that grows with the length, and is in what calls take. On a GPU both once more of the last
    part of a sequence, as chunks attend to what came before: on some that is another kernel, a third as fast.
    """
    block = max(shapes.blocks, key=lambda block: block.query_size)
    num_keys = max(1, block.num_heads * block.key_size // block.query_size)
    width = block.query_size // block.num_heads
    make = dict[str, Any](dtype=opened.dtype, device=opened.device)
    grouped = num_keys != block.num_heads

    def timed(num_tokens: int, num_before: int = 0) -> list[float]:
        # As chunks are joined with what came before them: only kernels of half types share a key head among heads.
        shares = grouped and not (num_before and opened.dtype == torch.float32)
        num_key_heads = num_keys if shares else block.num_heads
        query = torch.randn(1, block.num_heads, num_tokens, width, **make)
        key, value = (torch.randn(1, num_key_heads, num_before + num_tokens, width, **make) for _ in range(2))
        gradient = torch.randn_like(query)
        bias = causal_lower_right(num_tokens, num_before + num_tokens) if num_before else None

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None, enable_gqa=shares)

        def forward() -> Tensor:
            with torch.no_grad():
                return attend(query, key, value)

        def backward() -> None:
            q, k, v = (tensor.detach().requires_grad_() for tensor in (query, key, value))
            torch.autograd.grad(attend(q, k, v), [q, k, v], gradient)

        return watch.usual_in_turn([forward, backward])

    short, long = _ATTENTION_TOKENS[opened.device.type]
    short_s = long_s = timed(short)
    num_tokens = short
    with suppress(torch.cuda.OutOfMemoryError):
        long_s, num_tokens = timed(long), long
    flops = 2.0 * num_tokens**2 * block.query_size
    forward, backward = (
        flops / _of_square(one_s, other_s, short=short, long=num_tokens)
        for one_s, other_s in zip(short_s, long_s, strict=True)
    )
    if opened.device.type != "cpu" and num_tokens == long:
        flops = 4.0 * short * (long - short / 2) * block.query_size
        with suppress(torch.cuda.OutOfMemoryError):
            return forward, backward, *(flops / seconds for seconds in timed(short, long - short))
    return forward, backward


def _of_square(short_s: float, long_s: float, *, short: int, long: int) -> float:
    """Seconds of the longer sequence that grow with the square of the length; all where that cannot be told."""
    if long == short:
        return long_s
    square_s = (long_s / long - short_s / short) / (long - short) * long**2
    return square_s if square_s > 0 else long_s


def _head_rates(shapes: ModelShapes, opened: Described, watch: Stopwatch) -> tuple[float, float]:
    """Seconds of one token's loss and of its gradient, that of the head's weight included where every weight trains."""
    words = max(1, min(_HEAD_WORDS, shapes.num_head_params // shapes.hidden_size))
    make = dict[str, Any](dtype=opened.dtype, device=opened.device)
    weight = torch.randn(words, shapes.hidden_size, **make).mul_(0.02)
    num_tokens = _HEAD_TOKENS[opened.device.type]
    hidden = torch.randn(num_tokens, shapes.hidden_size, **make).requires_grad_()
    wanted = [hidden]
    if shapes.trains_every_weight:
        wanted.append(weight.requires_grad_())
    targets = torch.randint(words, (num_tokens,), device=opened.device)
    gradient = torch.ones(num_tokens, device=opened.device)
    made: list[Tensor] = []

    def forward() -> None:
        made[:] = [TiledLogProbFunction.apply(hidden, weight, None, targets, 1.0, 0)[0]]  # type: ignore[no-untyped-call]

    def both() -> None:
        forward()
        torch.autograd.grad(made[0], wanted, gradient.to(made[0].dtype))

    forward_s = watch.usual_s(forward)
    both_s = watch.usual_s(both)
    share = shapes.num_head_params / (words * shapes.hidden_size) / num_tokens
    return forward_s * share, max(0.0, both_s - forward_s) * share


def _unpack_s(opened: Described, watch: Stopwatch) -> float:
    """Seconds of making the mean block's parameters from its stored tensors, but for experts that calls make."""
    first: dict[tuple[object, ...], float] = {}
    total_s = 0.0
    for streamed in opened.built.blocks:
        kind = tuple((spec.dtype, spec.shape) for spec in streamed.spec.tensors)
        if kind not in first:
            (experts,) = experts_by_block([streamed])
            at_once = streamed if experts is None or experts.is_adapted else without_stacks(streamed, experts)
            first[kind] = _whole_s(at_once, opened.device, watch)
        total_s += first[kind]
    return total_s / len(opened.built.blocks)


def _whole_s(streamed: StreamedBlock, device: torch.device, watch: Stopwatch) -> float:
    """Seconds of making a block's parameters at once."""
    unpacker, stored = Unpacker([streamed], device=device), _zeros(streamed.spec, device)

    def run() -> None:
        unpacker.forget()
        unpacker.unpack(0, stored)

    seconds = watch.usual_s(run) if unpacker.workspace_bytes else 0.0
    unpacker.close()
    return seconds


def _zeros(spec: BlockSpec, device: torch.device) -> dict[str, Tensor]:
    # Touched: pages that are only read would all be the same one.
    return {one.name: torch.empty(one.shape, dtype=one.dtype, device=device).zero_() for one in spec.tensors}


def _dropout_s(opened: Described, watch: Stopwatch) -> float:
    """Seconds of dropping one value, where an adapter does: in fp32."""
    values = torch.ones(_DROPPED_VALUES, device=opened.device)
    return watch.usual_s(lambda: functional.dropout(values, 0.1)) / _DROPPED_VALUES


def _dora_dropout_s(opened: Described, shapes: ModelShapes, watch: Stopwatch, *, autocast: bool) -> float:
    """Seconds, for each value that is dropped, of PEFT's product of it with the weight in the adapter's type, fp32."""
    linears = (linear for block in shapes.blocks for linear in block.linears if linear.is_dora)
    largest = max(linears, key=lambda linear: linear.in_features * linear.out_features)
    values = torch.ones(_HEAD_TOKENS[opened.device.type], largest.in_features, device=opened.device)
    weight = torch.ones(largest.out_features, largest.in_features, device=opened.device, dtype=opened.dtype)
    is_half = autocast and opened.dtype != torch.float32

    def run() -> object:
        with torch.no_grad(), torch.autocast(opened.device.type, dtype=opened.dtype, enabled=is_half):
            return functional.linear(values, weight.to(values.dtype))

    product_s = watch.usual_s(run) / (len(values) * largest.in_features * largest.out_features)
    return product_s * shapes.outputs_per_dora_input
