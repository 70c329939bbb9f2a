"""Large products kept from the forward: the bits of computing them again, in memory and on disk, and not made twice."""

from __future__ import annotations

import errno
import gc
import os
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lowmem
from lowmem.internals import unread
from lowmem.loading import Tiers
from lowmem.planning.step_memory import NUM_PRODUCT_BUFFERS
from lowmem.streaming.boundary import Boundary, BoundaryTier, DiskBoundaries, ProductBoundaries
from lowmem.streaming.boundary_tiers import tier_for
from lowmem.streaming.runtime import Runtime, runtime_of
from offload import FileSlot, ReadError, Scratch, SlotAllocator, Trace, WriteError
from tests.offload.stored_blocks import until
from tests.zoo.architectures import build
from tests.zoo.reference import Outcome, adapt, batch_of, lora, resident, run
from tests.zoo.streamed import streamed

CPU = torch.device("cpu")

# How many of a block's products no gradient needs: what is added to the residual stream as it is.
UNREAD = {
    "falcon": 0,
    "llama": 1,
    "gemma2": 0,
    "gpt2": 1,
    "gpt_neox": 2,
    "phi3": 1,
    "qwen3": 1,
    "olmo2": 0,
    "granite": 1,
}
ADAPTERS: dict[str, dict[str, object]] = {"lora": {}, "dora": {"use_dora": True}, "dropout": {"lora_dropout": 0.2}}
QUICK = {
    ("llama", "lora", "disk"),
    ("llama", "dropout", "memory"),
    ("gemma2", "lora", "memory"),
    ("gpt2", "dora", "disk"),
}
CASES = [
    pytest.param(*case, id="-".join(case), marks=() if case in QUICK else pytest.mark.slow)
    for case in product(UNREAD, ADAPTERS, ("memory", "disk"))
]


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unread, "_MANY_OPERATIONS", 1)
    monkeypatch.setattr(unread, "_MANY_OPERATIONS_OF_A_BLOCK", 1)
    # All but the factors of adapters.
    monkeypatch.setattr(unread, "_MIN_KEPT_WIDTH", 8)
    monkeypatch.setattr(unread, "_MIN_KEPT_KEYS", 1)


@pytest.fixture
def made_again(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Products that recomputations have made, for each its operator."""
    made: list[object] = []
    make = unread._run

    def noting(func, args, *rest):  # type: ignore[no-untyped-def]
        if func in unread._PRODUCTS and unread._kept_form(func, args) is not None:
            made.append(func)
        return make(func, args, *rest)

    monkeypatch.setattr(unread, "_run", noting)
    return made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build("llama", tmp_path_factory.mktemp("zoo"), changes={"num_hidden_layers": 3}))


def keep_in(runtime: Runtime, folder: Path | None) -> BoundaryTier:
    """Have products kept in memory, or on disk."""
    tier = ProductBoundaries(64 << 20) if folder is None else tier_for(CPU, planned="disk", disk=folder, num_buffers=4)
    runtime.products = tier
    return tier


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    assert torch.equal(ours.loss, theirs.loss)
    assert ours.gradients.keys() == theirs.gradients.keys() != set()
    for key, gradient in theirs.gradients.items():
        assert torch.equal(ours.gradients[key], gradient), key


@pytest.mark.parametrize(("name", "adapter", "tier"), CASES)
def test_steps_have_the_bits_of_computing_again(name: str, adapter: str, tier: str, tmp_path: Path) -> None:
    folder = Path(build(name, tmp_path / "model"))
    config, batch = lora(name, **ADAPTERS[adapter]), batch_of(padding=True)  # type: ignore[arg-type]
    model = adapt(streamed(folder, micro_batch=1), config)
    runtime = runtime_of(model)
    again = run(model, batch)
    products = keep_in(runtime, tmp_path / "scratch" if tier == "disk" else None)
    for _ in range(2):
        assert_same(run(model, batch), again)
        if adapter == "lora":
            # Dropout draws into memory, before which everything is made, and DoRA scales what the last product gives.
            assert {len(ones) for ones in runtime.unread_products.values()} == {UNREAD[name]}
    assert products.held_bytes > 0
    assert runtime.memory()["product_bytes"] == products.held_bytes
    # With a graph that nobody differentiates.
    loss = model(**batch, use_cache=False).loss
    del loss
    gc.collect()
    assert_same(run(model, batch), again)


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_what_is_kept_is_a_resident_models_step_and_is_not_made_again(
    name: str, tmp_path: Path, made_again: list[object]
) -> None:
    folder = Path(build(name, tmp_path / "model"))
    config, batch = lora(name), batch_of(padding=True)
    theirs = run(adapt(resident(folder), config), batch)
    model = adapt(streamed(folder, micro_batch=2), config)
    assert_same(run(model, batch), theirs)
    assert made_again
    made_again.clear()
    keep_in(runtime_of(model), tmp_path / "scratch")
    for _ in range(2):
        assert_same(run(model, batch), theirs)
        assert not made_again


def test_only_what_a_backward_has_read_is_kept_from_then_on(checkpoint: Path, tmp_path: Path) -> None:
    model = adapt(streamed(checkpoint, micro_batch=1), lora("llama"))
    tier = keep_in(runtime_of(model), tmp_path)
    assert isinstance(tier, DiskBoundaries)
    run(model, batch_of())
    first = tier.scratch.written_bytes
    run(model, batch_of())
    # Of 7 products one of each block and sequence is of no use.
    assert tier.scratch.written_bytes - first == first - 3 * 2 * 4096
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_other_types_and_under_autocast(checkpoint: Path, dtype: torch.dtype, autocast: bool) -> None:
    model = adapt(streamed(checkpoint, micro_batch=1, dtype=dtype), lora("llama"))
    outcomes = []
    for keeps in (False, True):
        if keeps:
            keep_in(runtime_of(model), None)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            outcomes += [run(model, batch_of()), run(model, batch_of())]
    for outcome in outcomes[1:]:
        assert_same(outcome, outcomes[0])


def test_every_weight(checkpoint: Path, tmp_path: Path) -> None:
    def trained(*, keeps: bool) -> list[Tensor]:
        plan = lowmem.plan(
            checkpoint, seq_len=16, batch_size=2, tuning="full", budget=lowmem.Budget(device="64MiB"), device="cpu"
        )
        model = lowmem.from_pretrained(checkpoint, tuning="full", plan=plan, device="cpu").train()
        runtime_of(model).products = ProductBoundaries(1 << 20) if keeps else None
        optimizer = lowmem.optim.AdamW(model, lr=1e-2)
        losses = []
        for seed in range(3):
            loss = model(**batch_of(seed=seed), use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        if keeps:
            assert runtime_of(model).memory()["product_bytes"] > 0
        return losses

    assert trained(keeps=True) == trained(keeps=False)


def test_several_forwards_may_wait_for_their_backward(checkpoint: Path, tmp_path: Path) -> None:
    model = adapt(streamed(checkpoint, micro_batch=1), lora("llama")).eval()
    batches = [batch_of(seed=seed) for seed in range(3)]
    params = [param for param in model.parameters() if param.requires_grad]
    expected = [torch.autograd.grad(model(**batch, use_cache=False).loss, params) for batch in batches]
    keep_in(runtime_of(model), tmp_path)
    losses = [model(**batch, use_cache=False).loss for batch in batches]
    with torch.no_grad():
        model(**batches[0], use_cache=False).loss.item()
    for index in (1, 2, 0):
        grads = torch.autograd.grad(losses[index], params)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, expected[index], strict=True))


def test_other_lengths_and_another_adapter_in_between(checkpoint: Path) -> None:
    model = adapt(streamed(checkpoint, micro_batch=1), lora("llama"))
    calls: list[Callable[[], Outcome]] = [
        lambda: run(model, batch_of(num_tokens=9)),
        lambda: run(model, batch_of(num_sequences=3, num_tokens=4)),
        lambda: run(model, batch_of()),
    ]
    expected = [call() for call in calls]
    products = keep_in(runtime_of(model), None)
    for _ in range(2):
        for call, theirs in zip(calls, expected, strict=True):
            assert_same(call(), theirs)
            with model.disable_adapter(), torch.no_grad():
                model(**batch_of(), use_cache=False)
    held = products.held_bytes
    calls[-1]()
    assert products.held_bytes == held


@pytest.mark.parametrize("options", [{"use_dora": True, "lora_dropout": 0.1}, {"r": 16}, {"r": 16, "use_dora": True}])
def test_no_more_is_kept_than_a_product_of_each_weight(
    checkpoint: Path, options: dict[str, object], made_again: list[object]
) -> None:
    def held(**options: object) -> int:
        config = LoraConfig(target_modules="all-linear", **options)  # type: ignore[arg-type]
        model = adapt(streamed(checkpoint, micro_batch=1), config)
        again = run(model, batch_of())
        products, sizes = keep_in(runtime_of(model), None), []
        keep = products.keep

        def counted(value: Tensor, *, turn: int | None = None) -> Boundary:
            sizes.append(value.nbytes)
            return keep(value, turn=turn)

        products.keep = counted  # type: ignore[method-assign]
        assert_same(run(model, batch_of()), again)
        first = sum(sizes)
        assert_same(run(model, batch_of()), again)
        assert sum(sizes) <= 2 * first
        return first

    # An adapter's own products, and DoRA's second ones of what dropout leaves, have no room in plans.
    assert held(**options) <= held(r=4)


def test_what_short_batches_do_not_read_says_nothing_of_long_ones(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, made_again: list[object]
) -> None:
    model = adapt(streamed(checkpoint, micro_batch=2), lora("llama"))
    keep_in(runtime_of(model), None)
    # Attention to few keys is not kept; the last part of three sequences has half as many tokens.
    monkeypatch.setattr(unread, "_MIN_KEPT_KEYS", 12)
    for num_sequences, num_tokens in ((2, 8), (3, 16), (2, 8), (1, 16)):
        run(model, batch_of(num_sequences=num_sequences, num_tokens=num_tokens))
    made_again.clear()
    run(model, batch_of(num_tokens=16))
    assert not made_again
    assert [len(ones) for ones in runtime_of(model).unread_products.values()] == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["falcon_h1", "mamba2", "recurrent_gemma", "lfm2"])
def test_blocks_with_convolutions(name: str, tmp_path: Path) -> None:
    folder = Path(build(name, tmp_path / "model"))
    again = run(adapt(resident(folder), lora(name)), batch_of())
    model = adapt(streamed(folder, micro_batch=2), lora(name))
    assert_same(run(model, batch_of()), again)
    products = keep_in(runtime_of(model), tmp_path / "scratch")
    for _ in range(2):
        assert_same(run(model, batch_of()), again)
    assert products.held_bytes > 0


def test_what_is_kept_in_memory_comes_back_in_any_order_in_room_that_is_used_again() -> None:
    rng = random.Random(0)
    tier = ProductBoundaries(1 << 20)
    for _ in range(3):
        values = [torch.randn(rng.randrange(1, 9), rng.randrange(0, 2000)).to(torch.bfloat16) for _ in range(60)]
        kept = [tier.keep(value) for value in values]
        order = rng.sample(range(60), 60)
        for number in order:
            assert torch.equal(kept[number].take(), values[number])
            if rng.random() < 0.5:
                kept[number].release()
        del kept
        gc.collect()
        assert tier.held_bytes <= (1 << 20) + 4096 * 4096
    # More than was planned for has memory of its own, which goes with it.
    before = tier.held_bytes
    large = tier.keep(torch.ones(1 << 23))
    assert tier.held_bytes >= before + (1 << 25)
    assert torch.equal(large.take(), torch.ones(1 << 23))
    small = tier.keep(torch.arange(5))
    assert torch.equal(small.take(), torch.arange(5))
    large.release()
    small.release()
    assert tier.held_bytes < before + (1 << 25)


def test_a_collection_in_the_middle_of_keeping_gives_no_room_out_twice() -> None:
    tier = ProductBoundaries(1 << 20)

    class Taking(SlotAllocator):
        """Has a graph that was dropped collected while a slot is looked for."""

        def give_back(self, slot: FileSlot) -> None:
            assert not self.is_taking, "changed while a slot is taken"
            super().give_back(slot)

        def take(self, nbytes: int) -> FileSlot:
            self.is_taking = True
            gc.collect()
            slot = super().take(nbytes)
            self.is_taking = False
            return slot

        is_taking = False

    tier._slots = Taking()
    for number in range(20):
        kept = tier.keep(torch.full((2000,), -1.0))
        # A dropped graph, which only a collection finds.
        cycle: list[object] = [kept]
        cycle.append(cycle)
        del kept, cycle
        value = torch.full((2000,), float(number))
        first, second = tier.keep(value), tier.keep(-value)
        assert torch.equal(first.take(), value)
        assert torch.equal(second.take(), -value)
        assert tier.held_bytes <= 4 * 8192
        first.release()
        second.release()


def test_a_tier_that_nothing_refers_to_is_gone_with_its_threads_and_files(checkpoint: Path, tmp_path: Path) -> None:
    tiers = Tiers(device=CPU, trace=Trace())
    plan = lowmem.plan(checkpoint, seq_len=32, device="cpu", budget=lowmem.Budget(device="1GiB", disk=tmp_path))
    plan = replace(plan, choice=replace(plan.choice, boundary_tier="disk", keeps_products=True))

    def held() -> tuple[int, int]:
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    before = held()
    boundaries, products = tiers.open(plan)
    assert products is not None
    kept = products.keep(torch.ones(5))
    open_ones = held()
    assert open_ones > before
    for _ in range(3):
        boundaries, products = tiers.open(plan)
    del boundaries, products
    # A graph's, which works.
    assert torch.equal(kept.take(), torch.ones(5))
    kept.release()
    del kept
    until(lambda: held() == before)
    tiers.close()


def test_a_user_who_looks_inside_sees_everything_computed(checkpoint: Path) -> None:
    model = adapt(streamed(checkpoint, micro_batch=1), lora("llama"))
    expected = run(model, batch_of())
    seen: list[Tensor] = []
    inside = next(module for name, module in model.named_modules() if name.endswith("mlp.gate_proj"))
    handle = inside.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    keep_in(runtime_of(model), None)
    with pytest.warns(UserWarning, match="is inside a streamed block"):
        assert_same(run(model, batch_of()), expected)
    # The forward's and the recomputation's, for two sequences.
    assert len(seen) == 4
    # Of the first block nothing was kept, of the others nothing that somebody reads was left.
    assert [len(ones) for ones in runtime_of(model).unread_products.values()] == [0, 1, 1]
    handle.remove()


def test_a_disk_that_fails_stops_the_step_and_the_next_one_is_right(checkpoint: Path, tmp_path: Path) -> None:
    fails_to_write, fails_to_read = threading.Event(), threading.Event()

    def pwrite(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fails_to_write.is_set():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.pwritev(fd, buffers, offset)

    def pread(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fails_to_read.is_set():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(fd, buffers, offset)

    model = adapt(streamed(checkpoint, micro_batch=1), lora("llama"))
    expected = run(model, batch_of())
    tier = DiskBoundaries(CPU, Scratch(tmp_path, pwrite=pwrite, pread=pread), num_buffers=1)
    runtime_of(model).products = tier
    for event, error in ((fails_to_write, WriteError), (fails_to_read, ReadError)):
        for _ in range(2):
            event.set()
            with pytest.raises(error, match=r"(writing|reading) \d+ bytes .*Input/output error"):
                run(model, batch_of())
            event.clear()
            model.zero_grad()
            assert_same(run(model, batch_of()), expected)
    gc.collect()
    assert_same(run(model, batch_of()), expected)


# ---- by default


def wide_model(folder: Path) -> Path:
    """A block as wide as it takes for its products to be worth keeping."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tier", ["device", "disk"])
def test_plans_keep_them_where_that_is_faster_and_runs_follow(
    tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_again: list[object]
) -> None:
    monkeypatch.undo()
    folder = wide_model(tmp_path / "model")
    config = lora("llama")
    job = {"seq_len": 512, "batch_size": 2, "peft_config": config, "device": "cpu"}
    plan = lowmem.plan(folder, **job, budget=lowmem.Budget(device="2GiB"))
    assert plan.choice.keeps_products
    assert "42.03 MiB of large products kept on device, not computed again" in str(plan)
    kept = plan.bytes_of("kept products", tier="device")
    # Queries, what is made of heads, and down, which the first step finds out nobody reads; keys and values; gate and
    # up; what heads give, and a sum of each.
    assert kept == 1024 * 4 * (3 * 1024 + 2 * 512 + 2 * 2816 + 1024 + 8)
    ids = torch.randint(0, 512, (2, 512), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    theirs = run(adapt(AutoModelForCausalLM.from_pretrained(folder), config), batch)
    if tier == "disk":
        choice = replace(plan.choice, boundary_tier="disk")
        plan = replace(plan, choice=choice, disk_folder=str(tmp_path / "scratch"))
    model = adapt(lowmem.from_pretrained(folder, plan=plan, device="cpu"), config)
    runtime = runtime_of(model)
    for _ in range(2):
        ours = run(model, batch)
        assert torch.equal(ours.loss, theirs.loss)
        for key, gradient in theirs.gradients.items():
            torch.testing.assert_close(ours.gradients[key], gradient, rtol=1e-4, atol=1e-6)
    assert runtime.plan.choice.keeps_products
    assert [len(unread_ones) for unread_ones in runtime.unread_products.values()] == [1]
    held = runtime.memory()["product_bytes"]
    # Two sequences go through together.
    assert kept <= held < 1.01 * kept if tier == "device" else 0 < held <= NUM_PRODUCT_BUFFERS * 2 * 512 * 2816 * 4


def test_a_model_opened_without_a_plan_keeps_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    folder = wide_model(tmp_path / "model")
    model = get_peft_model(lowmem.from_pretrained(folder, device="cpu"), lora("llama"))
    ids = torch.randint(0, 512, (2, 512), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, labels=ids).loss.backward()
    assert runtime_of(model).plan.choice.keeps_products
    assert runtime_of(model).memory()["product_bytes"] > 0
