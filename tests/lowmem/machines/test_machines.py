"""Plans for machines that are not here: cards by name, no device touched, changes that make a job fit."""

from __future__ import annotations

import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, Qwen3MoeConfig

import lowmem
import lowmem.api  # imports bitsandbytes, which looks for a card
from lowmem.machines.cards import CARDS, find_card
from lowmem.machines.scaling import scaling_of
from lowmem.planning.plan import Plan
from offload import format_bytes

GIB = 1 << 30
RTX_4090 = lowmem.Machine(gpu="RTX 4090", ram="64GiB", disk_gbps=7)
LARGE = {
    "70b": LlamaConfig(
        hidden_size=8192,
        num_hidden_layers=80,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ),
    "235b": Qwen3MoeConfig(
        hidden_size=4096,
        num_hidden_layers=94,
        moe_intermediate_size=1536,
        num_experts=128,
        num_experts_per_tok=8,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=151936,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that hold config.json and nothing else."""
    small = LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=22,
        intermediate_size=5632,
        num_attention_heads=32,
        num_key_value_heads=4,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    found = {}
    for name, config in {**LARGE, "1.1b": small}.items():
        found[name] = tmp_path_factory.mktemp(name)
        config.save_pretrained(found[name])
        (found[name] / "generation_config.json").unlink(missing_ok=True)
    return found


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks for a graphics card fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a device was looked at")

    for name in ("is_available", "device_count", "current_device", "mem_get_info", "is_bf16_supported", "init"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    monkeypatch.setattr("torch.cuda._lazy_init", refuse)


@pytest.mark.parametrize("model", LARGE)
@pytest.mark.usefixtures("no_device")
def test_the_largest_models_are_planned_from_their_configuration_in_no_time(
    model: str, models: dict[str, Path]
) -> None:
    start_s = time.process_time()
    plan = lowmem.plan(models[model], seq_len=2048, machine=RTX_4090)
    took_s = time.process_time() - start_s
    assert took_s < 3
    assert plan.job.device == "cuda"
    assert plan.compute_dtype == "bfloat16"
    assert plan.device_budget_bytes < 24 * GIB
    expected = {"70b": 70e9, "235b": 235e9}[model]
    assert sum(plan.placement.block_bytes) / 2 == pytest.approx(expected, rel=0.04)
    assert str(plan).splitlines()[2].startswith("100 steps take")
    assert "machine    RTX 4090, 24 GiB" in str(plan)


def test_a_70b_fits_with_lora_and_its_smallest_card_is_told(models: dict[str, Path]) -> None:
    assert lowmem.plan(models["70b"], seq_len=2048, machine=RTX_4090).fits
    small = lowmem.plan(models["70b"], seq_len=2048, machine=lowmem.Machine(gpu="RTX 3070", ram="64GiB"))
    assert not small.fits
    assert str(small).splitlines()[0].endswith("; nothing fits on such a machine")
    assert "The smallest device budget that fits is 8.5" in small.advice[0]
    assert "and the machine has 6.89 GiB for it" in small.advice[0]


EIGHT_BLOCKS = LlamaConfig(
    hidden_size=4096,
    num_hidden_layers=8,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=32000,
    max_position_embeddings=1 << 17,
    dtype="bfloat16",
    architectures=["LlamaForCausalLM"],
)


@pytest.mark.parametrize(
    ("batch_size", "seq_len", "device", "measured_s", "measured_gib"),
    [(4, 2048, "7GiB", 0.282, 4.71), (1, 1 << 17, "24GiB", 20.1, 18.71)],
)
def test_a_card_that_was_measured_is_planned_as_it_was(
    batch_size: int, seq_len: int, device: str, measured_s: float, measured_gib: float, tmp_path: Path
) -> None:
    # benchmarks/results/2026-11-27-gpu-check-h200.jsonl.
    EIGHT_BLOCKS.save_pretrained(tmp_path)
    adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    job: dict[str, Any] = {"batch_size": batch_size, "seq_len": seq_len, "peft_config": adapter}
    budget = lowmem.Budget(device=device, host="8GiB")
    plan = lowmem.plan(tmp_path, machine=lowmem.Machine(gpu="H200", ram="120GiB"), budget=budget, **job)
    assert plan.step_s == pytest.approx(measured_s, rel=0.3)
    assert measured_gib < plan.device_bytes / GIB
    assert "by operations and bytes" in str(plan)
    slower = lowmem.Machine(gpu="H200", ram="120GiB", memory_gbps=1000)
    assert lowmem.plan(tmp_path, machine=slower, budget=budget, **job).step_s > 1.1 * plan.step_s


def test_a_card_of_which_little_is_known_has_a_guess_of_its_memory() -> None:
    numbers: dict[str, Any] = {"gpu": "Some card", "vram": "16GiB", "tflops": 50, "pcie_gbps": 20}
    guessed, given = lowmem.Machine(**numbers).card, lowmem.Machine(**numbers, memory_gbps=500).card
    assert guessed is not None
    assert given is not None
    assert (guessed.memory_gbps, given.memory_gbps) == (300, 500)
    assert all(200 < card.memory_gbps < 10_000 for card in CARDS)
    with pytest.raises(ValueError, match="memory_gbps=500 belongs to a card"):
        lowmem.Machine(memory_gbps=500)


MISFITS: dict[str, dict[str, Any]] = {
    "batch": {"batch_size": 64, "seq_len": 1024, "budget": {"device": "2GiB", "host": "1GiB"}},
    "both": {"batch_size": 8, "seq_len": 2048, "budget": {"device": "128MiB", "host": 0}},
    "sequence": {"seq_len": 65536, "budget": {"device": "2GiB", "host": "1GiB"}},
    "device": {"seq_len": 512, "budget": {"device": "256MiB", "host": 0}},
    "split": {"batch_size": 8, "seq_len": 2048, "micro_batch": 8, "budget": {"device": "3GiB", "host": 0}},
    "full": {"seq_len": 256, "tuning": "full", "budget": {"device": "3GiB", "host": "2GiB"}},
    "pairs": {"task": "dpo", "batch_size": 16, "seq_len": 2048, "budget": {"device": "3GiB", "host": 0}},
    "generation": {"task": "grpo", "batch_size": 64, "seq_len": 4096, "budget": {"device": "4GiB", "host": "1GiB"}},
}


@pytest.mark.parametrize("name", MISFITS)
def test_each_change_of_a_misfit_makes_it_fit(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    arguments = dict(MISFITS[name])
    arguments["budget"] = lowmem.Budget(**arguments["budget"])
    plan = lowmem.plan(models["1.1b"], device="cpu", **arguments)
    assert not plan.fits
    assert plan.changes
    for change in plan.changes:
        changed = lowmem.plan(models["1.1b"], device="cpu", **change.applied(arguments, disk=tmp_path))
        assert changed.fits, change.text
        if change.batch_size is not None and change.seq_len is None:
            assert changed.job.step_tokens == plan.job.step_tokens
    assert plan.changes[0].text in str(plan).splitlines()[0]
    assert Plan.from_dict(plan.to_dict()) == plan


def test_a_change_that_needs_a_folder_asks_for_one(models: dict[str, Path]) -> None:
    arguments = dict(MISFITS["full"])
    arguments["budget"] = lowmem.Budget(**arguments["budget"])
    plan = lowmem.plan(models["1.1b"], device="cpu", **arguments)
    change = next(change for change in plan.changes if change.needs_disk)
    with pytest.raises(ValueError, match="give disk="):
        change.applied(arguments)


def test_the_fastest_batch_is_found_and_hides_the_disk(models: dict[str, Path]) -> None:
    machine = lowmem.Machine(gpu="RTX 3060", ram="8GiB", disk_gbps=0.5)
    one = lowmem.plan(models["1.1b"], seq_len=512, machine=machine, budget=lowmem.Budget(device="1GiB", host=0))
    best = lowmem.plan(
        models["1.1b"],
        seq_len=512,
        batch_size="auto",
        machine=machine,
        budget=lowmem.Budget(device="1GiB", host=0),
    )
    assert one.bottleneck == "disk"
    assert best.fits
    assert best.job.step_tokens / best.step_s > 3 * one.job.step_tokens / one.step_s
    assert one.hiding_batch is None or best.batch_size >= one.hiding_batch // 2


def test_the_batch_that_hides_the_disk_is_the_smallest(models: dict[str, Path]) -> None:
    machine = lowmem.Machine(gpu="RTX 3060", ram="32GiB", disk_gbps=1, tflops=5)

    def plan(batch_size: int) -> Plan:
        budget = lowmem.Budget(device="1GiB", host=0)
        return lowmem.plan(models["1.1b"], seq_len=128, batch_size=batch_size, machine=machine, budget=budget)

    found = plan(1).hiding_batch
    assert found is not None
    assert found > 1
    assert plan(found).bottleneck == "compute"
    assert plan(found - 1).bottleneck == "disk"
    assert plan(2 * found).hiding_batch == found


def test_examples_and_epochs_give_the_hours(models: dict[str, Path]) -> None:
    plan = lowmem.plan(models["1.1b"], seq_len=512, batch_size=4, machine=RTX_4090, num_examples=10_001, num_epochs=3)
    assert plan.job.run_steps == 3 * 2501
    assert "3 x 10,001 examples: 7,503 steps take" in str(plan).splitlines()[2]
    with pytest.raises(ValueError, match="num_steps or num_examples, not both"):
        lowmem.plan(models["1.1b"], seq_len=512, machine=RTX_4090, num_examples=1, num_steps=1)
    for epochs in (0, float("nan"), float("inf"), 1e30):
        with pytest.raises(ValueError, match=r"num_epochs=.*: expected a number above 0 and at most 1,000,000"):
            lowmem.plan(models["1.1b"], seq_len=512, machine=RTX_4090, num_examples=1, num_epochs=epochs)
    with pytest.raises(ValueError, match="num_epochs=3 without num_examples"):
        lowmem.plan(models["1.1b"], seq_len=512, machine=RTX_4090, num_epochs=3)


def test_writes_are_told_with_how_long_a_drive_lasts(models: dict[str, Path], tmp_path: Path) -> None:
    budget = lowmem.Budget(device="3GiB", host="1GiB", disk=tmp_path)
    plan = lowmem.plan(models["1.1b"], seq_len=256, tuning="full", device="cpu", budget=budget)
    per_day = plan.written_bytes * 86400 / plan.step_s / 1e12
    assert f"{per_day:.3g} TB a day; a drive of 1 TB rated for 600 TB lasts" in str(plan)


def test_a_card_without_bf16_computes_in_fp16(models: dict[str, Path]) -> None:
    assert lowmem.plan(models["1.1b"], seq_len=64, machine=lowmem.Machine(gpu="T4")).compute_dtype == "float16"


def test_a_machine_without_a_card_computes_on_its_processor(models: dict[str, Path]) -> None:
    plan = lowmem.plan(models["1.1b"], seq_len=64, machine=lowmem.Machine(ram="8GiB", disk_gbps=1, tflops=0.1))
    assert plan.job.device == "cpu"
    assert plan.rates.compute_flops_per_s == 1e11
    assert plan.device_budget_bytes + plan.host_budget_bytes < 8 * GIB


def test_cards_are_found_by_the_names_people_use() -> None:
    assert len(CARDS) >= 30
    assert len({card.name for card in CARDS}) == len(CARDS)
    for name in ("rtx4090", "NVIDIA GeForce RTX 4090", "RTX 4090", "h200", "A100 80GB", "4090"):
        assert find_card(name if name != "4090" else "RTX 4090").vram_gib >= 24


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpu": "RTX 4091"}, "not in the table of cards. Instead: one of .*RTX 4090"),
        ({"gpu": "A100"}, "several cards are called so"),
        ({"gpu": "Own", "vram": "24GiB", "tflops": 10}, "not in the table"),
        ({"ram": "64"}, "expected a size with its unit"),
        ({"gpu": "RTX 4090", "disk_gbps": 0}, "disk_gbps=0: expected a number above 0"),
        ({"vram": "24GiB"}, "belongs to a card"),
        ({"gpu": ""}, "gpu='' is not supported: it names no card"),
        ({"gpu": "NVIDIA"}, "it names no card"),
        ({"gpu": "RTX 4090", "vram": "48MiB"}, r"vram='48MiB': CUDA's .* keep 768.00 MiB of it, and nothing would be"),
        ({"gpu": "RTX 4090", "vram": 0}, "vram=0: CUDA's .* keep 768.00 MiB"),
        ({"ram": "0"}, "ram='0': the system, Python and its libraries keep 2.00 GiB"),
        ({"gpu": "RTX 4060", "ram": "1GiB"}, "ram='1GiB': the system, .* nothing would be left; give more"),
        ({"disk_gbps": float("nan")}, "disk_gbps=nan: expected a number above 0"),
        ({"gpu": "RTX 4090", "tflops": float("nan")}, "tflops=nan: expected a number above 0"),
        ({"gpu": "RTX 4090", "pcie_gbps": float("inf")}, "pcie_gbps=inf: expected at most 1,000,000"),
        ({"disk_gbps": 1e30}, r"disk_gbps=1e\+30: expected at most 1,000,000"),
    ],
)
def test_machines_that_cannot_be_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowmem.Machine(**given)


def test_a_card_of_ones_own_needs_its_three_numbers() -> None:
    machine = lowmem.Machine(gpu="Own card", vram="20GiB", tflops=10, pcie_gbps=5)
    assert machine.card is not None
    assert machine.card.vram_gib == 20
    assert machine.rates.copy_bytes_per_s == 5e9
    assert lowmem.Machine(gpu="RTX 4090", vram="20GiB").card == machine.card.__class__(
        **{**vars(find_card("RTX 4090")), "vram_gib": 20}
    )


@pytest.mark.parametrize("given", [{"device": "cpu"}, {"rates": "measure"}])
def test_two_machines_are_refused(given: dict[str, Any], models: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"give machine or .* not both"):
        lowmem.plan(models["1.1b"], seq_len=64, machine=RTX_4090, **given)
    with pytest.raises(TypeError, match=r"machine='RTX 4090': expected lowmem\.Machine"):
        lowmem.plan(models["1.1b"], seq_len=64, machine="RTX 4090")  # type: ignore[arg-type]


def test_several_cards_read_once_and_say_how_they_scale(models: dict[str, Path]) -> None:
    job: dict[str, Any] = {"batch_size": 4, "seq_len": 1024}
    machine: dict[str, Any] = {"gpu": "RTX 4090", "ram": "64GiB", "disk_gbps": 7}
    alone = lowmem.plan(models["70b"], machine=lowmem.Machine(**machine), **job)
    two = lowmem.plan(models["70b"], machine=lowmem.Machine(gpus=2, **machine), **job)
    assert two.fits
    # One copy in RAM serves both; what less fits is what they pass blocks on through.
    assert two.placement.step_read_bytes <= 1.2 * alone.placement.step_read_bytes
    # Half of the RAM each, of which cached blocks take half.
    assert two.host_budget_bytes < alone.host_budget_bytes / 2
    assert two.bytes_of("decoder blocks", tier="host") <= two.host_budget_bytes
    assert two.advice[0].startswith("2 ranks on one machine, which reads ")
    assert "times one card's" in two.advice[0]
    assert "2 x RTX 4090" in two.machine
    four = lowmem.plan(models["70b"], machine=lowmem.Machine(gpus=2, nodes=2, **machine), **job)
    assert four.advice[0].startswith("4 ranks on 2 machines of 2, each reading ")
    assert "2 such machines with 1.25 GB/s between them" in four.machine
    assert Plan.from_dict(four.to_dict()) == four


def test_gradients_go_around_the_ring_once_per_step(models: dict[str, Path]) -> None:
    machine = lowmem.Machine(gpu="RTX 4090", ram="64GiB", disk_gbps=7, gpus=2, nodes=2)
    plans = {
        num: lowmem.plan(models["1.1b"], machine=machine, batch_size=2, seq_len=512, gradient_accumulation_steps=num)
        for num in (1, 4)
    }
    found = {num: scaling_of(plan, plan, machine) for num, plan in plans.items()}
    assert found[1].link_bytes == round(1.5 * plans[1].num_trainable * 4) == found[4].link_bytes
    assert found[1].link_s == pytest.approx(found[1].link_bytes / 1.25e9)
    for num, one in found.items():
        assert one.times_one == pytest.approx(4 * plans[num].step_s / (plans[num].step_s + one.link_s))
        assert one.times_one < 4


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"gpu": "RTX 4090", "gpus": 0}, "Machine.gpus=0: expected a whole number"),
        ({"gpu": "RTX 4090", "nodes": 1.5}, "Machine.nodes=1.5: expected a whole number"),
        ({"gpus": 2}, "Machine.gpus=2: say which card"),
        ({"nodes": 2}, "Machine.nodes=2: say which card"),
        ({"gpu": "RTX 4090", "nodes": 2, "network_gbps": 0}, "network_gbps=0: expected a number above 0"),
    ],
)
def test_numbers_of_cards_and_machines_that_cannot_be(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        lowmem.Machine(**given)


def moments(plan: Plan) -> int:
    return sum(plan.bytes_of(role, tier="host") for role in ("exp_avg", "exp_avg_sq", "optimizer state"))


def test_every_weight_of_several_cards_has_one_copy_and_its_gradients_meet_in_ram(models: dict[str, Path]) -> None:
    job: dict[str, Any] = {"seq_len": 64, "tuning": "full", "gradient_accumulation_steps": 3}
    machine: dict[str, Any] = {"gpu": "RTX 4090", "ram": "64GiB", "disk_gbps": 7}
    one, two, four = (
        lowmem.plan(models["1.1b"], machine=lowmem.Machine(gpus=gpus, nodes=nodes, **machine), **job)
        for gpus, nodes in ((1, 1), (2, 1), (2, 2))
    )
    assert two.fits
    assert four.fits
    for role in ("decoder blocks", "gradients", "exp_avg", "exp_avg_sq", "master weights outside the blocks"):
        assert two.bytes_of(role, tier="host") == -(-one.bytes_of(role, tier="host") // 2), role
    in_blocks = one.bytes_of("gradients", tier="host") // 4
    outside = one.num_trainable - in_blocks
    # DDP's around all cards once; those of blocks between machines, with each batch.
    words = {plan: plan.advice[0] for plan in (two, four)}
    assert f"{format_bytes(round(2 * 0.5 * outside * 4))} of gradients over the cards' links" in words[two]
    between = round(2 * (0.75 * outside + 0.5 * in_blocks * 3) * 4)
    assert f"{format_bytes(between)} of gradients over the network" in words[four]
    budget = lowmem.Budget(host="4GiB", disk="/tmp")
    with pytest.raises(lowmem.UnsupportedError, match='tuning="full" in 2 processes and state on disk'):
        lowmem.plan(models["1.1b"], machine=lowmem.Machine(gpus=2, **machine), budget=budget, **job)
    for optimizer in ("galore", "badam", partial(lowmem.optim.AdamW, state_dtype="8bit")):
        with pytest.raises(lowmem.UnsupportedError, match=r"in 2 processes and .*lowmem\.optim\.AdamW with fp32"):
            lowmem.plan(models["1.1b"], machine=lowmem.Machine(gpus=2, **machine), optimizer=optimizer, **job)
    for known, factor in (("adamw", 1), (partial(lowmem.optim.AdamW, betas=(0.9, 0.95)), 1), ("adamw_torch_fused", 2)):
        other = lowmem.plan(models["1.1b"], machine=lowmem.Machine(gpus=2, **machine), optimizer=known, **job)
        assert moments(other) == pytest.approx(factor * moments(two), rel=1e-6), "torch's own is each rank's"


@pytest.mark.parametrize(
    ("machine", "budget", "says"),
    [
        (
            {"gpu": "RTX 4060"},
            {"device": "400GiB"},
            "device='400GiB' is more than the RTX 4060 has, 8.00 GiB; give less",
        ),
        ({"gpu": "RTX 4060"}, {"device": "12GiB", "host": "500GiB"}, "Budget.device='12GiB' is more than the RTX 4060"),
        ({"gpu": "RTX 4060"}, {"host": "500GiB"}, "host='500GiB' is more than the machine has, 32.00 GiB of RAM"),
        ({"ram": "16GiB"}, {"device": "17GiB"}, "device='17GiB' is more than the machine has, 16.00 GiB of RAM"),
        (
            {"ram": "16GiB"},
            {"device": "9GiB", "host": "9GiB"},
            "are together more than the machine has, 16.00 GiB of RAM",
        ),
    ],
)
def test_a_budget_beyond_a_described_machine_is_refused_before_anything_is_read(
    machine: dict[str, Any], budget: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        lowmem.plan(tmp_path, seq_len=64, machine=lowmem.Machine(**machine), budget=lowmem.Budget(**budget))


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """This one has 16 GiB of RAM."""
    monkeypatch.setattr("lowmem.machines.cards.installed_ram_bytes", lambda: 16 * GIB)


@pytest.mark.usefixtures("small_machine")
def test_budgets_beyond_this_machine_are_told_in_the_verdict(models: dict[str, Path]) -> None:
    job: dict[str, Any] = {"seq_len": 64, "device": "cpu"}
    for sizes in ({"device": "400GiB", "host": "900GiB"}, {"device": "9GiB", "host": "9GiB"}):
        plan = lowmem.plan(models["1.1b"], budget=lowmem.Budget(**sizes), **job)
        assert plan.fits
        assert "another machine's budgets: this machine has only 16.00 GiB of RAM" in str(plan).splitlines()[3]
        assert Plan.from_dict(plan.to_dict()) == plan
    within = lowmem.plan(models["1.1b"], budget=lowmem.Budget(device="9GiB", host="1GiB"), **job)
    assert "this machine" not in str(within)


def budgets_in(text: str) -> list[float]:
    """Sizes in GiB that a sentence recommends."""
    units = {"MiB": 1 / 1024, "GiB": 1.0, "TiB": 1024.0}
    found = re.findall(r"(?:device|host) budget of ([\d.]+) ([MGT]iB)", text)
    return [float(number) * units[unit] for number, unit in found]


BEYOND_CARD: dict[str, dict[str, Any]] = {
    "generation": {"task": "grpo", "batch_size": 64, "seq_len": 4096, "budget": {"device": "300MiB"}},
    "sequence": {"seq_len": 1_000_000_000, "budget": {}},
    "batch": {"batch_size": 512, "seq_len": 8192, "budget": {"device": "300MiB", "host": "1GiB"}},
    "full": {"seq_len": 256, "tuning": "full", "budget": {"host": "1GiB"}},
}


@pytest.mark.parametrize("name", BEYOND_CARD)
@pytest.mark.parametrize("gpu", ["RTX 4060", None])
def test_no_change_asks_for_more_than_the_machine_has(
    name: str, gpu: str | None, models: dict[str, Path], tmp_path: Path
) -> None:
    machine = lowmem.Machine(gpu=gpu, ram="16GiB")
    arguments = {**BEYOND_CARD[name], "machine": machine}
    arguments["budget"] = lowmem.Budget(**arguments["budget"])
    plan = lowmem.plan(models["1.1b"], **arguments)
    assert not plan.fits
    assert plan.changes or "nothing fits on such a machine" in str(plan).splitlines()[0]
    for change in plan.changes:
        changed = lowmem.plan(models["1.1b"], **change.applied(arguments, disk=tmp_path))
        assert changed.fits, change.text
    for sentence in plan.advice:
        assert all(size <= (14 if gpu is None or "host" in sentence else 7) for size in budgets_in(sentence)), sentence


@pytest.mark.usefixtures("small_machine")
def test_no_change_asks_for_more_than_this_machine_has(models: dict[str, Path], tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"batch_size": 512, "seq_len": 65536, "device": "cpu"}
    arguments["budget"] = lowmem.Budget(device="300MiB", host="1GiB")
    plan = lowmem.plan(models["1.1b"], **arguments)
    assert plan.changes
    for change in plan.changes:
        assert sum(filter(None, (change.device_bytes, change.host_bytes))) < 14 * GIB
        assert lowmem.plan(models["1.1b"], **change.applied(arguments, disk=tmp_path)).fits, change.text


def test_where_no_change_fits_the_machine_the_verdict_says_so(models: dict[str, Path]) -> None:
    machine = lowmem.Machine(gpu="Tiny", vram="800MiB", tflops=1, pcie_gbps=1, ram="4GiB")
    plan = lowmem.plan(models["70b"], seq_len=2048, machine=machine)
    assert not plan.changes
    assert str(plan).splitlines()[0].endswith("; nothing fits on such a machine")
    assert any(sentence.startswith("Nothing fits on such a machine: it has ") for sentence in plan.advice)


@pytest.mark.parametrize("budget", [{"device": "60MiB"}, {"device": "60MiB", "host": 0}])
def test_a_change_asks_for_no_more_of_the_device_than_its_plan_takes(
    budget: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"batch_size": 16, "seq_len": 2048, "device": "cpu", "budget": lowmem.Budget(**budget)}
    plan = lowmem.plan(models["1.1b"], **arguments)
    asking = [change for change in plan.changes if change.device_bytes is not None]
    assert asking
    for change in asking:
        changed = lowmem.plan(models["1.1b"], **change.applied(arguments, disk=tmp_path))
        assert changed.fits
        assert changed.device_bytes == change.device_bytes, change.text
