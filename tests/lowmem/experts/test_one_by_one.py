"""Packed experts taken one by one: the bits of a resident model, and only what tokens are sent to read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import lowmem
from lowmem.experts import reading, visiting
from lowmem.experts.reading import ExpertReader
from lowmem.experts.stacks import ExpertStack
from lowmem.experts.visiting import ExpertScheduler, experts_by_block
from lowmem.streaming.runtime import runtime_of
from tests.lowmem.quantization.checkpoints import KINDS, quantised
from tests.lowmem.quantization.public_layouts import write_layout
from tests.zoo.architectures import build
from tests.zoo.reference import ATTENTION_ONLY, adapt, batch_of, resident, run
from tests.zoo.streamed import streamed

CHANGES: dict[str, dict[str, object]] = {
    "gpt_oss": {"intermediate_size": 64},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 6},
}
CASES = [
    ("qwen3_moe", "nf4"),
    ("gpt_oss", "mxfp4"),
    ("gpt_oss", "nf4 stacks"),
    ("qwen3_moe", "fp8"),
    ("deepseek_v3", "gptq"),
    ("mixtral", "awq"),
]


def on_attention(**options: object) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION_ONLY, **options)  # type: ignore[arg-type]


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str, str], tuple[Path, Path]]:
    def write(name: str, layout: str) -> tuple[Path, Path]:
        if layout in KINDS:
            return quantised(build(name, tmp_path / "zoo", changes=CHANGES.get(name)), tmp_path / "written", layout)
        return write_layout(build(name, tmp_path / "zoo", changes=CHANGES.get(name)), tmp_path / "written", layout)

    return write


def unpacked_matrices(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Keys of the matrices that are unpacked from now on."""
    keys: list[object] = []
    filling = visiting.MatrixSlots.filling

    def noting(self: visiting.MatrixSlots, key: object) -> object:
        keys.append(key)
        return filling(self, key)

    monkeypatch.setattr(visiting.MatrixSlots, "filling", noting)
    return keys


@pytest.mark.parametrize(
    ("name", "layout", "matrices"),
    [
        pytest.param(*case, matrices, marks=[] if (number < 2) == (matrices == "one") else pytest.mark.slow)
        for number, case in enumerate(CASES)
        for matrices in ("one", "all")
    ],
)
def test_a_step_has_the_bits_of_a_resident_model(
    name: str,
    layout: str,
    matrices: str,
    written: Callable[[str, str], tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed, plain = written(name, layout)
    if matrices == "one":
        monkeypatch.setattr(visiting, "MATRICES_BYTES", 1)
    expected = run(adapt(resident(plain), on_attention()), batch_of())
    model = streamed(packed)
    assert isinstance(runtime_of(model).scheduler, ExpertScheduler)
    keys = unpacked_matrices(monkeypatch)
    outcome = run(adapt(model, on_attention()), batch_of())
    assert torch.equal(outcome.loss, expected.loss)
    assert torch.equal(outcome.logits, expected.logits)
    for key, gradient in expected.gradients.items():
        assert torch.equal(outcome.gradients[key], gradient), key
    assert keys
    most = max(keys.count(key) for key in keys)
    assert most <= (3 if matrices == "one" else 2), "once in the forward; in the backward once, or twice without room"


def test_an_adapter_on_the_stacks_is_served_by_whole_blocks(written: Callable[[str, str], tuple[Path, Path]]) -> None:
    packed, plain = written("qwen3_moe", "fp8")
    stacks = {"target_parameters": ["mlp.experts.gate_up_proj"]}
    expected = run(adapt(resident(plain), on_attention(**stacks)), batch_of())
    outcome = run(adapt(streamed(packed), on_attention(**stacks)), batch_of())
    assert torch.equal(outcome.loss, expected.loss)
    assert any("experts" in key for key in expected.gradients)
    for key, gradient in expected.gradients.items():
        assert torch.equal(outcome.gradients[key], gradient), key


@pytest.mark.parametrize(
    ("name", "layout"),
    [pytest.param(*case, marks=[] if number < 2 else pytest.mark.slow) for number, case in enumerate(CASES)],
)
def test_generation_reads_only_the_experts_that_tokens_are_sent_to(
    name: str, layout: str, written: Callable[[str, str], tuple[Path, Path]]
) -> None:
    packed, plain = written(name, layout)
    tokens = torch.tensor([[5, 17, 9]])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = resident(plain).generate(tokens, **options)
    model = streamed(packed)
    runtime = runtime_of(model)
    assert torch.equal(model.generate(tokens, **options), expected)
    source = runtime.scheduler
    assert isinstance(source, ExpertScheduler)
    reader = source._reader
    assert 0 < reader.num_read <= reader.num_asked


def test_stacks_in_int8_are_taken_apart(tmp_path: Path) -> None:
    base = build("qwen3_moe", tmp_path / "base", changes=CHANGES["qwen3_moe"])
    model = streamed(lowmem.pack(base, quantization="int8", output=tmp_path / "packed", device="cpu"))
    plain = resident(base)
    with torch.no_grad():
        for key, param in plain.named_parameters():
            param.copy_(model.get_parameter(key).clone())
    tokens = torch.tensor([[5, 17, 9]])
    expected = plain.generate(tokens, **GENERATING)
    assert torch.equal(model.generate(tokens, **GENERATING), expected)
    assert reader_of(model).num_asked > 0
    outcomes = [run(adapt(one, on_attention()), batch_of()) for one in (plain, model)]
    assert torch.equal(outcomes[1].loss, outcomes[0].loss)
    assert all(torch.equal(outcomes[1].gradients[key], value) for key, value in outcomes[0].gradients.items())


def test_a_module_called_outside_a_visit_reads_true_weights(written: Callable[[str, str], tuple[Path, Path]]) -> None:
    packed, plain = written("qwen3_moe", "fp8")
    model, expected = streamed(packed), resident(plain)
    batch = batch_of()
    assert torch.equal(model(**batch).logits, expected(**batch).logits)
    (experts,) = {own.module for own in experts_by_block(runtime_of(model).blocks[1:2]) if own is not None}
    other = expected.get_submodule(next(name for name, module in model.named_modules() if module is experts))
    hidden, index, weights = torch.randn(3, 32), torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
    assert torch.equal(experts(hidden, index, weights), other(hidden, index, weights))


def test_another_implementation_reads_whole_stacks(written: Callable[[str, str], tuple[Path, Path]]) -> None:
    packed, plain = written("qwen3_moe", "fp8")
    expected, model = resident(plain), streamed(packed)
    for one in (expected, model):
        one.set_experts_implementation("eager")
    outcome, wanted = (run(adapt(one, on_attention()), batch_of()) for one in (model, expected))
    assert torch.equal(outcome.loss, wanted.loss)
    for key, gradient in wanted.gradients.items():
        assert torch.equal(outcome.gradients[key], gradient), key


def test_an_interrupted_visit_leaves_nothing_lent(
    written: Callable[[str, str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, _ = written("qwen3_moe", "fp8")
    model = adapt(streamed(packed), on_attention())
    expected = run(model, batch_of())
    make = ExpertStack.make
    calls = []

    def interrupted(self: ExpertStack, *args: object) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        make(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(ExpertStack, "make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, batch_of())
    modules = [own.module for own in experts_by_block(runtime_of(model).blocks) if own is not None]
    assert not any("_lowmem_open_stacks" in vars(module) for module in modules)
    outcome = run(model, batch_of())
    assert torch.equal(outcome.loss, expected.loss)
    assert all(torch.equal(outcome.gradients[key], gradient) for key, gradient in expected.gradients.items())


def reader_of(model: torch.nn.Module) -> ExpertReader:
    source = runtime_of(model).scheduler
    assert isinstance(source, ExpertScheduler)
    return source._reader


GENERATING = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("guess", ["the router's", "all wrong", "none"])
def test_tokens_do_not_depend_on_what_is_foreseen(
    guess: str, written: Callable[[str, str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, plain = written("qwen3_moe", "nf4")
    tokens = torch.tensor([[5, 17, 9]])
    expected = resident(plain).generate(tokens, **GENERATING)
    foresee = ExpertReader.foresee
    if guess == "all wrong":
        # Two others than those that the next router takes; the cache would keep them all from the second token on.
        monkeypatch.setattr(visiting, "READ_BYTES", 1)
        monkeypatch.setattr(visiting, "MIN_READ", 6)
        monkeypatch.setattr(
            ExpertReader,
            "foresee",
            lambda self, block, experts: foresee(self, block, [one for one in range(8) if one not in experts][:2]),
        )
    if guess == "none":
        monkeypatch.setattr(ExpertReader, "foresee", lambda self, block, experts: None)
    model = streamed(packed)
    assert torch.equal(model.generate(tokens, **GENERATING), expected)
    reader = reader_of(model)
    assert 0 < reader.num_read <= reader.num_asked + reader.num_foreseen - reader.num_came_true
    assert reader.num_came_true <= reader.num_foreseen
    if guess == "none":
        assert reader.num_foreseen == 0
    elif guess == "the router's":
        assert reader.num_came_true > 0
    held = runtime_of(model).scheduler.memory()["expert_bytes"]
    assert held <= visiting.READ_BYTES if guess != "all wrong" else held > 0


def test_guesses_are_right_where_blocks_change_nothing(tmp_path: Path) -> None:
    base = build("qwen3_moe", tmp_path / "base", changes=CHANGES["qwen3_moe"])
    for file in base.glob("*.safetensors"):
        tensors = load_file(file)
        for name, value in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                value.zero_()
            elif name.endswith("layernorm.weight"):
                value.fill_(1.0)
        save_file(tensors, file, metadata={"format": "pt"})
    model = streamed(quantised(base, tmp_path / "written", "nf4")[0])
    model.generate(torch.tensor([[5, 17, 9]]), **GENERATING)
    reader = reader_of(model)
    # Routers are known from the first token's visits on; what is unpacked still is not read.
    assert reader.num_came_true == reader.num_foreseen > 0


def test_wrong_guesses_end(written: Callable[[str, str], tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    packed, plain = written("qwen3_moe", "nf4")
    monkeypatch.setattr(visiting, "READ_BYTES", 1)
    monkeypatch.setattr(visiting, "MIN_READ", 6)
    monkeypatch.setattr(reading, "_FIRST_GUESSES", 8)
    guesses: list[int] = []
    foresee = ExpertReader.foresee

    def wrong(self: ExpertReader, block: int, experts: list[int]) -> None:
        guesses.append(block)
        foresee(self, block, [one for one in range(8) if one not in experts][:2])

    monkeypatch.setattr(ExpertReader, "foresee", wrong)
    model = streamed(packed)
    tokens = torch.tensor([[5, 17, 9]])
    options = GENERATING | {"max_new_tokens": 20}
    assert torch.equal(model.generate(tokens, **options), resident(plain).generate(tokens, **options))
    reader = reader_of(model)
    assert not reader.foresees
    assert reader.num_foreseen <= len(guesses) * 2
    assert len(guesses) < 19 * 5, "nothing is guessed any more"
