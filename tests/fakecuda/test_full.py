"""Every weight trained with the blocks computed on a GPU: against torch's fused AdamW on the model as a whole."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, get_cosine_schedule_with_warmup

import lowmem
from lowmem.full import gpu_tier
from lowmem.full.gpu_tier import DeviceUpdates, GradientLanding
from lowmem.planning.search import place_masters
from lowmem.streaming.runtime import runtime_of
from offload.device import CopyStream, CudaCopy
from tests.fakecuda import test_faults as faults
from tests.lowmem.full_training import backward, batches, weights
from tests.zoo.architectures import build

pytestmark = [
    pytest.mark.gpu,
    # torch, of schedulers that are made anew for a resumed optimizer.
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),
]
NUM_STEPS = 20


def is_simulated() -> bool:
    return torch.cuda.get_device_name() == "Simulated GPU"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("full")


def checkpoint(arch: str, root: Path) -> Path:
    return root / arch if (root / arch).exists() else build(arch, root / arch)


def on_gpu(
    folder: Path,
    scratch: Path | None = None,
    *,
    share: float = 0.0,
    masters: str | None = None,
    ring: int | None = None,
    dtype: str | None = None,
    **more: Any,
) -> PreTrainedModel:
    """State in RAM, or on disk where there is a folder for it; a share of it updated on the device."""
    job: dict[str, Any] = {"tuning": "full", "seq_len": 12, "batch_size": 2, "micro_batch": 2, "device": "cuda"}
    job |= {"masters": masters, "dtype": dtype} | more
    plan = lowmem.plan(folder, budget=lowmem.Budget(device="64MiB", host="64MiB"), **job)
    plan = replace(plan, choice=replace(plan.choice, update_share=share))
    if ring is not None:
        plan = replace(plan, placement=replace(plan.placement, num_slots=ring))
    if scratch is not None:
        # Forced: in the budget that passes a tiny model's chunks, its state has room too.
        plan = replace(plan, choice=replace(plan.choice, state_tier="disk"), disk_folder=str(scratch))
        placement = place_masters(plan.placement.block_bytes, tier="disk", ring=2, job=plan.job)
        plan = replace(plan, placement=placement)
    return lowmem.from_pretrained(folder, tuning="full", plan=plan).train()


def groups(model: PreTrainedModel) -> list[dict[str, Any]]:
    params = list(model.named_parameters())
    return [
        {"params": [param for _, param in params if param.ndim > 1], "weight_decay": 0.1},
        {"params": [param for _, param in params if param.ndim <= 1], "weight_decay": 0.0},
    ]


def train(model: PreTrainedModel, optimizer: torch.optim.Optimizer, *, parts: int, steps: range) -> list[float]:
    """Clipped at 0.5, a cosine schedule, `parts` micro-steps for each step; the losses."""
    schedule = get_cosine_schedule_with_warmup(optimizer, 3, NUM_STEPS)
    for _ in range(steps.start):
        schedule.step()
    data, losses = batches(NUM_STEPS * parts), []
    for step in steps:
        for ids in data[step * parts : (step + 1) * parts]:
            losses.append(backward(model, ids.to(model.device), parts=parts))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


SHARES = {"host": 0.0, "mixed": 0.4, "device": 1.0, "disk": 0.0, "disk, mixed": 0.4, "disk, device": 1.0}
"""How much of the blocks' state the GPU updates, by where the state and the update are."""


@pytest.mark.parametrize(
    ("arch", "parts", "tier"),
    [
        ("llama", 1, "host"),
        ("llama", 4, "host"),
        ("qwen3", 1, "host"),
        ("gemma3_text", 1, "host"),
        ("mixtral", 1, "host"),
        ("gpt_oss", 1, "host"),
        ("llama", 4, "mixed"),
        ("llama", 1, "device"),
        pytest.param("mixtral", 1, "mixed", marks=pytest.mark.slow),
        ("llama", 1, "disk"),
        ("llama", 4, "disk"),
        ("llama", 4, "disk, mixed"),
        pytest.param("llama", 1, "disk, device", marks=pytest.mark.slow),
        pytest.param("mixtral", 4, "disk, mixed", marks=pytest.mark.slow),
        pytest.param("mixtral", 1, "disk", marks=pytest.mark.slow),
        pytest.param("mixtral", 4, "disk", marks=pytest.mark.slow),
        pytest.param("gpt_oss", 4, "disk", marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_are_those_of_a_resident_model(
    arch: str, parts: int, tier: str, root: Path, tmp_path: Path
) -> None:
    folder = checkpoint(arch, root)
    on_disk = tier.startswith("disk")
    ours = on_gpu(folder, tmp_path / "state" if on_disk else None, share=SHARES[tier])
    assert runtime_of(ours).plan.choice.state_tier == ("disk" if on_disk else "host")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train().to("cuda")
    found = train(ours, lowmem.optim.AdamW(groups(ours), lr=3e-3), parts=parts, steps=range(NUM_STEPS))
    wanted = train(theirs, torch.optim.AdamW(groups(theirs), lr=3e-3, fused=True), parts=parts, steps=range(NUM_STEPS))
    # A real GPU's norm of the gradients, and its AdamW, round otherwise than a processor's.
    tolerance = 1e-6 if is_simulated() else 1e-5
    assert found == pytest.approx(wanted, rel=tolerance, abs=tolerance)
    expected = weights(theirs)
    for name, value in weights(ours).items():
        torch.testing.assert_close(value.cpu(), expected[name].cpu(), rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("arch", ["llama", "mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_weights_that_move_as_bf16_give_what_autocast_gives_of_a_resident_model(arch: str, root: Path) -> None:
    folder = checkpoint(arch, root)
    ours = on_gpu(folder, dtype="bf16")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train().to("cuda")
    with pytest.raises(lowmem.UnsupportedError, match=r"outside of autocast to bfloat16.*bf16=True"):
        ours(batches(1)[0].cuda())
    # The cache of casts would outlive the weights: it is emptied where autocast ends.
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        found = train(ours, lowmem.optim.AdamW(groups(ours), lr=3e-3), parts=2, steps=range(NUM_STEPS))
        wanted = train(theirs, torch.optim.AdamW(groups(theirs), lr=3e-3, fused=True), parts=2, steps=range(NUM_STEPS))
    # The first step's rate is 0: these are of the same weights.
    assert found[:4] == pytest.approx(wanted[:4], rel=1e-6, abs=1e-6)
    if not is_simulated():
        # Where masters differ in their last bit, some round to another bf16 value, 2**-8 away.
        assert found == pytest.approx(wanted, rel=2e-2)
        return
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    expected = weights(theirs)
    for name, value in weights(ours).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("opens_saved", [True, False])
def test_a_resumed_run_is_bitwise_the_run_that_was_not_interrupted(
    opens_saved: bool, root: Path, tmp_path: Path
) -> None:
    folder = checkpoint("llama", root)

    def optimizer_of(model: PreTrainedModel) -> torch.optim.Optimizer:
        return lowmem.optim.AdamW(groups(model), lr=3e-3)

    whole = on_gpu(folder)
    train(whole, optimizer_of(whole), parts=1, steps=range(6))
    first = on_gpu(folder)
    optimizer = optimizer_of(first)
    train(first, optimizer, parts=1, steps=range(3))
    first.save_pretrained(tmp_path / "saved")
    state = optimizer.state_dict()
    second = on_gpu(tmp_path / "saved" if opens_saved else folder)
    resumed = optimizer_of(second)
    if not opens_saved:
        # As the Trainer resumes.
        second.load_state_dict(weights(first))
        state["lowmem_full"]["folder"] = str(tmp_path / "saved" / "optimizer_state")
    resumed.load_state_dict(state)
    train(second, resumed, parts=1, steps=range(3, 6))
    expected = weights(whole)
    for name, value in weights(second).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    "make",
    [
        lambda params: lowmem.optim.AdamW(params, lr=1e-3, eps=1e-3),
        lambda params: lowmem.optim.AdaLomo(params, lr=1e-3),
        lambda params: torch.optim.AdamW(params, lr=1e-3, eps=1e-3),
    ],
    ids=["flat", "by rules", "torch's"],
)
def test_weights_outside_the_blocks_are_trained_from_what_they_were_set_to_and_saved_so(
    make: Any, root: Path, tmp_path: Path
) -> None:
    folder = checkpoint("llama", root)
    ours = on_gpu(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train().to("cuda")
    for model in (theirs, ours):
        optimizer = make(model.parameters())
        for ids in batches(2):
            backward(model, ids.cuda())
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(0.5)
                model.model.norm.weight.add_(0.25)
    ours.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    expected = weights(theirs)
    assert saved.keys() == expected.keys()
    for name, value in weights(ours).items():
        assert torch.equal(saved[name], value.cpu()), name
        torch.testing.assert_close(value.cpu(), expected[name].cpu(), rtol=1e-6, atol=1e-6, msg=name)


def test_a_run_goes_on_from_its_last_step_on_disk(root: Path, tmp_path: Path) -> None:
    folder = checkpoint("llama", root)

    def optimizer_of(model: PreTrainedModel) -> torch.optim.Optimizer:
        return lowmem.optim.AdamW(groups(model), lr=3e-3)

    whole = on_gpu(folder)
    train(whole, optimizer_of(whole), parts=1, steps=range(6))
    first = on_gpu(folder, tmp_path / "state")
    train(first, optimizer_of(first), parts=1, steps=range(3))
    runtime_of(first).close()
    del first
    second = on_gpu(folder, tmp_path / "state")
    resumed = optimizer_of(second)
    assert lowmem.full.resume_last_step(resumed) == 3
    train(second, resumed, parts=1, steps=range(3, 6))
    expected = weights(whole)
    for name, value in weights(second).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("arch", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bitwise(arch: str, root: Path, tmp_path: Path) -> None:
    folder, num_steps = checkpoint(arch, root), 6
    whole = on_gpu(folder)
    optimizer = lowmem.optim.AdamW(groups(whole), lr=3e-3)
    expected = [weights(whole)]
    for step in range(num_steps):
        train(whole, optimizer, parts=1, steps=range(step, step + 1))
        expected.append(weights(whole))
    kind = "simulated" if torch.cuda.get_device_name() == "Simulated GPU" else "real"
    job = [sys.executable, "-W", "ignore", "-m", "tests.fakecuda.full_kill_job", str(folder), str(tmp_path), kind]
    with subprocess.Popen(job, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.strip() == "3":
                break
        running.kill()
    assert running.returncode == -signal.SIGKILL
    resumed = on_gpu(folder, tmp_path)
    optimizer = lowmem.optim.AdamW(groups(resumed), lr=3e-3)
    start = lowmem.full.resume_last_step(optimizer)
    assert 2 <= start < num_steps
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[start][name]), name
    train(resumed, optimizer, parts=1, steps=range(start, num_steps))
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[-1][name]), name


def test_gradients_and_weights_are_read_and_written_as_those_of_any_model(root: Path) -> None:
    model = on_gpu(checkpoint("llama", root))
    name, param = next((name, param) for name, param in model.named_parameters() if "q_proj" in name)
    backward(model, batches(1)[0].cuda())
    assert param.grad is not None
    assert param.grad.device == param.device == model.device
    norm = torch.linalg.vector_norm(param.grad)
    assert torch.allclose(norm, param.grad.clone().norm())
    with torch.no_grad():
        param.mul_(0)
    assert not param.detach().clone().any()
    changed = backward(model, batches(1)[0].cuda())
    memory = runtime_of(model).memory()
    assert memory["gradient_buffer_bytes"] > 0
    assert changed == changed
    assert name in dict(model.named_parameters())


def test_the_host_waits_for_no_gradient_inside_a_block(root: Path) -> None:
    if torch.cuda.get_device_name() != "Simulated GPU":
        pytest.skip("a real GPU does not count waits")
    from tests.fakecuda import simulated_gpu

    model = on_gpu(checkpoint("llama", root), share=0.5)
    train(model, lowmem.optim.AdamW(groups(model), lr=1e-3), parts=2, steps=range(2))
    assert not [place for kind, *place in simulated_gpu.places if kind == "wait in a block"]


class _Nothing:
    def synchronize(self) -> None:
        return


def gradients_are_added_before_they_have_come(patch: pytest.MonkeyPatch) -> None:
    down = CopyStream.down

    def at_once(self: CopyStream, value: torch.Tensor, into: torch.Tensor) -> Any:
        down(self, value, into)
        return _Nothing()

    patch.setattr(CopyStream, "down", at_once)


def gradients_come_into_memory_that_is_added_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GradientLanding, "_room", lambda self, nbytes: 0)


def weights_are_lifted_into_what_is_being_copied(patch: pytest.MonkeyPatch) -> None:
    # A staging buffer is free again as soon as its copy was begun.
    patch.setattr(CudaCopy, "done", lambda self: True)
    patch.setattr(CudaCopy, "times_ns", lambda self: (0, 0))


def updates_on_the_device_are_not_waited_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DeviceUpdates, "finish", lambda self: None)


def pieces_of_two_updates_share_their_memory(patch: pytest.MonkeyPatch) -> None:
    made = DeviceUpdates.__init__

    def with_one_set(self: DeviceUpdates, device: torch.device, **options: Any) -> None:
        made(self, device, **options)
        self._pieces = [self._pieces[0]] * 2

    patch.setattr(DeviceUpdates, "__init__", with_one_set)
    # A tiny block has several pieces only if these are tinier.
    patch.setattr(gpu_tier, "_PIECE_ELEMENTS", 1024)


FULL_FAULTS: list[faults.Break] = [
    updates_on_the_device_are_not_waited_for,
    pieces_of_two_updates_share_their_memory,
    gradients_are_added_before_they_have_come,
    gradients_come_into_memory_that_is_added_up,
    weights_are_lifted_into_what_is_being_copied,
    faults.values_are_copied_down_before_they_are_computed,
    faults.memory_is_given_out_while_it_is_copied_down,
    faults.visits_do_not_wait_for_their_copy,
]


@pytest.mark.racy
@pytest.mark.usefixtures("late_copies")
@pytest.mark.parametrize("fault", FULL_FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_of_full_tuning_is_reported(fault: faults.Break, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.fakecuda import simulated_gpu

    fault(monkeypatch)
    model = on_gpu(checkpoint("llama", root), share=0.5)
    # What came wrong may be no number at all; that it came wrong is what is looked for.
    train(model, lowmem.optim.AdamW(groups(model), lr=1e-3), parts=1, steps=range(2))
    assert simulated_gpu.simulator.races()


@pytest.mark.usefixtures("late_copies")
def test_nothing_is_reported_of_full_tuning_as_it_is(root: Path) -> None:
    model = on_gpu(checkpoint("llama", root), share=0.5)
    train(model, lowmem.optim.AdamW(groups(model), lr=1e-3), parts=2, steps=range(2))


FORMATS = [
    ("host", "bf16", "8bit"),
    ("disk", "bf16", "8bit"),
    ("mixed", "bf16", "8bit"),
    ("mixed", "fp32", "bf16"),
    ("disk, mixed", "bf16", "bf16"),
    ("device", "bf16", "8bit"),
    ("disk, device", "fp32", "8bit"),
]
MORE_FORMATS = [
    (tier, masters, moments)
    for tier in SHARES
    for masters, moments in (("bf16", "fp32"), ("bf16", "bf16"), ("bf16", "8bit"), ("fp32", "bf16"), ("fp32", "8bit"))
    if (tier, masters, moments) not in FORMATS
]


@pytest.mark.parametrize(
    ("tier", "masters", "moments"),
    [*FORMATS, *(pytest.param(*formats, marks=pytest.mark.slow) for formats in MORE_FORMATS)],
)
def test_masters_and_moments_in_fewer_bytes_are_bitwise_the_optimizer_on_a_resident_model(
    tier: str, masters: str, moments: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if SHARES[tier] and torch.cuda.get_device_name() != "Simulated GPU":
        pytest.skip("a real GPU's AdamW rounds otherwise than a processor's")
    # A tiny block's matrices are several pieces only if these are tinier.
    monkeypatch.setattr(gpu_tier, "_PIECE_ELEMENTS", 1024)
    folder = build("llama", tmp_path / "wide", changes={"hidden_size": 64, "intermediate_size": 98, "head_dim": 16})
    state = tmp_path / "state" if tier.startswith("disk") else None
    ours = on_gpu(folder, state, share=SHARES[tier], masters=masters)
    dtype = torch.bfloat16 if masters == "bf16" else torch.float32
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()
    for model in (theirs.cuda(), ours):
        optimizer = lowmem.optim.AdamW(groups(model), lr=3e-3, writer="stochastic", state_dtype=moments)
        for ids in batches(6):
            backward(model, ids.cuda())
            if masters == "fp32":
                # Of bf16, a plain model's gradients are clipped in bf16.
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            # A real GPU's AdamW rounds otherwise: both updates are to be a processor's.
            update_on_the_host(model, optimizer) if model is theirs else optimizer.step()
            optimizer.zero_grad()
    expected = weights(theirs)
    for name, value in weights(ours).items():
        assert torch.equal(value.cpu(), expected[name].cpu()), name


def update_on_the_host(model: torch.nn.Module, optimizer: Any) -> None:
    """A step of an optimizer whose rules run on copies in RAM."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            rule, state = optimizer.rule_of(param), optimizer.state[param]
            weight = param.detach().cpu()
            if not state:
                state.update(rule.init(weight))
            rule.update(weight, param.grad.cpu(), state, optimizer.hyper(group))
            param.data.copy_(weight)
