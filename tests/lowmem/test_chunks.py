"""A block in chunks: adapters, dropout, types, memory that is used again, and what is refused."""

import pytest
import torch
from torch import Tensor

from lowmem.models.blocks import can_chunk
from lowmem.streaming.call import CallArguments
from lowmem.streaming.chunking.attention import enable_chunks
from lowmem.streaming.chunking.carrier import Workspace
from lowmem.streaming.chunking.chunks import (
    ChunkedCall,
    NotChunkable,
    backward_chunks,
    chunk_spans,
    forward_chunks,
)
from lowmem.streaming.recompute import Sought, restored
from tests.lowmem.chunked_blocks import (
    CHUNKS,
    CPU,
    TOKENS,
    RecordedCall,
    adapted_block,
    assert_close,
    batch_of,
    checkpointed,
    chunked,
    first_tensor,
    record_calls,
)
from tests.zoo.architectures import tiny_model


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_gradients_of_adapters_equal_those_of_checkpointing(kind: str, name: str) -> None:
    call, params, _ = adapted_block(kind, name=name)
    grad = torch.randn_like(call.hidden)
    output, grads = checkpointed(call, params, grad)
    for chunk_tokens in CHUNKS:
        got, found, _ = chunked(call, params, grad, chunk_tokens=chunk_tokens)
        assert_close([got, *found], [output, *grads], tolerance=1e-12)


@pytest.mark.parametrize("chunk_tokens", [1, 5])
def test_gradients_with_dropout_are_those_of_what_was_dropped(chunk_tokens: int) -> None:
    """Against one graph over all chunks, through a cache of transformers and with the numbers that each chunk drew."""
    from transformers import DynamicCache

    call, params, _ = adapted_block("dropout")
    grad = torch.randn_like(call.hidden)
    torch.manual_seed(3)
    got, found, record = chunked(call, params, grad, chunk_tokens=chunk_tokens)
    after = torch.rand(1)

    hidden = call.hidden.detach().clone().requires_grad_()
    cos_sin, mask = call.plain[1]["position_embeddings"], call.plain[1]["attention_mask"]
    cache, outputs = DynamicCache(), []
    call.model.config._attn_implementation = call.implementation
    for (start, end), state in zip(record.spans, record.random, strict=True):
        with restored(state, CPU):
            output = call.raw(
                call.block,
                hidden[:, start:end],
                attention_mask=mask[:, :, start:end, :end],
                past_key_values=cache,
                position_embeddings=tuple(table[:, start:end] for table in cos_sin),
            )
        outputs.append(first_tensor(output))
    output = torch.cat(outputs, dim=1)
    grads = torch.autograd.grad(output, [hidden, *params], grad)
    assert_close([got, *found], [output, *grads], tolerance=1e-12)

    # Backward drew nothing of its own: what follows a step does not depend on how it was cut.
    with restored(record.random[-1], CPU):
        call.run(call.plain)
    torch.manual_seed(3)
    forward_chunks(call.run, ChunkedCall(call.raw, *call.ours), chunk_tokens=chunk_tokens, device=CPU)
    assert torch.equal(torch.rand(1), after)


def test_attention_dropout_is_the_same_in_both_passes() -> None:
    model = tiny_model("llama", {"attention_dropout": 0.4}, dtype=torch.float64).train()
    call = record_calls(model, batch_of("none")[0])[0]
    hidden = call.hidden.clone()

    def output_of(values: Tensor) -> Tensor:
        torch.manual_seed(5)
        cut = ChunkedCall(call.raw, (values, *call.ours[0][1:]), call.ours[1])
        return first_tensor(forward_chunks(call.run, cut, chunk_tokens=5, device=CPU).output)

    direction, grad = torch.randn_like(hidden), torch.randn_like(hidden)
    torch.manual_seed(5)
    _, (found, *_), _ = chunked(call, [], grad, chunk_tokens=5)
    # Its norms compute in fp32: a smaller step would measure their rounding.
    step = 1e-4
    slope = ((output_of(hidden + step * direction) - output_of(hidden - step * direction)) * grad).sum() / (2 * step)
    assert found is not None
    assert float((found * direction).sum()) == pytest.approx(float(slope), rel=1e-2)


def test_a_frozen_block_passes_the_gradient_on() -> None:
    call, _, _ = adapted_block("full")
    grad = torch.randn_like(call.hidden)
    _, grads = checkpointed(call, [], grad)
    _, found, _ = chunked(call, [], grad, chunk_tokens=5)
    assert_close(found, grads, tolerance=1e-12)


def test_an_input_whose_gradient_is_not_wanted_gets_none_and_parameters_still_do() -> None:
    call, params, _ = adapted_block("lora")
    cut = ChunkedCall(call.raw, *call.ours)
    grad = torch.randn_like(call.hidden)
    record = forward_chunks(call.run, cut, chunk_tokens=5, device=CPU).record
    inputs, found = backward_chunks(
        call.run,
        cut,
        Sought(inputs=[call.hidden], wanted=[False], params=params, grads=[grad]),
        record=record,
        device=CPU,
    )
    assert inputs == [None]
    assert_close(found, checkpointed(call, params, grad)[1][1:], tolerance=1e-12)


def test_gradients_can_be_written_over_those_that_arrive() -> None:
    call, params, _ = adapted_block("lora")
    grad = torch.randn_like(call.hidden)
    _, expected, _ = chunked(call, params, grad, chunk_tokens=5)
    cut = ChunkedCall(call.raw, *call.ours)
    forward = forward_chunks(call.run, cut, chunk_tokens=5, device=CPU)
    inputs, found = backward_chunks(
        call.run,
        cut,
        Sought(inputs=[call.hidden], wanted=[True], params=params, grads=[grad], into=grad),
        record=forward.record,
        device=CPU,
    )
    assert inputs[0] is grad
    assert_close([*inputs, *found], expected, tolerance=1e-15)


def test_a_workspace_that_holds_an_earlier_block_changes_nothing() -> None:
    call, params, _ = adapted_block("lora")
    grad = torch.randn_like(call.hidden)
    _, expected, _ = chunked(call, params, grad, chunk_tokens=5)
    workspace = Workspace()
    for name in ("key 0", "value 0", "grad_key 0", "grad_value 0"):
        workspace.take(name, (4096,), like=grad, dtype=torch.float64).fill_(torch.nan)
    _, found, _ = chunked(call, params, grad, chunk_tokens=5, workspace=workspace)
    assert_close(found, expected, tolerance=1e-15)


def test_the_mlp_runs_once_per_chunk_and_pass_and_hooks_do_not_run_per_chunk() -> None:
    call, params, _ = adapted_block("lora")
    num_mlp, num_accumulated = 0, 0

    def count_mlp(*_: object) -> None:
        nonlocal num_mlp
        num_mlp += 1

    def count_accumulated(_: Tensor) -> None:
        nonlocal num_accumulated
        num_accumulated += 1

    call.block.mlp.register_forward_hook(count_mlp)
    for param in params:
        param.register_post_accumulate_grad_hook(count_accumulated)
    chunked(call, params, torch.randn_like(call.hidden), chunk_tokens=5)
    assert num_mlp == 2 * len(chunk_spans(TOKENS, 5))
    assert num_accumulated == 0
    assert all(param.grad is None for param in params)


def test_parameter_gradients_are_summed_in_fp32() -> None:
    call, _, _ = adapted_block("full")
    call.model.bfloat16()
    args, kwargs = call.ours
    kwargs = {**kwargs, "position_embeddings": tuple(table.bfloat16() for table in kwargs["position_embeddings"])}
    low = RecordedCall(
        model=call.model,
        block=call.block,
        raw=call.raw,
        plain=call.plain,
        ours=((args[0].bfloat16(),), kwargs),
        implementation=call.implementation,
    )
    params = list(call.block.parameters())
    _, found, _ = chunked(low, params, torch.randn_like(low.hidden), chunk_tokens=5)
    assert low.hidden.dtype == torch.bfloat16
    assert {grad.dtype for grad in found[1:] if grad is not None} == {torch.float32}


def test_autocast_in_chunks_is_as_close_to_fp64_as_autocast_alone() -> None:
    call, params, _ = adapted_block("lora")
    grad = torch.randn_like(call.hidden)
    exact = checkpointed(call, params, grad)[1]
    call.model.float()
    single = RecordedCall(
        model=call.model,
        block=call.block,
        raw=call.raw,
        plain=in_fp32(call.plain),
        ours=in_fp32(call.ours),
        implementation=call.implementation,
    )
    params = [param for param in call.block.parameters() if param.requires_grad]

    def autocast_run(arguments: CallArguments) -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            return call.run(arguments)

    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        _, plain = checkpointed(single, params, grad.float())
    cut = ChunkedCall(single.raw, *single.ours)
    record = forward_chunks(autocast_run, cut, chunk_tokens=5, device=CPU).record
    inputs, found = backward_chunks(
        autocast_run,
        cut,
        Sought(inputs=[single.hidden], wanted=[True], params=params, grads=[grad.float()]),
        record=record,
        device=CPU,
    )
    for got, reference, true in zip([*inputs, *found], plain, exact, strict=True):
        assert error(got, true) <= 1.2 * error(reference, true)


def in_fp32(arguments: CallArguments) -> CallArguments:
    from torch.utils._pytree import tree_map

    def cast(leaf: object) -> object:
        return leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    args, kwargs = tree_map(cast, arguments)
    return args, kwargs


def error(got: Tensor | None, true: Tensor | None) -> float:
    assert got is not None
    assert true is not None
    return float((got.detach().double() - true.detach()).norm())


def test_whole_models_attend_as_before_and_generate_the_same() -> None:
    for name in ("qwen2", "gemma2"):
        model = tiny_model(name).eval()
        inputs, _ = batch_of("left")
        want = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert can_chunk(model) is None
        enable_chunks(model)
        enable_chunks(model)
        with torch.no_grad():
            assert torch.equal(model(**inputs, use_cache=False).logits, want[0])
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), want[1])


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("falcon", {}, "falcon is not among the architectures that were found exact"),
        ("llama", {"is_causal": False}, "its attention is bidirectional"),
        ("mixtral", {"output_router_logits": True}, "collects routers' logits"),
        ("llama", {"_attn_implementation": "flex_attention"}, "has kernels of its own; use 'sdpa' or 'eager'"),
    ],
)
def test_models_that_cannot_be_chunked_say_why(name: str, changes: dict[str, object], reason: str) -> None:
    model = tiny_model(name)
    for field, value in changes.items():
        setattr(model.config, field, value)
    assert reason in str(can_chunk(model))
    with pytest.raises(ValueError, match="cannot be chunked"):
        enable_chunks(model)


def test_calls_that_cannot_be_cut_say_why() -> None:
    call, _, _ = adapted_block("full")
    args, kwargs = call.ours
    with pytest.raises(NotChunkable, match="none of its arguments is a mask of lowmem's"):
        ChunkedCall(call.raw, args, {**kwargs, "attention_mask": None})
    with pytest.raises(NotChunkable, match="argument shared is a dict"):
        ChunkedCall(call.raw, args, {**kwargs, "shared": {}})
    with pytest.raises(NotChunkable, match=r"argument table of shape .* has no known dimension of 16 tokens"):
        ChunkedCall(call.raw, args, {**kwargs, "table": torch.empty(3, TOKENS)})
    with pytest.raises(NotChunkable, match="its mask has 16 tokens, its input 9"):
        ChunkedCall(call.raw, (args[0][:, :9],), kwargs)
    with pytest.raises(NotChunkable, match="takes no cache"):
        ChunkedCall(lambda block, hidden_states: hidden_states, args, {})


def test_a_block_without_attention_is_refused_when_it_runs() -> None:
    call, _, _ = adapted_block("full")
    cut = ChunkedCall(call.raw, *call.ours)
    with pytest.raises(NotChunkable, match="it computes no attention of lowmem's"):
        forward_chunks(lambda arguments: arguments[1]["hidden_states"], cut, chunk_tokens=5, device=CPU)
