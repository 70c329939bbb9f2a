"""Every causal language model of transformers: streamed, it answers what the resident one does, or it is refused.

Both run the same kernels in the same order on the same weights, so most answers are the same bit for bit; where the
place of a weight in memory changes the order of a sum, they agree to 1e-5.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import lowmem
from lowmem.errors import UnsupportedError
from lowmem.streaming.runtime import runtime_of
from offload.placement import Placement
from tests.zoo.architectures import ARCHITECTURES, build
from tests.zoo.reference import Outcome, adapt, batch_of, lora, resident, run
from tests.zoo.skipped import SKIPPED
from tests.zoo.streamed import streamed

pytestmark = [
    # PEFT's conversion of "all-linear" to fused experts leaves a pattern behind where a layer has none.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match:RuntimeWarning"),
]

TOLERANCE = 1e-5
"""Relative, of a whole tensor."""

REFUSED: dict[str, str] = {
    "blt": "one list of decoder blocks",
    "cpmant": "one list of decoder blocks",
    "ctrl": "one list of decoder blocks",
    "gemma3": "one list of decoder blocks",
    "gemma3n_text": "takes keys and values of an earlier block",
    "gemma4": "one list of decoder blocks",
    "got_ocr2": "one list of decoder blocks",
    "gpt_neox_japanese": "one list of decoder blocks",
    "hrm_text": "one list of decoder blocks",
    "moss_transcribe_diarize": "one list of decoder blocks",
    "openai-gpt": "one list of decoder blocks",
    "phi4_multimodal": "one list of decoder blocks",
    "reformer": "one list of decoder blocks",
    "rwkv": "architecture rwkv",
    "xlm": "one list of decoder blocks",
    "xlnet": "one list of decoder blocks",
    "zamba": "shares parameters",
    "zamba2": "shares parameters",
}
"""Architectures that cannot be streamed, and what the error says of them."""

EXACT = tuple(name for name in ARCHITECTURES if name not in REFUSED)

CORE = (
    *("cohere2", "deepseek_v3", "falcon", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "gpt_oss", "granite"),
    *("llama", "mistral", "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "smollm3"),
    *("stablelm", "starcoder2"),
)
"""Run on every change with LoRA; the others with --slow."""

FEW = ("falcon", "gpt2", "gpt_oss", "llama", "mixtral", "phi3", "qwen3_next")
"""Run in every way on every change."""

KINDS: dict[str, dict[str, object]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes each tiny checkpoint once."""
    written: dict[str, Path] = {}

    def write(name: str, **changes: object) -> Path:
        key = f"{name} {changes}"
        if key not in written:
            written[key] = build(name, tmp_path_factory.mktemp("zoo"), changes=changes)
        return written[key]

    return write


def distance(value: Tensor, expected: Tensor) -> float:
    """Relative error of a tensor in the 2-norm; 0.0 for equal bits."""
    if torch.equal(value, expected):
        return 0.0
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def assert_equal(outcome: Outcome, expected: Outcome, *, allowed: float = TOLERANCE) -> None:
    assert distance(outcome.loss, expected.loss) <= TOLERANCE
    assert distance(outcome.logits, expected.logits) <= allowed
    assert outcome.gradients.keys() == expected.gradients.keys()
    assert all(gradient.any() for gradient in expected.gradients.values())
    worst, error = largest_error(outcome, expected)
    assert error <= allowed, f"{worst}: relative error {error:.1e}"


def largest_error(outcome: Outcome, expected: Outcome) -> tuple[str, float]:
    errors = {name: distance(outcome.gradients[name], gradient) for name, gradient in expected.gradients.items()}
    worst = max(errors, key=lambda name: errors[name])
    return worst, errors[worst]


def slow_unless_in(few: tuple[str, ...]) -> list[object]:
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in EXACT]


def test_every_entry_of_the_mapping_is_in_the_zoo_or_skipped_with_a_reason() -> None:
    assert set(ARCHITECTURES) | set(SKIPPED) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert not set(ARCHITECTURES) & set(SKIPPED)
    assert set(REFUSED) < set(ARCHITECTURES)


@pytest.mark.parametrize("name", slow_unless_in(CORE))
def test_streamed_lora_step_equals_the_resident_one(name: str, checkpoint: Callable[..., Path]) -> None:
    folder, batch = checkpoint(name), batch_of()
    expected = run(adapt(resident(folder), lora(name)), batch)
    model = streamed(folder)
    assert Placement.STREAMED in runtime_of(model).plan.placement.placements
    assert_equal(run(adapt(model, lora(name)), batch), expected)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if name in FEW and kind == "dora" else pytest.mark.slow)
        for name in EXACT
        for kind in ("rslora", "dora")
    ],
)
def test_streamed_step_with_other_adapters_equals_the_resident_one(
    name: str, kind: str, checkpoint: Callable[..., Path]
) -> None:
    folder, batch = checkpoint(name), batch_of()
    expected = run(adapt(resident(folder), lora(name, **KINDS[kind])), batch)
    outcome = run(adapt(streamed(folder), lora(name, **KINDS[kind])), batch)
    allowed = TOLERANCE
    if kind == "dora" and largest_error(outcome, expected)[1] > TOLERANCE:
        # The norm is another formula of the same value: as near to the truth as the resident model's own fp32 result.
        exact = run(adapt(resident(folder, dtype=torch.float64), lora(name, **KINDS[kind])).double(), batch)
        # A magnitude's gradient can be four sums that nearly vanish: 8 times its error there, in one family of 90.
        allowed = 10 * largest_error(expected, exact)[1]
    assert_equal(outcome, expected, allowed=allowed)


@pytest.mark.parametrize("name", slow_unless_in(FEW))
def test_one_sequence_at_a_time_equals_the_whole_batch(name: str, checkpoint: Callable[..., Path]) -> None:
    folder, batch = checkpoint(name), batch_of(3, padding=True)
    expected = run(adapt(resident(folder), lora(name)), batch)
    assert_equal(run(adapt(streamed(folder, micro_batch=1), lora(name)), batch), expected)


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "bloom", "falcon", "gpt2", "cohere2", "mpt"),
    ],
)
def test_batch_as_large_as_the_number_of_heads_is_cut_by_sequence_only(
    name: str, checkpoint: Callable[..., Path]
) -> None:
    folder, batch = checkpoint(name), batch_of(4)
    expected = run(adapt(resident(folder), lora(name)), batch)
    assert_equal(run(adapt(streamed(folder, micro_batch=1), lora(name)), batch), expected)


@pytest.mark.parametrize("name", slow_unless_in(FEW))
def test_streamed_generation_equals_the_resident_one(name: str, checkpoint: Callable[..., Path]) -> None:
    if name == "xlstm":
        pytest.skip("transformers' own generation fails: it wants lengths that are multiples of a chunk")
    folder = checkpoint(name)
    answers = [
        model.generate(
            batch_of(2, 8)["input_ids"], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        for model in (resident(folder).eval(), streamed(folder))
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    "name",
    [
        *sorted(REFUSED),
    ],
)
def test_architecture_that_cannot_be_streamed_is_refused_by_name(name: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(name)
    with pytest.raises(UnsupportedError, match=REFUSED[name]) as caught:
        streamed(folder)
    assert caught.value.option.startswith("architecture ")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "mistral", "gpt_oss", "smollm3"])
def test_packed_sequences_stay_apart_as_in_the_resident_model(name: str, checkpoint: Callable[..., Path]) -> None:
    folder, batch = checkpoint(name), batch_of(1)
    batch["position_ids"] = torch.cat([torch.arange(6), torch.arange(10)])[None]
    expected = run(adapt(resident(folder), lora(name)), batch)
    assert_equal(run(adapt(streamed(folder), lora(name)), batch), expected)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}),
        ("opt", {"dropout": 0.1, "layerdrop": 0.5}),
        ("llama", {"attention_dropout": 0.1}),
        ("phimoe", {"router_jitter_noise": 0.01, "input_jitter_noise": 0.01}),
    ],
)
def test_dropout_in_the_model_draws_what_the_resident_one_draws(
    name: str, changes: dict[str, object], checkpoint: Callable[..., Path]
) -> None:
    folder, batch = checkpoint(name, **changes), batch_of()
    expected = run(adapt(resident(folder), lora(name)), batch)
    assert_equal(run(adapt(streamed(folder), lora(name)), batch), expected)


@pytest.mark.parametrize(("name", "tied"), [("qwen3", True), ("gemma", False), ("gpt2", False)])
def test_head_is_tied_as_the_configuration_says(name: str, tied: bool, checkpoint: Callable[..., Path]) -> None:
    folder, batch = checkpoint(name, tie_word_embeddings=tied), batch_of()
    expected = run(adapt(resident(folder), lora(name)), batch)
    assert_equal(run(adapt(streamed(folder), lora(name)), batch), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma4_text", "apertus", "qwen3_next"])
def test_weights_stored_in_bf16_are_computed_in_fp32(name: str, tmp_path: Path) -> None:
    folder, batch = build(name, tmp_path, dtype=torch.bfloat16), batch_of()
    expected = run(adapt(resident(folder), lora(name)), batch)
    assert_equal(run(adapt(streamed(folder), lora(name)), batch), expected)


@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "olmoe"])
def test_router_loss_has_the_gradient_that_it_has_in_memory(
    name: str, micro_batch: int | None, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint(name, output_router_logits=True, router_aux_loss_coef=0.5)
    batch = batch_of(3, padding=True)
    plain = run(adapt(resident(checkpoint(name)), lora(name)), batch)
    expected = run(adapt(resident(folder), lora(name)), batch)
    assert float(expected.loss - plain.loss) > 0.1
    assert_equal(run(adapt(streamed(folder, micro_batch=micro_batch), lora(name)), batch), expected)


def test_router_loss_is_refused_where_sequences_are_cut(checkpoint: Callable[..., Path]) -> None:
    budget = lowmem.Budget(device="64MiB", host="0")
    model = lowmem.from_pretrained(checkpoint("mixtral"), budget=budget, chunk_tokens=8, device="cpu")
    with pytest.raises(UnsupportedError, match="output_router_logits=True with chunks of 8 tokens"):
        adapt(model, lora("mixtral"))(**batch_of(), output_router_logits=True)


@pytest.mark.parametrize(
    "name",
    ["llama", "qwen3_5"],
)
def test_adapter_records_the_folder_as_its_base_model(name: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(name)
    adapted = adapt(streamed(folder), lora(name))
    assert adapted.active_peft_config.base_model_name_or_path == str(folder)


def test_encoder_decoder_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    # A copy: the class that writes the checkpoint clears the flag, and others use the folder.
    folder = Path(shutil.copytree(checkpoint("bart"), tmp_path / "bart"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": True}))
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        streamed(folder)


@pytest.mark.parametrize("num_shared", [2, 4])
def test_shared_keys_and_values_are_refused(num_shared: int, checkpoint: Callable[..., Path]) -> None:
    changes = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}
    with pytest.raises(UnsupportedError, match="keys and values of an earlier block"):
        streamed(checkpoint("gemma4_text", num_kv_shared_layers=num_shared, **changes))
