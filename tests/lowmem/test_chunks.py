"""A block in chunks against the block as it is: outputs and gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowmem.streaming import attention
from lowmem.streaming.chunkable import ARCHITECTURES, can_chunk, enable_chunks, has_attention
from lowmem.streaming.chunks import (
    CallArguments,
    ChunkedCall,
    ChunkRecord,
    NotChunkable,
    backward_chunks,
    chunk_spans,
    forward_chunks,
)
from lowmem.streaming.kv_carrier import Workspace
from lowmem.streaming.random_state import restored
from tests.zoo.architectures import tiny_model

CPU = torch.device("cpu")
TOKENS = 16
PADDINGS = ("none", "left", "right", "packed")
CHUNKS = (1, 5, 64)
# Their own code computes norms, routers or softmax in fp32 whatever the model's type, and rounds gradients to it.
FP32_INSIDE = frozenset(
    """
    afmoe axk1 beam cohere cohere2 cohere2_moe cohere_compass_text deepseek_v2 deepseek_v3 diffllama dots1 ernie4_5_moe
    exaone_moe flint gemma gemma2 gemma3_text glm4_moe glm4_moe_lite granite_swa granitemoe_swa helium hy_v3 kolibri1
    laguna llama4_text longcat_flash mimo_v2_flash minimax_m2 moshi qwen3_5_moe_text qwen3_5_text qwen3_next
    recurrent_gemma solar_open vaultgemma bailing_hybrid kimi_linear nemotron_h lfm2_moe minimax
    """.split()  # noqa: SIM905
)
FAMILIES = (
    "cohere2 deepseek_v3 gemma2 gemma3_text glm4 gpt2 gpt_neox gpt_oss granite llama llama4_text mistral mixtral olmo2 "
    "phi3 qwen2 qwen3 qwen3_moe smollm3"
).split()


@dataclass(frozen=True, kw_only=True)
class RecordedCall:
    """One call of one block, with the model's original attention and with ours."""

    model: nn.Module
    block: nn.Module
    raw: Callable[..., object]
    plain: CallArguments
    ours: CallArguments
    implementation: str

    def run(self, arguments: CallArguments) -> object:
        self.model.config._attn_implementation = attention.IMPLEMENTATIONS[self.implementation]
        return self.raw(self.block, *arguments[0], **arguments[1])

    def run_plain(self, hidden: Tensor) -> Tensor:
        self.model.config._attn_implementation = self.implementation
        (_, *rest), kwargs = self.plain
        return first_tensor(checkpoint(self.raw, self.block, hidden, *rest, use_reentrant=False, **kwargs))

    @property
    def hidden(self) -> Tensor:
        return self.ours[0][0]  # type: ignore[return-value]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    names: list[str] = []
    found = []
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(name.startswith(f"{n}.") for n in names):
            names.append(name)
            found.append(module)
    return found


def raw_forward(block: nn.Module) -> Callable[..., object]:
    forward = type(block).forward
    return getattr(forward, "__wrapped__", forward)


def record_arguments(model: nn.Module, inputs: dict[str, Tensor]) -> list[tuple[nn.Module, CallArguments]]:
    """What each block is called with, hidden states always the first positional argument."""
    calls: list[tuple[nn.Module, CallArguments]] = []

    def spying(block: nn.Module) -> Callable[..., object]:
        def forward(*args: object, **kwargs: object) -> object:
            if not args:
                args = (kwargs.pop("hidden_states"),)
            # Padding of the block before, see `with_seeing_queries`.
            args = (args[0].nan_to_num(), *args[1:])  # type: ignore[attr-defined]
            calls.append((block, (args, dict(kwargs))))
            return raw_forward(block)(block, *args, **kwargs)

        return forward

    for block in blocks_of(model):
        block.forward = spying(block)
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for block in blocks_of(model):
        del block.forward
    return calls


def with_seeing_queries(arguments: CallArguments) -> CallArguments:
    """Eager attention answers nan in fp64 for a query that sees nothing; padding, whose output no one reads."""
    args, kwargs = arguments
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.is_floating_point():
        blind = (mask < 0).all(-1, keepdim=True) & torch.eye(mask.shape[-1], dtype=torch.bool)
        kwargs = {**kwargs, "attention_mask": mask.masked_fill(blind, 0.0)}
    return args, kwargs


def record_calls(model: nn.Module, inputs: dict[str, Tensor]) -> list[RecordedCall]:
    implementation = model.config.get_text_config()._attn_implementation.removeprefix("lowmem_")
    model.config._attn_implementation = implementation
    plain = [(block, with_seeing_queries(arguments)) for block, arguments in record_arguments(model, inputs)]
    enable_chunks(model)
    ours = record_arguments(model, inputs)
    return [
        RecordedCall(
            model=model, block=block, raw=raw_forward(block), plain=args, ours=our_args, implementation=implementation
        )
        for (block, args), (_, our_args) in zip(plain, ours, strict=True)
    ]


def batch_of(padding: str, *, vocab: int = 100) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of a model and which tokens are none of the padding."""
    ids = torch.randint(3, vocab, (1 if padding == "packed" else 2, TOKENS))
    valid = torch.ones_like(ids)
    if padding == "packed":
        # Edges of documents inside chunks and between them.
        positions = torch.cat([torch.arange(length) for length in (4, 6, 6)]).unsqueeze(0)
        return {"input_ids": ids, "position_ids": positions}, valid.bool()
    if padding == "none":
        return {"input_ids": ids}, valid.bool()
    valid[1, slice(0, 5) if padding == "left" else slice(-5, None)] = 0
    return {"input_ids": ids, "attention_mask": valid}, valid.bool()


def first_tensor(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]  # type: ignore[index]


def checkpointed(call: RecordedCall, params: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Output and gradients (of hidden states, then of parameters) of torch's non-reentrant checkpointing."""
    hidden = call.hidden.detach().clone().requires_grad_()
    output = call.run_plain(hidden)
    return output, list(torch.autograd.grad(output, [hidden, *params], grad, allow_unused=True))


def chunked(
    call: RecordedCall, params: Sequence[Tensor], grad: Tensor, *, chunk_tokens: int, workspace: Workspace | None = None
) -> tuple[Tensor, list[Tensor | None], ChunkRecord]:
    cut = ChunkedCall(call.raw, *call.ours)
    forward = forward_chunks(call.run, cut, chunk_tokens=chunk_tokens, device=CPU, workspace=workspace)
    inputs, found = backward_chunks(
        call.run,
        cut,
        inputs=[call.hidden],
        wanted=[True],
        params=params,
        grads=[grad],
        record=forward.record,
        device=CPU,
        workspace=workspace,
    )
    return first_tensor(forward.output), [*inputs, *found], forward.record


def assert_close(got: Sequence[Tensor | None], want: Sequence[Tensor | None], *, tolerance: float) -> None:
    for found, expected in zip(got, want, strict=True):
        if found is None or expected is None:
            assert found is None or not found.any()
            assert expected is None or not expected.any()
            continue
        # What cancels to nothing in exact arithmetic (a bias before a softmax) is compared with the ordinary size.
        size = max(float(expected.detach().norm()), 0.1)
        assert float((found.detach() - expected.detach()).norm()) / size < tolerance


def tiny(name: str) -> nn.Module:
    model = tiny_model(name, dtype=torch.float64)
    # torch has no grouped product in fp64.
    model.config._experts_implementation = "eager"
    # Two of its routers add random numbers while they train: another draw for each way to cut a sequence.
    return model.eval() if name == "phimoe" else model.train()


def check_block(name: str, call: RecordedCall, valid: Tensor, *, chunks: Sequence[int]) -> bool:
    """Compare one block, in chunks of several sizes; whether it could be chunked."""
    params = [param for param in call.block.parameters() if param.requires_grad]
    grad = torch.randn(call.hidden.shape, dtype=torch.float64) * valid.unsqueeze(-1)
    output, grads = checkpointed(call, params, grad)
    tolerance = 5e-6 if name in FP32_INSIDE else 1e-12
    for chunk_tokens in chunks:
        try:
            got, found, _ = chunked(call, params, grad, chunk_tokens=chunk_tokens)
        except NotChunkable:
            # Of a hybrid model's blocks, those without attention; one class serves for all of nemotron_h's.
            assert not has_attention(call.block) or name == "nemotron_h"
            return False
        assert_close([got[valid]], [output[valid]], tolerance=tolerance)
        assert_close([found[0][valid], *found[1:]], [grads[0][valid], *grads[1:]], tolerance=tolerance)
    return True


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_those_of_checkpointing(name: str) -> None:
    model = tiny(name)
    for padding, chunks in (("none", (64,)), ("left", (5,)), ("right", (5,)), ("packed", (1, 5))):
        inputs, valid = batch_of(padding)
        calls = record_calls(model, inputs)
        for call in (calls[0], calls[-1]):
            assert check_block(name, call, valid, chunks=chunks)


@pytest.mark.slow
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_gradients_equal_those_of_checkpointing_for_every_architecture_named(name: str, padding: str) -> None:
    inputs, valid = batch_of(padding)
    assert any([check_block(name, call, valid, chunks=CHUNKS) for call in record_calls(tiny(name), inputs)])


def adapted_block(kind: str, *, name: str = "llama") -> tuple[RecordedCall, list[nn.Parameter], Tensor]:
    """A block of a tiny model with an adapter whose parameters are all non-zero."""
    from peft import LoraConfig, get_peft_model

    model = tiny(name)
    if kind != "full":
        config = LoraConfig(
            r=3,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"] + ["up_proj", "down_proj"] * (name == "llama"),
            lora_dropout=0.3 if kind == "dropout" else 0.0,
            use_dora=kind == "dora",
        )
        get_peft_model(model, config)
        model.double().train()
        with torch.no_grad():
            for adapter in (param for key, param in model.named_parameters() if "lora_B" in key):
                adapter.normal_()
    inputs, valid = batch_of("packed")
    call = record_calls(model, inputs)[0]
    return call, [param for param in call.block.parameters() if param.requires_grad], valid


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
        call.run, cut, inputs=[call.hidden], wanted=[False], params=params, grads=[grad], record=record, device=CPU
    )
    assert inputs == [None]
    assert_close(found, checkpointed(call, params, grad)[1][1:], tolerance=1e-12)


def test_gradients_can_be_written_over_those_that_arrive() -> None:
    call, params, _ = adapted_block("lora")
    grad = torch.randn_like(call.hidden)
    _, expected, _ = chunked(call, params, grad, chunk_tokens=5)
    cut = ChunkedCall(call.raw, *call.ours)
    output = torch.empty_like(call.hidden)
    forward = forward_chunks(call.run, cut, chunk_tokens=5, device=CPU, into=output)
    assert first_tensor(forward.output) is output
    inputs, found = backward_chunks(
        call.run,
        cut,
        inputs=[call.hidden],
        wanted=[True],
        params=params,
        grads=[grad],
        record=forward.record,
        device=CPU,
        into=grad,
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
        inputs=[single.hidden],
        wanted=[True],
        params=params,
        grads=[grad.float()],
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
    with pytest.raises(NotChunkable, match="argument table of shape .* has no known dimension of 16 tokens"):
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
    assert not has_attention(call.block.mlp)
    assert has_attention(call.block)
