"""Options of from_pretrained and plan: those a plan brings, and one sentence with the remedy for what is refused."""

import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import lowmem
from lowmem.models.checkpoint import pick_device, resolve
from offload import BudgetError
from tests.lowmem.tiny_training import streamed
from tests.zoo.architectures import build

BUDGET = lowmem.Budget(device="64MiB", host="0")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"device_map": "auto"}, r"device_map='auto' is not supported.*budget=lowmem\.Budget\("),
        ({"max_memory": {0: "6GiB"}}, r"budget=lowmem\.Budget\("),
        ({"offload_folder": "x"}, r"budget=lowmem\.Budget\(disk="),
        ({"torch_dtype": torch.float32}, r"torch_dtype=torch.float32 is not supported.*Instead: dtype="),
        ({"load_in_4bit": True}, r"load_in_4bit=True.*Instead: quantization="),
        ({"load_in_8bit": True}, r"load_in_8bit=True.*Instead: quantization="),
        ({"quantization_config": object()}, r"quantization_config=.*Instead: quantization="),
        ({"low_cpu_mem_usage": True}, r"Instead: leave it out"),
        ({"cache_dir": "x"}, r"HF_HOME"),
        ({"local_files_only": True}, r"HF_HUB_OFFLINE=1"),
        ({"token": "x"}, r"HF_TOKEN"),
        ({"full_finetuning": True}, r'tuning="full"'),
        ({"device": "auto"}, r"device='auto' is not supported.*without device=, the GPU is taken if there is one"),
        ({"device": "gpu"}, r"device='gpu' is not supported"),
        ({"device": "mps"}, r"device='mps' is not supported"),
        ({"attn_implementation": "fast"}, r"attn_implementation='fast' is not supported.*\"sdpa\" or \"eager\""),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_other_loaders_take_is_refused_with_the_remedy(
    options: dict[str, object], remedy: str, llama: Path
) -> None:
    with pytest.raises(lowmem.UnsupportedError, match=remedy):
        lowmem.from_pretrained(llama, **({"budget": BUDGET} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "hint"), [("micro_batches", "did you mean micro_batch="), ("zzz", "it takes plan, budget, tuning")]
)
def test_an_option_that_nobody_knows_is_one_sentence(option: str, hint: str, llama: Path) -> None:
    with pytest.raises(TypeError, match=rf"no option '{option}': {hint}"):
        lowmem.from_pretrained(llama, **{option: 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", ["6GB", 6 << 30, {"device": "6GB"}])
def test_a_budget_that_is_no_budget_is_refused_by_both(budget: object, llama: Path) -> None:
    with pytest.raises(TypeError, match=r"budget=.*expected lowmem\.Budget\(device="):
        lowmem.from_pretrained(llama, budget=budget)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"budget=.*expected lowmem\.Budget\(device="):
        lowmem.plan(llama, seq_len=8, budget=budget)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda", 3)])
def test_a_gpu_that_is_not_there_is_named(device: torch.device | str) -> None:
    with pytest.raises(lowmem.UnsupportedError, match=r"torch finds no GPU here.*device=\"cpu\", or leave it out"):
        pick_device(device)


def test_a_home_folder_is_found(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(llama.parent))
    assert streamed(Path("~") / llama.name).num_parameters() > 0  # type: ignore[operator]
    with pytest.raises(FileNotFoundError, match=rf"{llama.parent}/none: no such folder"):
        streamed(Path("~/none"))


def test_a_folder_that_holds_an_adapter_names_its_model_and_the_way(llama: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        lowmem.UnsupportedError, match=r"folder of an adapter, not of a model.*llama.*PeftModel.*is_trainable"
    ):
        streamed(tmp_path / "adapter")
    os.remove(tmp_path / "adapter" / "adapter_config.json")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        streamed(tmp_path / "adapter")


def test_device_and_dtype_come_from_the_plan(llama: Path) -> None:
    plan = lowmem.plan(llama, seq_len=8, device="cpu", dtype="bfloat16", budget=BUDGET)
    assert lowmem.from_pretrained(llama, plan=plan).dtype == torch.bfloat16


@pytest.mark.parametrize("tuning", ["adapter", "full"])
def test_a_plan_of_this_model_is_taken(tuning: str, llama: Path) -> None:
    budget = lowmem.Budget(device="64MiB", host="64MiB")
    plan = lowmem.plan(llama, seq_len=8, device="cpu", tuning=tuning, budget=budget)  # type: ignore[arg-type]
    lowmem.from_pretrained(llama, plan=plan, tuning=tuning)  # type: ignore[arg-type]


def test_a_plan_for_another_dtype_model_or_tuning_is_refused_naming_both(llama: Path, tmp_path: Path) -> None:
    plan = lowmem.plan(llama, seq_len=8, device="cpu", budget=BUDGET)
    with pytest.raises(ValueError, match=r"with dtype: float32, and .* is opened with bfloat16; plan with the same"):
        lowmem.from_pretrained(llama, plan=plan, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"with tuning: adapter, and .* is opened with full"):
        lowmem.from_pretrained(llama, plan=plan, tuning="full")
    other = Path(build("mixtral", tmp_path / "other"))
    with pytest.raises(
        ValueError, match=rf"the plan is for {llama} with bytes of the blocks: \d+, and {other} is opened"
    ):
        lowmem.from_pretrained(other, plan=plan)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
def test_a_plan_for_another_device_is_refused(llama: Path) -> None:
    plan = lowmem.plan(llama, seq_len=8, device="cpu", budget=BUDGET)
    with pytest.raises(ValueError, match="with device: cpu"):
        lowmem.from_pretrained(llama, plan=plan, device="cuda")


@pytest.mark.parametrize("options", [{}, {"micro_batch": 1}, {"chunk_tokens": 4}], ids=["whole", "rows", "chunks"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_the_one_asked_for_and_trains_as_the_plain_model_does(
    attention: str, options: dict[str, object], llama: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation=attention)
    ours = streamed(llama, attn_implementation=attention, **options)
    assert ours.config._attn_implementation.removeprefix("lowmem_") == plain.config._attn_implementation == attention
    ids = torch.arange(1, 41).view(4, 10)
    results = []
    for model in (plain, ours):
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = {name: param.grad for name, param in adapted.named_parameters() if param.grad is not None}
        results.append((loss.detach(), grads))
    (expected, grads), (found, ours_grads) = results
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert grads.keys() == ours_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(ours_grads[name], grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_tokens": "8"}, "chunk_tokens='8': expected a whole number"),
        ({"micro_batch": 1.5}, "micro_batch=1.5: expected a whole number"),
        ({"num_labels": "2"}, "num_labels='2': expected a whole number"),
        ({"plan": "x", "budget": None}, r"plan: expected what lowmem\.plan returns, got str"),
    ],
    ids=str,
)
def test_values_of_another_type_are_one_sentence(options: dict[str, object], message: str, llama: Path) -> None:
    with pytest.raises(TypeError, match=message):
        lowmem.from_pretrained(llama, **({"budget": BUDGET} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": "512"}, "seq_len='512': expected a whole number"),
        ({"seq_len": 512.5}, "seq_len=512.5: expected a whole number"),
        ({"seq_len": 8, "peft_config": {"r": 8}}, "peft_config: expected one of PEFT's"),
    ],
    ids=str,
)
def test_a_plan_of_values_of_another_type_is_one_sentence(
    options: dict[str, object], message: str, llama: Path
) -> None:
    with pytest.raises(TypeError, match=message):
        lowmem.plan(llama, budget=BUDGET, **options)  # type: ignore[arg-type]


def test_a_loaded_model_is_no_folder() -> None:
    with pytest.raises(TypeError, match="model: expected a folder or a hub id, got Linear"):
        lowmem.from_pretrained(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_dtype_auto_is_the_stored_one_as_in_transformers(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "m", dtype=torch.bfloat16)
    assert lowmem.from_pretrained(folder, budget=BUDGET, device="cpu", dtype="auto").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16


def test_prompts_that_a_streamed_model_cannot_take_are_refused_before_peft_looks_at_it(llama: Path) -> None:
    model = lowmem.from_pretrained(llama, budget=BUDGET, device="cpu")
    with pytest.raises(lowmem.UnsupportedError, match="PREFIX_TUNING"):
        get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))


def test_a_folder_that_cannot_be_written_to_is_said_before_anything_is_loaded(llama: Path) -> None:
    budget = lowmem.Budget(device="64MiB", host="0", disk="/proc/lowmem")
    job: dict[str, object] = {"seq_len": 8, "tuning": "full", "device": "cpu"}
    smallest = lowmem.plan(llama, **job, budget=lowmem.Budget(device=0, host=0, disk="/proc/lowmem"))
    plan = lowmem.plan(
        llama, **job, budget=lowmem.Budget(device=smallest.smallest_device_bytes, host=0, disk="/proc/lowmem")
    )
    assert plan.choice.state_tier == "disk"
    with pytest.raises(ValueError, match=r"^Budget\.disk: /proc/lowmem cannot be written to \(.+\); give a folder"):
        lowmem.from_pretrained(llama, tuning="full", plan=plan)
    assert lowmem.from_pretrained(llama, tuning="full", budget=budget, device="cpu"), "nothing is written there"


@pytest.mark.parametrize("name", ["out/checkpoint-3", "checkpoint-3", "./out"])
def test_a_missing_folder_of_a_trainer_is_no_hub_repository(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder; give a local folder"):
        resolve(name)


def test_a_missing_folder_says_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "llama-1b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"neither a local folder \(models has llama-1b\) nor a hub"):
        resolve("models/llama-2b")


def test_the_sentences_of_a_budget_that_is_too_small_are_sentences(llama: Path) -> None:
    plan = lowmem.plan(llama, seq_len=64, batch_size=4, budget=lowmem.Budget(device=1024, host=0), device="cpu")
    with pytest.raises(BudgetError) as caught:
        plan.require_fit()
    assert "; " not in str(caught.value).replace("; gradient_accumulation_steps", "")
