"""Attention by parts against plain attention, and masks that stay rules."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from lowmem.streaming.chunking import attention
from lowmem.streaming.chunking.attention import joined_attention
from lowmem.streaming.chunking.carrier import KVCarrier, Prefix, Workspace
from lowmem.streaming.chunking.mask import CausalMask, PartKind
from lowmem.streaming.chunking.parts import AttentionJob, PartwiseAttention

TOKENS = 23
KINDS = ("none", "window", "packed", "packed window", "left", "right", "holes")


def causal_mask(kind: str, *, tokens: int = TOKENS, batch: int = 2, window: int = 6) -> CausalMask:
    """A mask as transformers makes it, through the registered mask function."""
    from transformers import LlamaConfig
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    attention.register()
    config = LlamaConfig(sliding_window=window)
    config._attn_implementation = attention.IMPLEMENTATIONS["sdpa"]
    padding, positions = None, None
    if kind in ("left", "right", "holes"):
        padding = torch.ones(batch, tokens, dtype=torch.long)
        padding[-1, {"left": slice(0, 7), "right": slice(-7, None), "holes": slice(4, 15, 3)}[kind]] = 0
    if "packed" in kind:
        lengths = (tokens // 4, tokens // 2, tokens - tokens // 4 - tokens // 2)
        positions = torch.cat([torch.arange(length) for length in lengths]).expand(batch, -1)
    create = create_sliding_window_causal_mask if "window" in kind else create_causal_mask
    mask = create(config, torch.empty(batch, tokens, 1), padding, None, positions)
    assert isinstance(mask, CausalMask)
    return mask


def tensors(
    *,
    batch: int = 2,
    heads: int = 4,
    key_heads: int = 2,
    tokens: int = TOKENS,
    key_width: int = 8,
    value_width: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((heads, key_width), (key_heads, key_width), (key_heads, value_width))
    return tuple(  # type: ignore[return-value]
        torch.randn(batch, count, tokens, width, dtype=torch.float64, requires_grad=True) for count, width in shapes
    )


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    probs = scores.softmax(-1).nan_to_num(0.0)[..., : key.shape[2]]
    return (probs @ value).transpose(1, 2)


def job_of(mask: CausalMask, **changes: object) -> AttentionJob:
    whole = AttentionJob(mask=mask, start=0, prefix=None, scale=0.3, softcap=None, dropout=0.0, seed=1)
    return replace(whole, **changes)  # type: ignore[arg-type]


def in_two_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    job: AttentionJob,
    *,
    split: int,
    sinks: Tensor | None,
    joined: bool = False,
) -> tuple[Tensor, KVCarrier]:
    """Attention of the tokens from `split` on, over a carrier that has those before."""
    carrier = KVCarrier(num_tokens=query.shape[2], workspace=Workspace())
    carrier.begin(0, split, keep=True)
    assert carrier.take(key[:, :, :split], value[:, :, :split]) is None
    carrier.begin(split, query.shape[2], keep=False)
    own = (key[:, :, split:], value[:, :, split:])
    chunk = replace(job, start=split, prefix=carrier.take(*own))
    if joined:
        return joined_attention(query[:, :, split:], *own, chunk), carrier
    return PartwiseAttention.apply(query[:, :, split:], *own, sinks, chunk), carrier


def relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("softcap", "with_sinks", "widths"),
    [(None, False, (8, 8)), (None, True, (8, 8)), (2.0, False, (8, 8)), (2.0, True, (8, 8)), (None, False, (12, 8))],
)
@pytest.mark.parametrize("split", [1, 9, TOKENS - 1])
def test_a_chunk_over_its_prefix_equals_plain_attention(
    kind: str, softcap: float | None, with_sinks: bool, widths: tuple[int, int], split: int
) -> None:
    mask = causal_mask(kind)
    query, key, value = tensors(key_width=widths[0], value_width=widths[1])
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if with_sinks else None
    job = job_of(mask, softcap=softcap)
    want = plain_attention(query, key, value, mask.dense(), scale=0.3, softcap=softcap, sinks=sinks)[:, split:]
    got, carrier = in_two_chunks(query, key, value, job, split=split, sinks=sinks)
    assert relative_error(got, want) < 1e-13

    leaves = [query, key, value] + ([] if sinks is None else [sinks])
    grad = torch.randn_like(want)
    expected = torch.autograd.grad(want, leaves, grad)
    found = list(torch.autograd.grad(got, leaves, grad))
    # Gradients of the prefix are in the carrier: they belong to the chunks before.
    carrier.begin(0, split, keep=False)
    carrier.take(key[:, :, :split], value[:, :, :split])
    for index, (_, before) in enumerate(carrier.own_with_gradients(), start=1):
        found[index][:, :, :split] += before
    for grad_found, grad_expected in zip(found, expected, strict=True):
        assert relative_error(grad_found, grad_expected) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_joined_attention_equals_attention_by_parts(kind: str) -> None:
    mask = causal_mask(kind)
    query, key, value = tensors()
    grad = torch.randn(2, TOKENS - 9, 4, 8, dtype=torch.float64)
    results = []
    for joined in (False, True):
        out, carrier = in_two_chunks(query, key, value, job_of(mask), split=9, sinks=None, joined=joined)
        found = torch.autograd.grad(out, [query, key, value], grad)
        carrier.begin(0, 9, keep=False)
        carrier.take(key[:, :, :9], value[:, :, :9])
        results.append([out, *found, *(before for _, before in carrier.own_with_gradients())])
    # A query that sees nothing: torch's kernels answer zero or nan, the rest of a step never reads it.
    for got, want in zip(*results, strict=True):
        assert relative_error(got.nan_to_num(0.0), want.nan_to_num(0.0)) < 1e-12


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_dropout_has_the_gradient_of_what_was_dropped(softcap: float | None) -> None:
    mask = causal_mask("packed", tokens=7, batch=1)
    job = job_of(mask, dropout=0.4, softcap=softcap)
    inputs = tensors(batch=1, heads=2, key_heads=1, tokens=7, key_width=3, value_width=3)

    def attend(*states: Tensor) -> Tensor:
        return PartwiseAttention.apply(*states, None, job)

    assert torch.autograd.gradcheck(attend, inputs)
    assert not torch.equal(attend(*inputs), PartwiseAttention.apply(*inputs, None, replace(job, seed=2)))


def test_dropout_keeps_the_mean() -> None:
    mask = causal_mask("none", tokens=5, batch=1)
    query, key, value = (tensor.detach() for tensor in tensors(batch=1, heads=1, key_heads=1, tokens=5))
    draws = [
        PartwiseAttention.apply(query, key, value, None, job_of(mask, dropout=0.3, seed=seed)) for seed in range(2000)
    ]
    want = PartwiseAttention.apply(query, key, value, None, job_of(mask))
    assert relative_error(torch.stack(draws).mean(0), want) < 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 4, TOKENS])
def test_parts_cover_what_queries_see_and_full_parts_need_no_mask(kind: str, chunk: int) -> None:
    mask = causal_mask(kind)
    dense = mask.dense()
    for start in range(0, TOKENS, chunk):
        for tile in mask.tiles(start, min(start + chunk, TOKENS)):
            rows = dense[:, :, tile.start : tile.end]
            covered = torch.zeros(TOKENS, dtype=torch.bool)
            for part in tile.parts:
                covered[part.start : part.end] = True
                seen = rows[..., part.start : part.end]
                if part.kind is PartKind.FULL:
                    assert seen.all()
                if part.kind is PartKind.CAUSAL:
                    assert torch.equal(seen, torch.ones_like(seen).tril())
            assert not rows[..., ~covered].any()


def test_other_documents_and_keys_outside_the_window_are_not_read() -> None:
    query, key, value = (tensor.detach() for tensor in tensors())
    for kind, first in (("packed", TOKENS // 4 + TOKENS // 2), ("window", TOKENS - 2 - 6 + 1)):
        poisoned_key, poisoned_value = key.clone(), value.clone()
        poisoned_key[:, :, :first] = poisoned_value[:, :, :first] = torch.nan
        job = job_of(causal_mask(kind))
        clean, _ = in_two_chunks(query, key, value, job, split=TOKENS - 2, sinks=None)
        got, _ = in_two_chunks(query, poisoned_key, poisoned_value, job, split=TOKENS - 2, sinks=None)
        assert torch.equal(got, clean)


class LargestTensor(TorchDispatchMode):
    """Records the most elements any operator's result had."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("kind", ["window", "packed", "left"])
def test_no_mask_of_tokens_by_tokens_is_built_for_long_sequences(kind: str) -> None:
    tokens = 2300
    with LargestTensor() as largest:
        mask = causal_mask(kind, tokens=tokens, window=700)
        query, key, value = (tensor.detach().float() for tensor in tensors(tokens=tokens, heads=1, key_heads=1))
        module = torch.nn.Module()
        attention.attend("sdpa", module, query, key, value, mask, scaling=0.3)
    assert largest.numel < tokens**2


def test_short_masks_are_those_of_transformers() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key, value = (tensor.detach() for tensor in tensors(key_heads=4))
    for kind in KINDS:
        mask = causal_mask(kind)
        want, _ = sdpa_attention_forward(torch.nn.Module(), query, key, value, mask.dense(), scaling=0.3)
        if mask.rule.plain:
            want, _ = sdpa_attention_forward(torch.nn.Module(), query, key, value, None, scaling=0.3)
        got, _ = attention.attend("sdpa", torch.nn.Module(), query, key, value, mask, scaling=0.3)
        assert torch.equal(got, want)


def test_a_bidirectional_mask_stays_a_tensor() -> None:
    from transformers import LlamaConfig
    from transformers.masking_utils import create_causal_mask

    attention.register()
    config = LlamaConfig()
    config._attn_implementation = attention.IMPLEMENTATIONS["sdpa"]
    blocks = torch.tensor([[-1, 0, 0, 0, -1, -1]])
    mask = create_causal_mask(config, torch.empty(1, 6, 1), None, None, block_sequence_ids=blocks)
    assert isinstance(mask, Tensor)
    assert bool(mask[0, 0, 1, 3])
    config.is_causal = False
    assert not isinstance(create_causal_mask(config, torch.empty(1, 6, 1), torch.ones(1, 6), None), CausalMask)


def test_a_mask_is_cut_along_the_batch_like_any_argument() -> None:
    mask = causal_mask("left", batch=3)
    leaves, spec = tree_flatten({"attention_mask": mask})
    assert [leaf.shape for leaf in leaves] == [(3, 1)]
    cut = tree_unflatten([leaf[1:] for leaf in leaves], spec)["attention_mask"]
    assert torch.equal(cut.dense(), mask.dense()[1:])


def test_a_chunk_before_its_predecessors_is_refused() -> None:
    carrier = KVCarrier(num_tokens=8, workspace=Workspace())
    carrier.begin(4, 8, keep=False)
    with pytest.raises(RuntimeError, match="a chunk from token 4 was run before those that precede it"):
        carrier.take(torch.empty(1, 1, 4, 2), torch.empty(1, 1, 4, 2))


def test_keys_of_other_tokens_than_the_chunk_are_refused() -> None:
    carrier = KVCarrier(num_tokens=8, workspace=Workspace())
    carrier.begin(0, 4, keep=False)
    with pytest.raises(RuntimeError, match="a chunk of 4 tokens has keys of shape"):
        carrier.take(torch.empty(1, 1, 8, 2), torch.empty(1, 1, 8, 2))


def test_workspace_lends_the_same_memory_again() -> None:
    workspace = Workspace()
    like = torch.empty(0)
    first = workspace.take("key", (2, 8), like=like, dtype=torch.float32)
    again = workspace.take("key", (2, 4), like=like, dtype=torch.float64)
    assert again.data_ptr() == first.data_ptr()
    assert workspace.nbytes == 64
    workspace.clear()
    assert workspace.nbytes == 0


def test_prefix_gradients_are_summed_in_fp32() -> None:
    carrier = KVCarrier(num_tokens=3, workspace=Workspace())
    key = torch.ones(1, 1, 2, 1, dtype=torch.bfloat16)
    carrier.begin(0, 2, keep=True)
    carrier.take(key, key)
    carrier.begin(2, 3, keep=False)
    prefix = carrier.take(key[:, :, :1], key[:, :, :1])
    assert isinstance(prefix, Prefix)
    for grad in (256.0, 1.0):
        prefix.memory.add_gradient(0, torch.full((1, 1, 2, 1), grad), torch.full((1, 1, 2, 1), grad))
    # In bf16 256 + 1 is 256.
    assert carrier._memories[0]._grads is not None
    assert carrier._memories[0]._grads[0].flatten().tolist() == [257.0, 257.0, 0.0]
