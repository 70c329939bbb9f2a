"""Plans of real checkpoints: every size is read from headers and modules, nothing is loaded, nothing is changed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import lowmem
from lowmem.api import from_pretrained, plan
from lowmem.errors import UnsupportedError
from lowmem.models.checkpoint import Opened, open_checkpoint
from lowmem.planning.dry_run import dry_run
from lowmem.planning.planner import plan_for
from lowmem.planning.read_model import corrected, describe_adapter, read_shapes
from lowmem.planning.step_time import Rates
from offload import Budget, Placement, SafetensorsSource, SourceError
from tests.lowmem.block_peak import config_of, measure
from tests.lowmem.sparse_checkpoint import write_sparse
from tests.zoo.architectures import build

BUDGET = Budget(device="1GiB", host="0")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 1.1B model that takes no room on disk."""
    config = LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=22,
        intermediate_size=5632,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
    )
    return write_sparse(tmp_path_factory.mktemp("large"), config)


def opened(folder: Path, *, dtype: torch.dtype = torch.float32) -> Opened:
    return open_checkpoint(folder, name="model", device=torch.device("cpu"), dtype=dtype)


@pytest.mark.parametrize(
    "arguments",
    [
        {"r": 4, "target_modules": "all-linear"},
        {"r": 8, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "target_modules": "all-linear", "use_dora": True},
        {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
        {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"r": 4, "target_modules": "all-linear", "init_lora_weights": "pissa"},
    ],
    ids=["lora", "targets", "dora", "modules_to_save", "layers", "pissa"],
)
def test_adapters_are_counted_as_peft_makes_them(llama: Path, arguments: dict[str, Any]) -> None:
    shapes = read_shapes(opened(llama), peft_config=LoraConfig(**arguments))
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    # Which values an adapter starts from changes none of its sizes, and some starts are slow.
    peft_model = get_peft_model(model, LoraConfig(**{**arguments, "init_lora_weights": True}))
    trainable = [param for param in peft_model.parameters() if param.requires_grad]
    assert shapes.num_adapter_params == sum(param.numel() for param in trainable)
    assert shapes.adapter_bytes == sum(param.nbytes for param in trainable)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_a_plan_says_where_sequences_exceed_the_positions_that_the_model_has(name: str, tmp_path: Path) -> None:
    folder = build(name, tmp_path)
    longest = AutoConfig.from_pretrained(folder).get_text_config().max_position_embeddings
    for fits in (True, False):
        budget = BUDGET if fits else Budget(device="1KiB", host="0")
        within, beyond = (
            plan(folder, seq_len=seq_len, budget=budget, device="cpu") for seq_len in (longest, longest + 1)
        )
        assert within.fits == beyond.fits == fits
        assert not any("max_position_embeddings" in sentence for sentence in within.advice)
        (notice,) = [sentence for sentence in beyond.advice if "max_position_embeddings" in sentence]
        assert f"Sequences of {longest + 1} tokens exceed this model's {longest} positions" in notice
        assert notice in str(beyond)


def test_a_model_that_names_no_longest_sequence_has_none(tmp_path: Path) -> None:
    assert read_shapes(opened(build("bloom", tmp_path))).max_positions is None


def test_block_sizes_are_those_of_the_file(llama: Path) -> None:
    shapes = read_shapes(opened(llama))
    with SafetensorsSource(llama) as source:
        stored = {name: spec.nbytes for name, spec in source.tensors.items()}
    for index, block in enumerate(shapes.blocks):
        nbytes = sum(size for name, size in stored.items() if f"layers.{index}." in name)
        assert nbytes <= block.buffer_bytes < nbytes + 4 * 4096
        assert block.num_params == nbytes // 2
        assert block.workspace_bytes >= block.num_params * 4
    assert shapes.embedding_stored_bytes == stored["model.embed_tokens.weight"]


def test_a_block_in_its_compute_dtype_needs_no_workspace(llama: Path) -> None:
    assert read_shapes(opened(llama, dtype=torch.bfloat16)).workspace_bytes == 0


def test_experts_are_counted_by_what_a_token_goes_through(tmp_path: Path) -> None:
    shapes = read_shapes(opened(build("mixtral", tmp_path)))
    block = shapes.blocks[0]
    assert block.experts is not None
    assert (block.experts.num_experts, block.experts.num_per_token) == (4, 2)
    experts = 4 * 3 * 32 * block.experts.product_size
    assert block.num_params - block.num_active_params == experts // 2


def test_tied_embeddings_are_counted_once(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=1, intermediate_size=48, num_attention_heads=4, vocab_size=64
    )
    config.tie_word_embeddings = True
    shapes = read_shapes(opened(write_sparse(tmp_path, config)))
    assert (shapes.embedding_bytes, shapes.head_bytes) == (0, 64 * 32 * 4)
    assert not shapes.embedding_gatherable


def test_planning_leaves_the_checkpoint_and_the_random_state_alone(llama: Path) -> None:
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in llama.iterdir()}
    state = torch.random.get_rng_state()
    plan(llama, batch_size=2, seq_len=16, peft_config=LoraConfig(r=4, target_modules="all-linear"), budget=BUDGET)
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in llama.iterdir()} == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_planning_does_not_change_the_users_configuration(llama: Path) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="orthogonal")
    before = lora.to_dict()
    plan(llama, seq_len=16, peft_config=lora, budget=BUDGET)
    assert lora.to_dict() == before


def test_a_plan_without_an_adapter_assumes_one_and_says_so(llama: Path) -> None:
    made = plan(llama, seq_len=16, budget=BUDGET)
    assert "r=16" in made.adapter
    assert "assumed" in made.adapter
    assert made.bytes_of("adapters") > 0
    assert plan(llama, task="generate", seq_len=16, budget=BUDGET).bytes_of("adapters") == 0


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe"])
def test_the_adapter_that_is_assumed_is_what_peft_makes_of_all_linear(name: str, tmp_path: Path) -> None:
    folder = build(name, tmp_path)
    given = LoraConfig(r=16, target_modules="all-linear")
    assumed, told = (plan(folder, seq_len=16, budget=BUDGET, peft_config=config) for config in (None, given))
    assert (assumed.num_trainable, assumed.device_bytes) == (told.num_trainable, told.device_bytes)


@pytest.mark.parametrize("task", ["sft", "dpo", "kto", "reward", "grpo", "rloo", "generate"])
def test_every_task_can_be_planned(llama: Path, task: str) -> None:
    made = plan(llama, task=task, batch_size=2, seq_len=16, budget=BUDGET)
    assert made.fits
    assert made.step_s > 0


def test_missing_budgets_are_measured(llama: Path) -> None:
    made = plan(llama, seq_len=16)
    assert made.fits
    assert made.device_budget_bytes > 1 << 28
    given = plan(llama, seq_len=16, budget=Budget(device="64MiB"))
    assert given.device_budget_bytes == 64 << 20
    assert given.host_budget_bytes > 0


def test_rates_are_assumed_measured_or_given(llama: Path) -> None:
    assert plan(llama, seq_len=16, budget=BUDGET).rates.measured == ()
    measured = plan(llama, seq_len=16, budget=BUDGET, rates="measure").rates
    assert measured.measured == ("disk", "copy", "compute")
    given = Rates(disk_bytes_per_s=123.0)
    assert plan(llama, seq_len=16, budget=BUDGET, rates=given).rates is given
    with pytest.raises(ValueError, match="rates='fast'"):
        plan(llama, seq_len=16, budget=BUDGET, rates="fast")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tuning": "half"}, "tuning='half' is not supported"),
        ({"quantization": "nf3"}, "quantization='nf3' is not supported"),
        ({"device": "mps"}, "device='mps' is not supported"),
        ({"dtype": "int8"}, "dtype="),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(llama: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        plan(llama, seq_len=16, budget=BUDGET, **arguments)


def test_damaged_checkpoints_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        plan(tmp_path / "none", seq_len=16)
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = max(tmp_path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(SourceError, match=shard.name):
        plan(tmp_path, seq_len=16, budget=BUDGET)


def test_a_billion_parameters_train_in_1200_mib(large: Path) -> None:
    lora = LoraConfig(r=16, target_modules="all-linear")
    made = plan(large, seq_len=512, peft_config=lora, budget=Budget(device="1200MiB", host="0"))
    assert made.fits
    assert made.smallest_device_bytes < 1100 << 20
    assert made.embedding_on_disk
    # The block, in bf16: 2048 x (2048 x 2 + 256 x 2 + 5632 x 3) weights and two norms.
    assert read_shapes(opened(large)).blocks[0].num_params == 2048 * (2 * 2048 + 2 * 256 + 3 * 5632) + 2 * 2048


def test_a_batch_of_eight_fits_in_1900_mib(large: Path) -> None:
    lora = LoraConfig(r=16, target_modules="all-linear")
    made = plan(large, batch_size=8, seq_len=512, peft_config=lora, budget=Budget(device="1900MiB", host="0"))
    assert made.fits
    assert made.passes == 2


def test_plan_for_leaves_the_model_as_it_was(llama: Path) -> None:
    checkpoint = opened(llama)
    model = checkpoint.built.model
    before = {name: (value.shape, value.device) for name, value in model.state_dict().items()}
    training = model.training
    made = plan_for(checkpoint, budget=BUDGET)
    assert made.fits
    assert {name: (value.shape, value.device) for name, value in model.state_dict().items()} == before
    assert model.training == training
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_plan_for_takes_shorter_sequences_where_memory_is_short(llama: Path) -> None:
    checkpoint = opened(llama)
    roomy = plan_for(checkpoint, budget=BUDGET)
    tight = plan_for(checkpoint, budget=Budget(device=roomy.smallest_device_bytes - 1, host="0"))
    assert tight.fits
    assert tight.seq_len < roomy.seq_len
    tighter = plan_for(checkpoint, budget=Budget(device="400KiB", host="0"))
    assert tighter.fits
    assert (roomy.adapter, tighter.adapter) == ("LoRA r=16 on all linear layers (assumed)", "none")


def test_a_model_can_be_loaded_by_its_plan(llama: Path) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear")
    least = lowmem.plan(llama, seq_len=16, peft_config=lora, budget=Budget(device="0", host="0")).smallest_device_bytes
    made = lowmem.plan(llama, seq_len=16, peft_config=lora, budget=Budget(device=least, host="0"))
    assert made.fits
    assert Placement.STREAMED in made.placements
    model = from_pretrained(llama, plan=made)
    with torch.no_grad():
        assert model(input_ids=torch.ones(1, 16, dtype=torch.long)).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_a_dry_run_counts_what_a_real_one_takes(kind: str, tmp_path: Path) -> None:
    config = config_of(kind, hidden=128, mlp=352, heads=4, key_heads=2, head_dim=32)
    lora = LoraConfig(r=8, target_modules="all-linear")
    checkpoint = opened(write_sparse(tmp_path, config, dtype=torch.float32))
    read_shapes(checkpoint, peft_config=lora)
    (counted,) = dry_run(checkpoint.built, num_sequences=1, seq_len=128)
    found = measure(config, num_sequences=1, seq_len=128, lora=lora)
    assert 0.98 * found.peak_bytes <= counted <= 1.2 * found.peak_bytes


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_the_formula_is_corrected_where_a_dry_run_knows_better(name: str, tmp_path: Path) -> None:
    checkpoint = opened(build(name, tmp_path))
    shapes = read_shapes(checkpoint, peft_config=LoraConfig(r=4, target_modules="all-linear"))
    assert {block.correction for block in shapes.blocks} == {1.0}
    assert max(block.correction for block in corrected(shapes, checkpoint, seq_len=64).blocks) > 1


def test_a_dry_run_that_cannot_be_followed_leaves_the_formula(tmp_path: Path) -> None:
    checkpoint = opened(build("dbrx", tmp_path))
    with pytest.raises(NotImplementedError, match="Dbrx"):
        dry_run(checkpoint.built, num_sequences=1, seq_len=8)
    shapes = read_shapes(checkpoint)
    assert corrected(shapes, checkpoint, seq_len=8) is shapes


def test_adapters_are_named_in_words() -> None:
    assert describe_adapter(None) == "none"
    assert describe_adapter(LoraConfig(r=8, target_modules="all-linear")) == "LoRA r=8 on all-linear"
    dora = LoraConfig(r=4, target_modules=["q_proj", "k_proj"], use_dora=True, lora_dropout=0.1)
    assert describe_adapter(dora) == "DoRA r=4 on k_proj, q_proj, dropout 0.1"
    stacks = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    assert describe_adapter(stacks) == "LoRA r=4 on q_proj and mlp.experts.gate_up_proj"


def test_no_warning_reaches_the_user(llama: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan(llama, seq_len=16, peft_config=LoraConfig(r=4, target_modules="all-linear"), budget=BUDGET)
