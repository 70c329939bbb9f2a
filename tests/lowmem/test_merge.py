"""Merging shard by shard against PEFT's merge on a resident model, and what the written folder is."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import peft
import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowmem.adapters.merge import merge
from lowmem.adapters.saved_adapter import _WHOLE_LAYER_TYPES
from lowmem.errors import UnsupportedError
from offload import SourceError, TierFull
from offload.files.safetensors import OutputTensor, ShardFile
from tests.zoo.architectures import build, tiny_config
from tests.zoo.reference import adapt, resident

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ["q_proj", "v_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
TIED = {"tie_word_embeddings": True}


@contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT warns of tied embeddings, of biases that look like shards and of its own defaults; a merge must not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        yield


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def base_of(
    bases: Path, name: str, dtype: torch.dtype = torch.float32, changes: dict[str, object] | None = None
) -> Path:
    """The checkpoint of a tiny model, made once per session; tests only read it."""
    folder = bases / f"{name}-{dtype}-{'-'.join(changes or ())}"
    return folder if folder.exists() else build(name, folder, dtype=dtype, changes=changes)


def save_adapter(base: Path, config: PeftConfig, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    with quiet_peft():
        adapt(resident(base, dtype=dtype), config).save_pretrained(folder)
    return folder


def with_adapter(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> PeftModel:
    with quiet_peft():
        return PeftModel.from_pretrained(resident(base, dtype=dtype), adapter).eval()


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return cast("PreTrainedModel", model.eval())


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=torch.arange(3, 19).view(2, -1), use_cache=False).logits
    return out


def compare(base: Path, config: PeftConfig, tmp_path: Path, dtype: torch.dtype) -> tuple[float, int]:
    """Largest difference from PEFT's merge relative to the tensor's largest value, and how many tensors changed."""
    adapter = save_adapter(base, config, tmp_path / "adapter", dtype)
    ours = load(merge(base, adapter=adapter, output=tmp_path / "out"), dtype).state_dict()
    pefts = with_adapter(base, adapter, dtype).merge_and_unload().state_dict()
    before = resident(base, dtype=dtype).state_dict()
    assert ours.keys() == pefts.keys()
    worst = max(float((ours[k].double() - v.double()).abs().max() / v.double().abs().max()) for k, v in pefts.items())
    return worst, sum(not torch.equal(ours[name], value) for name, value in before.items())


LORA = {
    "lora": ("llama", LoraConfig(r=4, target_modules=TARGETS), 9),
    "dora": ("llama", LoraConfig(r=4, target_modules=TARGETS, use_dora=True), 9),
    "rslora with patterns": (
        "llama",
        LoraConfig(
            r=4, target_modules=TARGETS, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}
        ),
        9,
    ),
    "mica": ("llama", LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="mica"), 9),
    "block diagonal": (
        "llama",
        LoraConfig(
            r=4,
            target_modules=TARGETS,
            use_bdlora=BdLoraConfig(
                target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj", "v_proj"], nblocks=2
            ),
        ),
        9,
    ),
    "Conv1D with lora_bias": (
        "gpt2",
        LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, lora_bias=True),
        12,
    ),
    "embedding and head": ("llama", LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]), 2),
    "modules_to_save": (
        "llama",
        LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head", "embed_tokens", "input_layernorm"]),
        14,
    ),
    "trained tokens": ("llama", LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices=[1, 5]), 10),
    "renamed keys": ("gpt_neox", LoraConfig(r=4, target_modules="all-linear"), 12),
    "fused projections": ("phi3", LoraConfig(r=4, target_modules="all-linear"), 12),
    "experts stored one by one": ("qwen3_moe", LoraConfig(r=4, target_modules=[], target_parameters=EXPERTS), 4),
    "experts with other names": ("mixtral", LoraConfig(r=4, target_modules=["q_proj"], target_parameters=EXPERTS), 9),
    "experts stored together": ("gpt_oss", LoraConfig(r=4, target_modules=["q_proj"], target_parameters=EXPERTS), 12),
    "experts under their old names": ("mixtral", LoraConfig(r=4, target_modules=["q_proj", "w1", "w2", "w3"]), 9),
    "tied, not adapted": ("llama tied", LoraConfig(r=4, target_modules=TARGETS), 9),
    "tied, tokens": ("llama tied", LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices=[1]), 11),
    "tied, saved": (
        "llama tied",
        LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True),
        11,
    ),
}


@pytest.mark.parametrize("case", LORA)
def test_merge_equals_pefts_bit_by_bit_in_fp32(case: str, bases: Path, tmp_path: Path) -> None:
    name, config, num_changed = LORA[case]
    architecture, _, tied = name.partition(" ")
    base = base_of(bases, architecture, changes=TIED if tied else None)
    worst, changed = compare(base, config, tmp_path, torch.float32)
    assert worst == 0
    assert changed == num_changed


@pytest.mark.parametrize("case", ["Conv1D", "embedding"])
def test_dora_of_columns_equals_pefts_within_rounding(case: str, bases: Path, tmp_path: Path) -> None:
    name, targets = {"Conv1D": ("gpt2", ["c_attn", "c_fc"]), "embedding": ("llama", ["embed_tokens"])}[case]
    config = LoraConfig(r=4, target_modules=targets, fan_in_fan_out=case == "Conv1D", use_dora=True)
    worst, changed = compare(base_of(bases, name), config, tmp_path, torch.float32)
    assert worst <= 1e-6
    assert changed == {"Conv1D": 6, "embedding": 1}[case]


@pytest.mark.parametrize("use_dora", [False, True])
def test_merge_into_bf16_equals_pefts_bit_by_bit(use_dora: bool, bases: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=TARGETS, use_dora=use_dora)
    worst, changed = compare(base_of(bases, "llama", torch.bfloat16), config, tmp_path, torch.bfloat16)
    assert worst == 0
    assert changed == 9


def test_bf16_experts_are_rounded_once_where_peft_rounds_twice(bases: Path, tmp_path: Path) -> None:
    base = base_of(bases, "mixtral", torch.bfloat16)
    config = LoraConfig(r=4, target_modules=[], target_parameters=EXPERTS)
    adapter = save_adapter(base, config, tmp_path / "adapter", torch.bfloat16)
    ours = load(merge(base, adapter=adapter, output=tmp_path / "out"), torch.bfloat16).state_dict()
    pefts = with_adapter(base, adapter, torch.bfloat16).merge_and_unload().state_dict()
    exact = with_adapter(base, adapter, torch.float64).merge_and_unload().state_dict()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    ours_error = (ours[name].double() - exact[name]).abs().sum()
    pefts_error = (pefts[name].double() - exact[name]).abs().sum()
    assert torch.equal(ours[name], exact[name].to(torch.bfloat16))
    assert ours_error < pefts_error


OTHERS: dict[str, dict[str, object]] = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 40},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "MISS": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "r": 2, "topk": 2},
    "WAVEFT": {"n_frequency": 40},
}


COMMON = {"ADALORA", "IA3", "LOHA", "OFT", "VERA"}
"""Run on every change; the others with --slow."""


@pytest.mark.parametrize(
    "peft_type", [pytest.param(t, marks=() if t in COMMON else pytest.mark.slow) for t in sorted(_WHOLE_LAYER_TYPES)]
)
def test_other_adapter_types_merge_as_peft_merges_them(peft_type: str, bases: Path, tmp_path: Path) -> None:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](target_modules=TARGETS, **OTHERS.get(peft_type, {}))
    worst, changed = compare(base_of(bases, "llama"), config, tmp_path, torch.float32)
    assert worst == 0
    assert changed == 9


@pytest.mark.parametrize("peft_type", ["LN_TUNING", "TRAINABLE_TOKENS"])
def test_trained_norms_and_tokens_merge(peft_type: str, bases: Path, tmp_path: Path) -> None:
    config, num_changed = {
        "LN_TUNING": (peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]), 4),
        "TRAINABLE_TOKENS": (peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"]), 1),
    }[peft_type]
    assert compare(base_of(bases, "llama"), config, tmp_path, torch.float32) == (0, num_changed)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_tied_tensors_that_an_adapter_changes_differently_are_stored_apart(
    targets: list[str], bases: Path, tmp_path: Path
) -> None:
    # PEFT adds both updates to the one tensor; the adapted model itself is the reference.
    base = base_of(bases, "llama", changes=TIED)
    adapter = save_adapter(base, LoraConfig(r=4, target_modules=targets), tmp_path / "adapter")
    merged = load(merge(base, adapter=adapter, output=tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert merged.lm_head.weight is not merged.model.embed_tokens.weight
    expected = logits(with_adapter(base, adapter))
    assert (logits(merged) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_tied_tensors_that_change_alike_stay_tied(bases: Path, tmp_path: Path) -> None:
    base = base_of(bases, "llama", changes=TIED)
    config = LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    adapter = save_adapter(base, config, tmp_path / "adapter")
    merged = load(merge(base, adapter=adapter, output=tmp_path / "out"))
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    expected = logits(with_adapter(base, adapter))
    assert (logits(merged) - expected).abs().max() <= 1e-5 * expected.abs().max()


def stored(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}


@pytest.fixture
def lora(bases: Path, tmp_path: Path) -> tuple[Path, Path]:
    base = base_of(bases, "llama", torch.bfloat16)
    return base, save_adapter(base, LoraConfig(r=4, target_modules=TARGETS), tmp_path / "adapter", torch.bfloat16)


def test_tensors_that_no_adapter_touches_are_copied_bit_by_bit(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype=torch.bfloat16, shard_bytes=1 << 30)
    # Signalling NaN and a tensor that the model does not know: neither survives a conversion or a load.
    extra = {"extra.weight": torch.tensor([0x7FA0, 1], dtype=torch.uint16).view(torch.bfloat16)}
    save_file(load_file(base / "model.safetensors") | extra, base / "model.safetensors", metadata={"format": "pt"})
    adapter = save_adapter(base, LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter", torch.bfloat16)
    before, after = stored(base), stored(merge(base, adapter=adapter, output=tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value.view(torch.uint8), after[name].view(torch.uint8)) == ("q_proj" not in name)


def test_a_long_merge_shows_how_far_it_is(
    lora: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lowmem.adapters.merge._QUIET_S", 3600.0)
    merge(lora[0], adapter=lora[1], output=tmp_path / "quick")
    assert "merging" not in capsys.readouterr().err
    monkeypatch.setattr("lowmem.adapters.merge._QUIET_S", 0.0)
    merge(lora[0], adapter=lora[1], output=tmp_path / "out")
    # In a file, lines without control characters, and few of them.
    shown = capsys.readouterr().err
    assert re.fullmatch(r"(lowmem: merging, [\d.]+ \w+ of [\d.]+ \w+\n)+", shown)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    merge(lora[0], adapter=lora[1], output=tmp_path / "shown")
    assert "merging:   0%" in capsys.readouterr().err


def test_inputs_are_only_read(lora: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = lora
    before = digests(base) | digests(adapter)
    merge(base, adapter=adapter, output=tmp_path / "out")
    assert digests(base) | digests(adapter) == before
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "out"}


def test_shards_keep_to_their_size_and_the_index_names_every_tensor(lora: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = lora
    out = merge(base, adapter=adapter, output=tmp_path / "out", max_shard_bytes="10KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file.name)
            nbytes = sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118 (not a mapping)
        assert nbytes <= 10_000
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(out).values())
    load(out, torch.bfloat16)
    single = merge(base, adapter=adapter, output=tmp_path / "single")
    assert [file.name for file in single.glob("*.safetensors*")] == ["model.safetensors"]
    assert all(torch.equal(value, stored(out)[name]) for name, value in stored(single).items())


@pytest.mark.parametrize("tile_bytes", [1, 1000])
def test_result_does_not_depend_on_the_tile(
    tile_bytes: int, lora: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = lora
    whole = stored(merge(base, adapter=adapter, output=tmp_path / "whole"))
    monkeypatch.setattr("lowmem.adapters.merged_values._TILE_BYTES", max(tile_bytes, 8))
    tiled = stored(merge(base, adapter=adapter, output=tmp_path / "tiled"))
    for name, value in whole.items():
        assert (tiled[name].float() - value.float()).abs().max() <= 2**-8 * value.float().abs().max()


def test_dtype_is_stored_and_declared(bases: Path, tmp_path: Path) -> None:
    base = base_of(bases, "llama")
    adapter = save_adapter(base, LoraConfig(r=4, target_modules=TARGETS), tmp_path / "adapter")
    exact = stored(merge(base, adapter=adapter, output=tmp_path / "fp32"))
    out = merge(base, adapter=adapter, output=tmp_path / "bf16", dtype="bfloat16")
    assert {tensor.dtype for tensor in stored(out).values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, exact[name].to(torch.bfloat16)) for name, tensor in stored(out).items())
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1e-4, 0.02])
@pytest.mark.parametrize("kind", ["lora", "whole layer"])
def test_what_rounding_loses_of_an_adapter_is_said(kind: str, scale: float, bases: Path, tmp_path: Path) -> None:
    base = base_of(bases, "llama", torch.bfloat16)
    config = LoraConfig(r=4, target_modules=TARGETS) if kind == "lora" else LoHaConfig(r=4, target_modules=TARGETS)
    adapter = save_adapter(base, config, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    small = {name: tensor * scale if "lora_B" in name or "w2_b" in name else tensor for name, tensor in tensors.items()}
    save_file(small, adapter / "adapter_model.safetensors")
    before, exact = stored(base), stored(merge(base, adapter=adapter, output=tmp_path / "exact", dtype="float32"))
    with pytest.warns(UserWarning, match=r"rounding to bfloat16 lost .*--dtype float32") as warned:
        out = merge(base, adapter=adapter, output=tmp_path / "out")
    wanted, kept, num_changed, num_unmoved = 0.0, 0.0, 0, 0
    for name, tensor in stored(out).items():
        change, moved = exact[name].double() - before[name].double(), tensor.double() - before[name].double()
        wanted, kept = wanted + float((change * change).sum()), kept + float((change * moved).sum())
        num_changed += int((change != 0).sum())
        num_unmoved += int(((change != 0) & (moved == 0)).sum())
    (said,) = [str(warning.message) for warning in warned if warning.category is UserWarning]
    assert f"lost {1 - kept / wanted:.0%} of" in said
    assert f"({num_unmoved / num_changed:.0%} of" in said


ADDED = {
    "saved whole": ("llama", LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["embed_tokens", "lm_head"])),
    "saved by themselves": ("llama", LoraConfig(r=4, target_modules=TARGETS)),
    "tied": ("llama tied", LoraConfig(r=4, target_modules=TARGETS)),
    "tied, saved": (
        "llama tied",
        LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True),
    ),
    "adapted": ("llama", LoraConfig(r=4, target_modules=[*TARGETS, "embed_tokens", "lm_head"])),
    "trained tokens": ("llama", LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices=[1, 128, 129])),
}


@pytest.mark.parametrize("case", ADDED)
def test_tokens_that_were_added_for_the_adapter_are_in_the_output(case: str, bases: Path, tmp_path: Path) -> None:
    name, config = ADDED[case]
    base = base_of(bases, *name.split(" ")[:1], changes=TIED if "tied" in name else None)
    torch.manual_seed(3)
    model = resident(base)
    num_tokens = model.config.vocab_size + 2
    model.resize_token_embeddings(num_tokens)
    with quiet_peft():
        trained = adapt(model, config)
        trained.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    out = merge(base, adapter=tmp_path / "adapter", output=tmp_path / "out")
    with quiet_peft():
        merged = trained.merge_and_unload()
    ours = load(out)
    assert ours.config.vocab_size == ours.get_input_embeddings().weight.shape[0] == num_tokens
    assert ours.state_dict().keys() == merged.state_dict().keys()
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits(ours), logits(merged.eval()), rtol=1e-5, atol=1e-5)


def test_added_tokens_that_are_in_no_file_are_named(bases: Path, tmp_path: Path) -> None:
    base, model = base_of(bases, "llama"), resident(base_of(bases, "llama"))
    model.resize_token_embeddings(model.config.vocab_size + 2)
    config = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["embed_tokens"])
    with quiet_peft():
        adapt(model, config).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(UnsupportedError, match=r"without lm_head.weight .*save_embedding_layers=True"):
        merge(base, adapter=tmp_path / "adapter", output=tmp_path / "out")


def test_files_beside_the_weights_come_along_and_the_adapters_tokenizer_wins(tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    adapter = save_adapter(base, LoraConfig(r=4, target_modules=TARGETS), tmp_path / "adapter")
    for name, text in {"tokenizer_config.json": "{}", "tokenizer.json": "{}", "LICENSE": "ours", "code.py": ""}.items():
        (base / name).write_text(text)
    (base / "pytorch_model.bin").write_bytes(b"not read")
    (adapter / "tokenizer_config.json").write_text('{"trained": true}')
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    out = merge(base, adapter=adapter, output=tmp_path / "deep" / "out")
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"trained": True}
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "LICENSE").read_text() == "ours"
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    expected = {"config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "LICENSE"}
    expected |= {"chat_template.jinja", "model.safetensors"}
    assert {file.name for file in out.iterdir()} == expected
    assert (out.stat().st_mode & 0o777) == ((tmp_path / "adapter").stat().st_mode & 0o777)


def test_output_that_is_not_empty_is_refused_and_kept(lora: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = lora
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match=r"output: .* not an empty folder"):
        merge(base, adapter=adapter, output=tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    merge(base, adapter=adapter, output=tmp_path / "empty")
    with pytest.raises(ValueError, match="inside the model's folder"):
        merge(base, adapter=adapter, output=base / "merged")
    assert not (base / "merged").exists()


def test_folder_that_is_no_adapter_is_named(lora: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        merge(lora[0], adapter=tmp_path, output=tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        merge(tmp_path / "nothing", adapter=lora[1], output=tmp_path / "out")


def test_adapter_of_another_model_is_refused(lora: tuple[Path, Path], bases: Path, tmp_path: Path) -> None:
    wider = base_of(bases, "llama", changes={"intermediate_size": 72})
    with pytest.raises(ValueError, match=r"(?s)does not fit the model.*size mismatch"):
        merge(wider, adapter=lora[1], output=tmp_path / "out")
    deeper = save_adapter(
        base_of(bases, "llama", changes={"num_hidden_layers": 5}),
        LoraConfig(r=4, target_modules=TARGETS),
        tmp_path / "deeper",
    )
    with pytest.raises(ValueError, match=r"no place for the adapter's .*layers\.3\..* and \d+ more"):
        merge(lora[0], adapter=deeper, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", ["layers.1.mlp.down_proj.lora_B.weight", "magnitude_vector"])
def test_adapter_that_lacks_a_tensor_is_refused(suffix: str, bases: Path, tmp_path: Path) -> None:
    base = base_of(bases, "llama")
    adapter = save_adapter(base, LoraConfig(r=4, target_modules=TARGETS, use_dora=True), tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    lost = next(name for name in tensors if name.endswith(suffix))
    del tensors[lost]
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"file lacks .*(lora_B|magnitude)"):
        merge(base, adapter=adapter, output=tmp_path / "out")


def test_adapters_without_a_merged_form_are_refused_by_name(lora: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = lora
    text = (adapter / "adapter_config.json").read_text()

    def refused(match: str, **changes: object) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps(json.loads(text) | changes))
        with pytest.raises(UnsupportedError, match=match):
            merge(base, adapter=adapter, output=tmp_path / "out")

    refused("init_lora_weights='pissa'.*path_initial_model_for_weight_conversion", init_lora_weights="pissa")
    refused("alora_invocation_tokens", alora_invocation_tokens=[3], task_type="CAUSAL_LM")
    PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM").save_pretrained(adapter)
    with pytest.raises(UnsupportedError, match=r"merging PrefixTuningConfig \(PREFIX_TUNING\)"):
        merge(base, adapter=adapter, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bias_without_a_place_is_refused(bases: Path, tmp_path: Path) -> None:
    base = base_of(bases, "llama")
    adapter = save_adapter(base, LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True), tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match=r"lora_bias=True into .*q_proj is not supported: the layer has no bias"):
        merge(base, adapter=adapter, output=tmp_path / "out")


def test_quantised_checkpoint_is_refused(lora: tuple[Path, Path], tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="hqq"):
        merge(base, adapter=lora[1], output=tmp_path / "out")


def test_damaged_checkpoint_leaves_nothing(lora: tuple[Path, Path], tmp_path: Path) -> None:
    base = build("llama", tmp_path / "base", dtype=torch.bfloat16)
    shard = sorted(base.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(SourceError, match=shard.name):
        merge(base, adapter=lora[1], output=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}


def test_too_little_room_is_said_before_writing(
    lora: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(TierFull, match=r"needs .* KiB, 1000 B are free"):
        merge(lora[0], adapter=lora[1], output=tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


CHILD = """
    import resource, signal, sys
    from pathlib import Path
    import torch
    import lowmem.adapters.saved_adapter, transformers
    from transformers import AutoModelForCausalLM
    from lowmem.adapters.merge import merge
    from lowmem.host_memory import process_peak_bytes
    from offload import TierFull
    torch.set_num_threads(1)
    small, large = map(Path, sys.argv[1:])
"""


def run_child(program: str, *arguments: Path) -> str:
    code = textwrap.dedent(CHILD) + textwrap.dedent(program)
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_large_embedding(folder: Path, *, vocab_size: int) -> Path:
    """A tied checkpoint that is nearly all embedding table, written without building the model."""
    config = tiny_config("llama", {"vocab_size": vocab_size, "hidden_size": 128, **TIED})
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    outputs = [
        OutputTensor(name=k, dtype=v.dtype, shape=tuple(v.shape)) for k, v in state.items() if k != "lm_head.weight"
    ]
    rows = torch.randn(1 << 20, dtype=torch.float32).bfloat16()
    with ShardFile(folder / "model.safetensors", outputs) as file:
        for output in outputs:
            for start in range(0, output.nbytes // 2, rows.numel()):
                file.write(rows[: output.nbytes // 2 - start])
    return folder


def write_dora_of_embedding(folder: Path, *, vocab_size: int) -> Path:
    LoraConfig(r=1, target_modules=["embed_tokens"], use_dora=True).save_pretrained(folder)
    prefix = "base_model.model.model.embed_tokens."
    tensors = {"lora_embedding_A": torch.randn(1, vocab_size), "lora_embedding_B": torch.randn(128, 1)}
    tensors["lora_magnitude_vector"] = torch.rand(128)
    save_file({prefix + name: value for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def test_full_disk_leaves_nothing_and_memory_is_bounded_by_a_tile(tmp_path: Path) -> None:
    # The table is 128 MiB in bf16, and 256 MiB in fp32, where its DoRA update is computed; the tiles take 15 to 30 MiB.
    # What a first merge imports and allocates once is in the process before.
    vocab_size = 1 << 19
    for name, num_rows in (("small", 1 << 10), ("large", vocab_size)):
        write_large_embedding(tmp_path / name / "base", vocab_size=num_rows)
        write_dora_of_embedding(tmp_path / name / "adapter", vocab_size=num_rows)
    out = run_child(
        """
        merge(small / "base", adapter=small / "adapter", output=small / "out")
        before = process_peak_bytes()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        try:
            merge(large / "base", adapter=large / "adapter", output=large / "out")
        except TierFull as error:
            assert "nothing of it was left" in str(error), error
        else:
            raise SystemExit("the limit was not met")
        assert {path.name for path in large.iterdir()} == {"adapter", "base"}, list(large.iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        merge(large / "base", adapter=large / "adapter", output=large / "out")
        print(process_peak_bytes() - before)
        """,
        tmp_path / "small",
        tmp_path / "large",
    )
    assert int(out) < 64 << 20
    assert (tmp_path / "large" / "out" / "model.safetensors").stat().st_size > 2 * 2 * vocab_size * 128
