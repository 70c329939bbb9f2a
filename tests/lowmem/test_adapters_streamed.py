"""PEFT on a streamed model against PEFT on the resident one: initial values, losses, gradients, an adapter's life."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model, initialize_lora_eva_weights
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.config import BdLoraConfig, EvaConfig, VeloraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lowmem
from lowmem.adapters.dora import FactoredDoraLinear
from lowmem.adapters.support import _EXACT_TYPES
from lowmem.errors import UnsupportedError
from lowmem.models.absent import AbsentParameter
from offload import Budget
from tests.lowmem.tiny_trainers import make
from tests.zoo.architectures import build
from tests.zoo.reference import Outcome, adapt, batch_of, resident, run, trainable
from tests.zoo.streamed import streamed

TARGETS = ["q_proj", "v_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(autouse=True)
def _pefts_own_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    written: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in written:
            written[name] = build(name, tmp_path_factory.mktemp(name))
        return written[name]

    return write


def both(folder: Path, config: Callable[[], PeftConfig]) -> tuple[PeftModel, PeftModel]:
    """The same adapter on the resident and on the streamed model; from the same random numbers each."""
    models = []
    for base in (resident(folder), streamed(folder)):
        torch.manual_seed(3)
        models.append(get_peft_model(base, config()))
    return models[0], models[1]


def equal_values(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = trainable(other), trainable(one)
    assert ours.keys() == theirs.keys()
    for name, param in theirs.items():
        assert torch.equal(ours[name], param), name


def assert_same(ours: Outcome, theirs: Outcome, *, tolerance: float = 0.0) -> None:
    assert ours.gradients.keys() == theirs.gradients.keys()
    assert_near(ours.loss, theirs.loss, tolerance)
    for name, gradient in theirs.gradients.items():
        assert_near(ours.gradients[name], gradient, tolerance)


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


INITS = {
    "lora": {},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "dora of random": {"use_dora": True, "init_lora_weights": False},
    "modules_to_save": {"modules_to_save": ["input_layernorm", "k_proj", "lm_head"]},
    "tokens": {"trainable_token_indices": [4, 7]},
    "experts": {"target_parameters": EXPERTS},
}


@pytest.mark.parametrize("case", INITS)
def test_initial_values_are_the_resident_models(case: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("qwen3_moe" if case == "experts" else "llama")
    targets = ["q_proj"] if case == "experts" else TARGETS
    equal_values(*both(folder, lambda: LoraConfig(r=4, target_modules=targets, **INITS[case])))


def test_initial_magnitude_of_conv1d_is_the_resident_models(checkpoint: Callable[[str], Path]) -> None:
    config = LoraConfig(r=4, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True)
    equal_values(*both(checkpoint("gpt2"), lambda: config))


def test_eva_reads_the_layers_inputs_through_the_stream(checkpoint: Callable[[str], Path]) -> None:
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    models = both(checkpoint("llama"), lambda: config)
    batch = batch_of(4) | {"attention_mask": torch.ones_like(batch_of(4)["input_ids"])}
    for model in models:
        initialize_lora_eva_weights(model, [batch] * 4, show_progress_bar=False)
    equal_values(*models)


OPTIONS = {
    "lora": ("llama", {"target_modules": "all-linear"}),
    "dropout": ("llama", {"target_modules": TARGETS, "lora_dropout": 0.3}),
    "lora_bias": ("llama", {"target_modules": TARGETS, "lora_bias": True}),
    "mica": ("llama", {"target_modules": TARGETS, "init_lora_weights": "mica"}),
    "patterns": ("llama", {"target_modules": TARGETS, "rank_pattern": {"q_proj": 2}, "layers_to_transform": [0, 2]}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["mlp", "norm", "embed_tokens"]}),
    "tokens": ("llama", {"target_modules": TARGETS, "trainable_token_indices": [4, 7]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "block diagonal": (
        "llama",
        {"target_modules": ["down_proj"], "use_bdlora": BdLoraConfig(target_modules_bd_a=["down_proj"], nblocks=2)},
    ),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts stored together": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_losses_and_gradients_equal_the_resident_models_bitwise(case: str, checkpoint: Callable[[str], Path]) -> None:
    name, options = OPTIONS[case]
    folder, batch = checkpoint(name), batch_of()
    outcomes = []
    for base in (resident(folder), streamed(folder)):
        torch.manual_seed(3)
        model = adapt(base, LoraConfig(r=4, task_type="CAUSAL_LM", **options))
        torch.manual_seed(5)
        outcomes.append(run(model, batch))
    assert outcomes[0].gradients
    assert_same(outcomes[1], outcomes[0])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("targets", [TARGETS, ["q_proj", "embed_tokens"]])
def test_dora_equals_the_resident_models_to_rounding(
    targets: list[str], dropout: float, checkpoint: Callable[[str], Path]
) -> None:
    folder, batch = checkpoint("llama"), batch_of()
    outcomes = []
    for base in (resident(folder), streamed(folder)):
        torch.manual_seed(3)
        model = adapt(base, LoraConfig(r=4, use_dora=True, target_modules=targets, lora_dropout=dropout))
        torch.manual_seed(5)
        outcomes.append(run(model, batch))
    assert isinstance(base.model.layers[0].self_attn.q_proj.lora_variant["default"], FactoredDoraLinear)
    assert_same(outcomes[1], outcomes[0], tolerance=1e-5)


OTHERS: dict[str, dict[str, object]] = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 40},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "MISS": {"r": 4},
    "PSOFT": {"r": 4},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2, "random_seed": 0},
    "TRAINABLE_TOKENS": {"token_indices": [4, 7], "target_modules": ["embed_tokens"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "r": 2, "topk": 2},
    "WAVEFT": {"n_frequency": 40},
}


COMMON = {"ADALORA", "IA3", "LN_TUNING", "LOKR", "OFT", "PROMPT_TUNING", "TRAINABLE_TOKENS", "VBLORA", "VERA"}
"""Run on every change; the others with --slow."""


@pytest.mark.parametrize(
    "peft_type",
    [pytest.param(t, marks=() if t in COMMON else pytest.mark.slow) for t in sorted(_EXACT_TYPES - {"LORA"})],
)
def test_every_allowed_type_equals_the_resident_model(peft_type: str, checkpoint: Callable[[str], Path]) -> None:
    options = {"task_type": "CAUSAL_LM"} | OTHERS.get(peft_type, {})
    if "TUNING" not in peft_type:
        options.setdefault("target_modules", list(TARGETS))
    folder, batch = checkpoint("llama"), batch_of()
    outcomes = []
    for base in (resident(folder), streamed(folder)):
        torch.manual_seed(3)
        model = adapt(base, PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](**options))
        torch.manual_seed(5)
        outcomes.append(run(model, batch))
    assert outcomes[0].gradients
    # Adapters whose parameters are shared between blocks sum their gradients in another order.
    assert_same(outcomes[1], outcomes[0], tolerance=1e-5 if peft_type in {"UNILORA", "VBLORA"} else 0.0)


def test_refusal_comes_as_the_adapter_does_and_with_a_forward(checkpoint: Callable[[str], Path]) -> None:
    model = streamed(checkpoint("llama"))
    config = LoraConfig(r=4, target_modules=TARGETS, velora_config=VeloraConfig(num_groups=4))
    with pytest.raises(UnsupportedError, match="velora_config"):
        get_peft_model(model, config)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS))
    adapted.peft_config["default"] = config
    with pytest.raises(UnsupportedError, match="velora_config"):
        adapted(**batch_of())


def test_adapters_are_added_switched_combined_and_deleted_as_on_the_resident_model(
    checkpoint: Callable[[str], Path],
) -> None:
    batch = batch_of()
    outcomes: list[list[Outcome]] = []
    for base in (resident(checkpoint("llama")), streamed(checkpoint("llama"))):
        model = adapt(base, LoraConfig(r=4, target_modules=TARGETS))
        seen = [run(model, batch)]
        torch.manual_seed(11)
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
        seen.append(run(model, batch))
        model.set_adapter("second")
        seen.append(run(model, batch))
        model.base_model.set_adapter(["default", "second"])
        seen.append(run(model, batch))
        model.delete_adapter("default")
        model.set_adapter("second")
        seen.append(run(model, batch))
        outcomes.append(seen)
    losses = [float(outcome.loss) for outcome in outcomes[0]]
    assert losses[0] == losses[1]
    assert losses[2] == losses[4]
    assert len(set(losses)) == 3
    for theirs, ours in zip(*outcomes, strict=True):
        assert_same(ours, theirs)


def test_dora_added_later_gets_the_factored_norm(checkpoint: Callable[[str], Path]) -> None:
    model = get_peft_model(streamed(checkpoint("llama")), LoraConfig(r=4, target_modules=TARGETS))
    run(model, batch_of())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    model.set_adapter("second")
    run(model, batch_of())
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    assert isinstance(layer.lora_variant["second"], FactoredDoraLinear)


@pytest.mark.parametrize("use_dora", [False, True])
def test_disabled_adapter_gives_the_base_model(use_dora: bool, checkpoint: Callable[[str], Path]) -> None:
    folder, batch = checkpoint("llama"), batch_of()
    model = adapt(streamed(folder), LoraConfig(r=4, target_modules=TARGETS, use_dora=use_dora)).eval()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**batch).logits, resident(folder)(**batch).logits)
    with torch.no_grad():
        assert not torch.equal(model(**batch).logits, resident(folder)(**batch).logits)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head", "input_layernorm"]},
        {"trainable_token_indices": [4, 7]},
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ],
    ids=["dora", "modules_to_save", "tokens", "experts"],
)
def test_saved_adapter_is_loaded_onto_a_streamed_model_and_trains_on(
    options: dict[str, object], low_cpu_mem_usage: bool, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, batch = checkpoint("qwen3_moe" if "target_parameters" in options else "llama"), batch_of()
    arguments = {"r": 4, "target_modules": TARGETS} | options
    adapt(streamed(folder), LoraConfig(**arguments)).save_pretrained(tmp_path)
    outcomes = []
    for base in (resident(folder), streamed(folder)):
        model = PeftModel.from_pretrained(base, tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
        outcomes.append(run(model.train(), batch))
    assert outcomes[0].gradients
    assert_same(outcomes[1], outcomes[0], tolerance=1e-5 if "use_dora" in options else 0.0)


def test_prompt_tuning_survives_saving(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    before = adapt(streamed(checkpoint("llama")), config).eval()
    before.save_pretrained(tmp_path)
    after = PeftModel.from_pretrained(streamed(checkpoint("llama")), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(after(**batch_of()).logits, before(**batch_of()).logits)


@pytest.mark.parametrize("use_dora", [False, True])
def test_loraplus_is_pefts_own_optimizer(use_dora: bool, checkpoint: Callable[[str], Path]) -> None:
    batch = batch_of()
    models = []
    for base in (resident(checkpoint("llama")), streamed(checkpoint("llama"))):
        model = adapt(base, LoraConfig(r=4, target_modules=TARGETS, use_dora=use_dora))
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
        rates = {
            "B" if any(param is value for name, value in trainable(model).items() if "lora_B" in name) else "A": group[
                "lr"
            ]
            for group in optimizer.param_groups
            for param in group["params"][:1]
        }
        assert rates == {"A": 1e-3, "B": 16e-3}
        for _ in range(3):
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    for name, param in trainable(models[0]).items():
        assert_near(trainable(models[1])[name].detach(), param.detach(), 1e-5 if use_dora else 0.0)


def test_merging_into_absent_weights_is_refused(checkpoint: Callable[[str], Path]) -> None:
    model = adapt(streamed(checkpoint("llama")), LoraConfig(r=4, target_modules=TARGETS))
    with pytest.raises(UnsupportedError, match=r"lowmem\.merge|frozen"):
        model.merge_and_unload()


def test_merging_is_refused_before_any_of_the_adapter_is_gone(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = checkpoint("llama")
    # The table and the head are in memory, and PEFT would merge and unload the first before it met an absent weight.
    config = LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"], init_lora_weights=False)
    model = get_peft_model(streamed(folder), config)
    before = {name: param.detach().clone() for name, param in trainable(model).items()}
    head = model.get_base_model().lm_head.get_base_layer().weight.detach().clone()
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(UnsupportedError, match=r"never written. Instead: .*lowmem.merge\("):
            merge()
    after = trainable(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(model.get_base_model().lm_head.get_base_layer().weight, head)
    model.save_pretrained(tmp_path / "adapter")
    lowmem.merge(folder, adapter=tmp_path / "adapter", output=tmp_path / "merged")
    plain = PeftModel.from_pretrained(resident(folder), tmp_path / "adapter")
    merged = plain.merge_and_unload().state_dict()
    for name, value in resident(tmp_path / "merged").state_dict().items():
        assert torch.equal(value, merged[name]), name
    assert any("lora" in name for name, _ in model.unload().named_parameters()) is False


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head"]])
def test_initialisation_that_changes_the_base_is_refused_before_it_does(
    init: str, targets: list[str], checkpoint: Callable[[str], Path]
) -> None:
    model = streamed(checkpoint("llama"))
    head = model.lm_head.weight.detach().clone()
    with pytest.raises(UnsupportedError, match=rf"init_lora_weights='{init}' is not supported: .*Instead: .*'eva'"):
        get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=init))
    assert torch.equal(model.lm_head.weight, head)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_an_adapter_in_the_models_folder_is_refused_or_merged(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    model = get_peft_model(resident(base), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, base / name)
    for folder, match in ((base, "an adapter lies beside its weights"), (tmp_path / "adapter", "folder of an adapter")):
        with pytest.raises(UnsupportedError, match=rf"{match}.*PeftModel.from_pretrained"):
            lowmem.from_pretrained(folder, device="cpu")
        with pytest.raises(UnsupportedError, match=match):
            lowmem.plan(folder, seq_len=8, device="cpu")
    with pytest.raises(UnsupportedError, match="beside its weights"):
        lowmem.merge(base, adapter=tmp_path / "adapter", output=tmp_path / "out")
    # transformers applies it, so a merge of the folder with itself must be the model that transformers makes of it.
    merged = resident(lowmem.merge(base, adapter=base, output=tmp_path / "out"))
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert_near(merged(tokens).logits, expected(tokens).logits, 1e-5)
        assert (expected(tokens).logits - model.get_base_model()(tokens).logits).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_a_reference_is_never_the_policy_where_peft_keeps_its_flags_elsewhere(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enable(layer: BaseTunerLayer, enabled: bool) -> None:
        layer._off = not enabled

    monkeypatch.setattr(BaseTunerLayer, "_off", False, raising=False)
    monkeypatch.setattr(BaseTunerLayer, "disable_adapters", property(lambda layer: layer._off))
    monkeypatch.setattr(BaseTunerLayer, "enable_adapters", enable)
    # The first step's reference has a pass of its own; the second's would be the policy's hidden states.
    trainer = make("dpo", streamed(checkpoint("llama")), tmp_path, max_steps=2)
    with pytest.raises(UnsupportedError, match=r"peft .* keeps which adapters are active elsewhere"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("saves", [["embed_tokens", "lm_head"], None])
def test_tokens_added_for_an_adapter_are_trained_saved_and_merged(
    saves: list[str] | None, on_disk: bool, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = checkpoint("llama")
    plan = lowmem.plan(folder, seq_len=8, budget=Budget(device="64MiB", host="64MiB"), device="cpu")
    plan = dataclasses.replace(plan, choice=dataclasses.replace(plan.choice, embedding_on_disk=on_disk))
    ours = lowmem.from_pretrained(folder, plan=plan, device="cpu")
    assert isinstance(ours.get_input_embeddings().weight, AbsentParameter) == on_disk
    config = LoraConfig(r=4, target_modules=TARGETS, modules_to_save=saves, trainable_token_indices=None)
    if saves is None:
        config.trainable_token_indices = [128, 129]
    models = []
    for model in (resident(folder), ours):
        torch.manual_seed(3)
        model.resize_token_embeddings(130, mean_resizing=False)
        models.append(get_peft_model(model, config))
        optimizer = torch.optim.SGD([p for p in models[-1].parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            tokens = torch.tensor([[5, 128, 7, 129, 9, 3]])
            models[-1](input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    plain, adapted = models
    for name, param in trainable(plain).items():
        torch.testing.assert_close(trainable(adapted)[name], param, rtol=1e-5, atol=1e-6)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = resident(lowmem.merge(folder, adapter=tmp_path / "adapter", output=tmp_path / "merged"))
    assert merged.config.vocab_size == 130
    with torch.no_grad():
        expected = plain.merge_and_unload()(tokens).logits
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-5)
