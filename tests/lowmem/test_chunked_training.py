"""Streamed models whose blocks walk the sequence in chunks: losses, logits and gradients of the resident model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from lowmem.models.blocks import ARCHITECTURES
from lowmem.streaming.block import ChunkedRows
from lowmem.streaming.call import CallArguments
from lowmem.streaming.chunking.chunks import RunBlock
from lowmem.streaming.runtime import runtime_of
from tests.lowmem.chunked_blocks import CHUNKS, PADDINGS, batch_of
from tests.lowmem.test_architectures import EXACT, KINDS, distance
from tests.lowmem.test_chunk_families import FAMILIES, FP32_INSIDE
from tests.zoo.architectures import build
from tests.zoo.reference import Outcome, adapt, lora, resident, trainable
from tests.zoo.streamed import streamed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning"),
]
EAGER = ("gemma2", "gpt_oss")
FEW = ("gemma2", "gpt_oss", "llama", "mixtral", "qwen3_next")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes each tiny checkpoint once."""
    written: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in written:
            written[name] = build(name, tmp_path_factory.mktemp("zoo"), changes={})
        return written[name]

    return write


def in_double(model: PreTrainedModel, name: str, kind: str = "lora") -> torch.nn.Module:
    """An adapter of random values, all in fp64, and experts in code that fp64 has kernels for."""
    model.config._experts_implementation = "eager"
    wrapped = adapt(model, lora(name, **KINDS[kind]))
    for adapter in (param for param in wrapped.parameters() if param.requires_grad):
        adapter.data = adapter.data.double()
    return wrapped


def labelled(padding: str) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    inputs, valid = batch_of(padding)
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~valid, -100)}, valid


def assert_equal(outcome: Outcome, expected: Outcome, valid: Tensor, *, allowed: float) -> None:
    assert distance(outcome.loss, expected.loss) <= allowed
    assert distance(outcome.logits[valid], expected.logits[valid]) <= allowed
    assert outcome.gradients.keys() == expected.gradients.keys()
    size = max(float(gradient.norm()) for gradient in expected.gradients.values())
    for name, gradient in expected.gradients.items():
        # What cancels to nothing in exact arithmetic (a key's bias before a softmax) has no size of its own.
        error = float((outcome.gradients[name].double() - gradient.double()).norm())
        assert error <= allowed * max(float(gradient.norm()), 1e-3 * size), f"{name}: {error:.1e}"


def run(model: torch.nn.Module, batch: dict[str, Tensor]) -> Outcome:
    """One forward and backward in fp64 throughout; transformers' own loss rounds the logits to fp32."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    params = trainable(model)
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    found = {name: grad for name, grad in zip(params, grads, strict=True) if grad is not None}
    return Outcome(loss=loss.detach(), logits=logits.detach(), gradients=found)


def check(folder: Path, name: str, *, kind: str, padding: str, chunks: tuple[int, ...]) -> None:
    batch, valid = labelled(padding)
    expected = run(in_double(resident(folder, dtype=torch.float64), name, kind), batch)
    if not torch.isfinite(expected.loss):
        pytest.skip("eager attention answers nan in fp64 for padding that sees nothing")
    for chunk_tokens in chunks:
        model = streamed(folder, chunk_tokens=chunk_tokens, dtype=torch.float64)
        outcome = run(in_double(model, name, kind), batch)
        assert_equal(outcome, expected, valid, allowed=1e-5 if name in FP32_INSIDE else 1e-11)


@pytest.mark.parametrize("name", FEW)
def test_chunks_equal_the_resident_model(name: str, checkpoint: Callable[[str], Path]) -> None:
    # Eager attention answers nan in fp64 for padding on the left, which sees nothing; other tests have that case.
    for padding in ("right" if name in EAGER else "left", "packed"):
        check(checkpoint(name), name, kind="lora", padding=padding, chunks=(5,))


@pytest.mark.slow
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(set(FAMILIES) & set(EXACT) & set(ARCHITECTURES)))
def test_chunks_of_all_sizes_equal_the_resident_model(
    name: str, kind: str, padding: str, checkpoint: Callable[[str], Path]
) -> None:
    check(checkpoint(name), name, kind=kind, padding=padding, chunks=CHUNKS)


def test_micro_batches_and_chunks_together_equal_the_resident_model(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    batch, valid = labelled("right")
    expected = run(in_double(resident(folder, dtype=torch.float64), "llama"), batch)
    model = streamed(folder, micro_batch=1, chunk_tokens=3, dtype=torch.float64)
    assert_equal(run(in_double(model, "llama"), batch), expected, valid, allowed=1e-12)


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_next"])
def test_kept_keys_and_values_equal_those_computed_again(name: str, checkpoint: Callable[[str], Path]) -> None:
    batch, _ = labelled("packed")

    def outcome(*, keeps: bool) -> Outcome:
        model = streamed(checkpoint(name), chunk_tokens=5, dtype=torch.float64)
        runtime_of(model).choose_split._keeps_keys_values = keeps
        return run(in_double(model, name), batch)

    kept, again = outcome(keeps=True), outcome(keeps=False)
    assert torch.equal(kept.loss, again.loss)
    for key, gradient in again.gradients.items():
        assert torch.equal(kept.gradients[key], gradient)


def test_forwards_without_gradients_go_in_chunks_too(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ChunkedRows] = []
    forward = ChunkedRows.forward

    def counted(rows: ChunkedRows, run: RunBlock, arguments: CallArguments) -> object:
        seen.append(rows)
        return forward(rows, run, arguments)

    monkeypatch.setattr(ChunkedRows, "forward", counted)
    folder = checkpoint("llama")
    batch, _ = labelled("left")
    model = streamed(folder, chunk_tokens=5, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
        expected = resident(folder, dtype=torch.float64).eval()(**batch).logits
    valid = batch["attention_mask"].bool()
    assert distance(logits[valid], expected[valid]) <= 1e-12
    assert len(seen) in (runtime_of(model).num_blocks, 2 * runtime_of(model).num_blocks)


def test_generation_is_what_it_was(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    ids = labelled("none")[0]["input_ids"]
    model = streamed(folder, chunk_tokens=5)
    got = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, resident(folder).generate(ids, max_new_tokens=8, do_sample=False))


def test_a_gradient_that_someone_captures_is_not_written_over(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama")
    batch, _ = labelled("none")

    def captured(model: PreTrainedModel) -> list[Tensor]:
        wrapped = in_double(model, "llama")
        kept: list[Tensor] = []

        def keep(module: torch.nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object], output: Tensor) -> None:
            kept.append(output)

        layers = wrapped.base_model.model.model.layers
        handles = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers]
        logits = wrapped(input_ids=batch["input_ids"], use_cache=False).logits
        for handle in handles:
            handle.remove()
        return list(torch.autograd.grad(logits.square().mean(), kept))

    expected = captured(resident(folder, dtype=torch.float64))
    for got, want in zip(captured(streamed(folder, chunk_tokens=5, dtype=torch.float64)), expected, strict=True):
        assert distance(got, want) <= 1e-12


def test_a_model_that_cannot_be_chunked_says_so_in_its_plan(checkpoint: Callable[[str], Path]) -> None:
    model = streamed(checkpoint("falcon"), chunk_tokens=5)
    plan = runtime_of(model).plan
    assert plan.chunk_tokens is None
    assert "falcon is not among the architectures" in plan.unchunkable
    assert plan.unchunkable in str(plan)
