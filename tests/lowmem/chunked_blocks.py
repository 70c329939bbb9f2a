"""One call of one block of a tiny model, as it is and in chunks; for tests only."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowmem.streaming.call import CallArguments
from lowmem.streaming.chunking import attention
from lowmem.streaming.chunking.attention import enable_chunks
from lowmem.streaming.chunking.carrier import Workspace
from lowmem.streaming.chunking.chunks import ChunkedCall, ChunkRecord, backward_chunks, forward_chunks
from lowmem.streaming.recompute import Sought
from tests.zoo.architectures import tiny_model

CPU = torch.device("cpu")
TOKENS = 16
PADDINGS = ("none", "left", "right", "packed")
CHUNKS = (1, 5, 64)


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


def has_attention(block: nn.Module) -> bool:
    """Whether a block computes attention that goes through transformers' registry, so that ours can be in its place."""
    forwards = (inspect.unwrap(type(module).forward) for module in block.modules())
    codes = (getattr(forward, "__code__", None) for forward in forwards)
    return any(code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names for code in codes)


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
        Sought(inputs=[call.hidden], wanted=[True], params=params, grads=[grad]),
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
