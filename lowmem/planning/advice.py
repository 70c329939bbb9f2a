"""What to change: the smallest budget that fits, or which change buys the most time. Pure arithmetic.

As sentences, and where a job does not fit, as changes of `lowmem.plan`'s arguments that each make it fit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lowmem.planning.search import Draft, Memory, Room
from lowmem.planning.step_memory import boundary_bytes, peak_bytes, peak_phase, product_bytes
from offload import Budget, Placement, format_bytes, format_seconds, round_up

_WORTH = 0.95
"""A change is worth a sentence if the step takes at most this part of its time."""


_MAX_BATCH_FACTOR = 64


_NUM_GENERATIONS = {"grpo": 8, "rloo": 2}
"""Completions of a prompt by TRL's default: a batch holds whole groups of them."""


_MOST_SEQUENCES = 4096
"""The largest batch that is looked at."""


_FAST_ENOUGH = 0.95
"""A smaller batch is taken if it goes through at least this part of the tokens per second."""


_SEQ_LEN_STEP = 64


_HOST_STEP_BYTES = 1 << 20


_SIZE_STEP_BYTES = 16 << 20


_MOST_TIGHTENINGS = 8
"""How often a budget is made smaller by what the plan within it takes."""


NOTHING_FITS = "Nothing fits on such a machine"
"""How the sentence begins that says so, and the verdict ends."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change of a job or a budget; what is None stays."""

    text: str
    """It in words."""
    batch_size: int | None = None
    """Examples of a forward."""
    gradient_accumulation_steps: int | None = None
    """Batches per optimizer step, so that a step trains on as many examples as before."""
    seq_len: int | None = None
    """Tokens of a sequence; what is generated shrinks with it."""
    device_bytes: int | None = None
    """Device budget."""
    host_bytes: int | None = None
    """Host budget."""
    needs_disk: bool = False
    """Whether a folder to write to is given."""
    frees_split: bool = False
    """Whether the planner chooses micro-batch and chunk length, instead of what was asked for."""

    def applied(
        self, arguments: Mapping[str, object], *, disk: str | os.PathLike[str] | None = None
    ) -> dict[str, object]:
        """Arguments of `lowmem.plan` with this change made.

        Args:
            arguments: What the plan that does not fit was made with, keywords only.
            disk: Folder to write to, where the change needs one.

        Raises:
            ValueError: It needs a folder, and none is given.
        """
        changed = dict(arguments)
        for name in ("batch_size", "gradient_accumulation_steps", "seq_len"):
            if getattr(self, name) is not None:
                changed[name] = getattr(self, name)
        if self.seq_len is not None and isinstance(completion := changed.get("completion_tokens"), int):
            changed["completion_tokens"] = min(completion, self.seq_len)
        if self.frees_split:
            changed |= {"micro_batch": None, "chunk_tokens": None}
        budget = changed.get("budget") or Budget()
        assert isinstance(budget, Budget)
        if self.needs_disk and disk is None and budget.disk is None:
            raise ValueError(f"{self.text}: give disk=, a folder to write to")
        changed["budget"] = Budget(
            device=budget.device if self.device_bytes is None else self.device_bytes,
            host=budget.host if self.host_bytes is None else self.host_bytes,
            disk=disk if self.needs_disk and disk is not None else budget.disk,
        )
        return changed


def _with_batch(room: Room, size: int) -> Room:
    """The same with another batch, and as many examples per optimizer step."""
    steps = room.job.gradient_accumulation_steps * room.job.batch_size // size
    # Whether there is a mask follows from the batch.
    job = replace(room.job, batch_size=size, gradient_accumulation_steps=steps, micro_batch=None, has_mask=None)
    return replace(room, job=job)


def changes_that_fit(room: Room) -> tuple[Change, ...]:
    """Changes that each make a job fit that does not, those first that change least of what is trained.

    Args:
        room: The job and its budget.
    """
    found = tuple(change for change in _candidates(room) if change is not None)
    last = _last_resort(room) if not found else None
    return found if last is None else (last,)


def _candidates(room: Room) -> Iterator[Change | None]:
    job = room.job
    if job.micro_batch is not None or job.chunk_tokens is not None:
        freed = replace(room, job=replace(job, micro_batch=None, chunk_tokens=None))
        if freed.best() is not None:
            yield Change(text="leave micro_batch and chunk_tokens to the planner", frees_split=True)
    yield _smaller_batch(room)
    if not room.has_disk and replace(room, has_disk=True).best() is not None:
        what = "state" if job.tuning == "full" else "boundary activations"
        yield Change(text=f"a folder on disk for {what}: Budget(disk=...), or --disk", needs_disk=True)
    yield _larger_host(room)
    yield _shorter_sequences(room)
    yield _smallest_batch_with_more(room)
    needed = _more_device(room)
    if needed is not None:
        yield Change(text=f"a device budget of {format_bytes(needed)}", device_bytes=needed)


def _more_device(room: Room) -> int | None:
    """The device budget with which a job fits that does not with its own; None where the machine has none such."""
    needed = room.smallest.device_bytes
    best = room.with_budget(device_bytes=needed).best() if needed > room.device_bytes else None
    if best is None:
        return None
    # With that much the planner may find a way that takes less, and with that, another.
    for _ in range(_MOST_TIGHTENINGS):
        if best is None or best.device_bytes >= needed:
            break
        needed = best.device_bytes
        best = room.with_budget(device_bytes=needed).best()
    return needed if room.may_have(device_bytes=needed) else None


def _last_resort(room: Room) -> Change | None:
    """The smallest batch, the longest sequences that fit then, and the budget that they take; None if nothing fits."""
    job, fewest = room.job, _NUM_GENERATIONS.get(room.job.task, 1)
    shrinks = job.batch_size > fewest and job.batch_size % fewest == 0
    least = _with_batch(room, fewest) if shrinks else room
    most = room.device_bytes if room.memory is None else max(room.device_bytes, room.memory.device_bytes)
    roomy = least.with_budget(device_bytes=most)
    seq_len = job.seq_len if roomy.best() is not None else _longest(roomy, shortest=1)
    if seq_len is None:
        return None
    fits = least.with_seq_len(seq_len)
    size = None if fits.best() is not None else _more_device(fits) or roomy.device_bytes
    words = [f"sequences of {seq_len} tokens"] if seq_len < job.seq_len else []
    words += [] if size is None else [f"a device budget of {format_bytes(size)}"]
    steps = least.job.gradient_accumulation_steps
    words = [*([f"a batch of {fewest} with gradient_accumulation_steps={steps}"] if shrinks else []), *words]
    return Change(
        text=" and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words),
        batch_size=fewest if shrinks else None,
        gradient_accumulation_steps=steps if shrinks else None,
        seq_len=seq_len if seq_len < job.seq_len else None,
        device_bytes=size,
    )


def _smaller_batch(room: Room) -> Change | None:
    """The largest batch that fits, with as many examples per optimizer step."""
    job = room.job
    fewest = _NUM_GENERATIONS.get(job.task, 1)
    for size in range(job.batch_size - 1, 0, -1):
        if job.batch_size % size or size % fewest:
            continue
        smaller = _with_batch(room, size)
        if smaller.best() is not None:
            steps = smaller.job.gradient_accumulation_steps
            text = f"a batch of {size} with gradient_accumulation_steps={steps}: the same gradients in {steps} times "
            text += f"{job.gradient_accumulation_steps} passes" if job.gradient_accumulation_steps > 1 else "the passes"
            return Change(text=text, batch_size=size, gradient_accumulation_steps=steps)
    return None


def _smallest_batch_with_more(room: Room) -> Change | None:
    """The smallest batch and the budget that it takes, where that is less than what the whole batch takes."""
    job, fewest = room.job, _NUM_GENERATIONS.get(room.job.task, 1)
    if job.batch_size <= fewest or job.batch_size % fewest:
        return None
    least = _with_batch(room, fewest)
    steps, needed = least.job.gradient_accumulation_steps, _more_device(least)
    if needed is None or needed >= room.smallest.device_bytes:
        return None
    return Change(
        text=f"a batch of {fewest} with gradient_accumulation_steps={steps} and a device budget of "
        f"{format_bytes(needed)}",
        batch_size=fewest,
        gradient_accumulation_steps=steps,
        device_bytes=needed,
    )


def _larger_host(room: Room) -> Change | None:
    """The smallest host budget with which the job fits."""
    enough = room.host_bytes + (1 << 50) if room.memory is None else room.memory.host_bytes
    if enough <= room.host_bytes or room.with_budget(host_bytes=enough).best() is None:
        return None
    short, fits = room.host_bytes, enough
    while fits - short > _HOST_STEP_BYTES:
        middle = (short + fits) // 2
        short, fits = (short, middle) if room.with_budget(host_bytes=middle).best() is not None else (middle, fits)
    size = min(enough, round_up(fits, _HOST_STEP_BYTES))
    if room.with_budget(host_bytes=size).best() is None:
        return None
    return Change(text=f"a host budget of {format_bytes(size)}", host_bytes=size)


def _shorter_sequences(room: Room) -> Change | None:
    """The longest sequences that fit, at least an eighth as long."""
    seq_len = _longest(room, shortest=room.job.seq_len // 8)
    if seq_len is None or seq_len >= room.job.seq_len:
        return None
    return Change(text=f"sequences of {seq_len} tokens", seq_len=seq_len)


def _longest(room: Room, *, shortest: int) -> int | None:
    """The longest sequences that fit, in whole steps where they are long; None where not even the shortest do.

    Args:
        room: The job, whose own sequences are too long, and its budget.
        shortest: Tokens.
    """
    seq_len = room.job.seq_len
    steps = (_SEQ_LEN_STEP, 1) if seq_len > 4 * _SEQ_LEN_STEP else (1,)
    for step in steps:
        short, long = max(1, shortest // step), seq_len // step
        if room.with_seq_len(short * step).best() is None:
            continue
        while long - short > 1:
            middle = (short + long) // 2
            short, long = (middle, long) if room.with_seq_len(middle * step).best() is not None else (short, middle)
        return short * step
    return None


def hiding_batch(room: Room, draft: Draft) -> int | None:
    """The batch from which on a step is limited by computation; None where no batch that fits is.

    Args:
        room: The job and its budget.
        draft: What was chosen for the job's own batch.
    """

    def is_hidden(batch_size: int) -> bool | None:
        made = room.with_batch_size(batch_size).best()
        return None if made is None else made.time.bottleneck == "compute"

    fewest = _NUM_GENERATIONS.get(room.job.task, 1)
    short, large = 0, max(1, room.job.batch_size // fewest)
    if draft.time.bottleneck != "compute":
        short, large = large, _MOST_SEQUENCES // fewest
    # Transfers take as long whatever the batch, so that from one batch on all are hidden, or do not fit.
    while large - short > 1:
        middle = (short + large) // 2
        short, large = (short, middle) if is_hidden(middle * fewest) is not False else (middle, large)
    return large * fewest if is_hidden(large * fewest) else None


def fastest_batch(room: Room) -> int:
    """The smallest batch with which nearly as many tokens go through per second as with any; 1 where none fits.

    Args:
        room: The job, whose batch does not matter, and its budget.
    """
    fewest = _NUM_GENERATIONS.get(room.job.task, 1)
    speeds: dict[int, float] = {}
    batch_size = fewest
    while batch_size <= _MOST_SEQUENCES:
        made = room.with_batch_size(batch_size).best()
        if made is None:
            break
        speeds[batch_size] = batch_size / made.time.step_s
        best = max(speeds.values())
        if len(speeds) > 3 and speeds[batch_size] < 1.01 * speeds[batch_size // 4]:
            break
        batch_size *= 2
    if not speeds:
        return fewest
    return min(size for size, speed in speeds.items() if speed >= _FAST_ENOUGH * best)


def advise(room: Room, draft: Draft, *, fits: bool, changes: tuple[Change, ...] = ()) -> tuple[str, ...]:
    """Say what to change.

    Args:
        room: The job and its budget.
        draft: What was chosen; the smallest draft where nothing fits.
        fits: Whether it fits.
        changes: That make it fit.
    """
    if fits:
        return (*_to_be_faster(room, draft), *_too_long(room))
    nothing = () if changes or room.memory is None else (_nothing_fits(room, room.memory),)
    return (*_to_fit(room, draft), *nothing, *_too_long(room))


def _nothing_fits(room: Room, memory: Memory) -> str:
    least = room.with_batch_size(_NUM_GENERATIONS.get(room.job.task, 1)).with_seq_len(1).smallest
    return (
        f"{NOTHING_FITS}: it has {format_bytes(memory.device_bytes)} for the device budget, and the smallest "
        f"batch of sequences of one token takes {format_bytes(least.device_bytes)} of the device and "
        f"{format_bytes(peak_bytes(least.roles, 'host'))} of the host."
    )


def _too_long(room: Room) -> Iterator[str]:
    """Memory and time are right all the same; what the model makes of such sequences is another matter."""
    longest = room.shapes.max_positions
    if longest is not None and room.job.seq_len > longest:
        yield (
            f"Sequences of {room.job.seq_len} tokens exceed this model's {longest} positions "
            f"(max_position_embeddings): learned ones end there, others are untrained beyond; seq_len={longest} is "
            "within."
        )


def _to_fit(room: Room, draft: Draft) -> Iterator[str]:
    needed = draft.device_bytes
    if needed > room.device_bytes:
        beyond = ""
        if room.memory is not None and not room.may_have(device_bytes=needed):
            beyond = f", and the machine has {format_bytes(room.memory.device_bytes)} for it"
        yield (
            f"The smallest device budget that fits is {format_bytes(needed)} ({needed} bytes), "
            f"{format_bytes(needed - room.device_bytes)} more than given{beyond}."
        )
    boundary = boundary_bytes(room.shapes, room.job)
    # On a CPU both budgets are RAM: moving activations from one to the other gains nothing.
    if room.job.device != "cpu" and draft.choice.boundary_tier == "device" and boundary > room.host_bytes:
        with_host = room.with_budget(host_bytes=boundary).smallest
        if with_host.device_bytes < needed and room.may_have(host_bytes=boundary):
            yield (
                f"With a host budget of {format_bytes(boundary)} the boundary activations move there and "
                f"{format_bytes(with_host.device_bytes)} on the device are enough."
            )
    # Where there is a folder already, this is the same draft.
    with_disk = replace(room, has_disk=True).smallest
    if with_disk.device_bytes < needed and with_disk.choice != room.smallest.choice:
        what = "state" if with_disk.choice.state_tier == "disk" else "boundary activations"
        yield (
            f"With a folder on disk for {what}, Budget(disk=...), {format_bytes(with_disk.device_bytes)} on the device "
            "are enough."
        )
    optimizer = room.shapes.optimizer
    in_ram = 0 if optimizer is None or optimizer.is_flat else optimizer.state_bytes
    if optimizer is not None and in_ram and draft.choice.state_tier == "disk":
        yield (
            f"{optimizer.name} keeps {format_bytes(in_ram)} of state in RAM: lowmem.optim.AdamW(model) has its own on "
            "disk with the weights, and lowmem.full.state_on_disk(optimizer) brings those of others there."
        )
    yield from _smaller_job(room, draft)


def _smaller_job(room: Room, draft: Draft) -> Iterator[str]:
    """What takes most of the part that the job decides, and how to make it smaller."""
    job = room.job
    fewest = _NUM_GENERATIONS.get(job.task, 1)
    if job.batch_size > fewest:
        smaller = room.with_batch_size(fewest).smallest.device_bytes
        if smaller < draft.device_bytes and fewest == 1:
            yield (
                f"A batch of one takes {format_bytes(smaller)}; gradient_accumulation_steps={job.batch_size} then "
                f"gives the same gradients with {job.batch_size} times the passes over the weights."
            )
        elif smaller < draft.device_bytes:
            yield (
                f"A batch of {fewest}, one prompt's num_generations={fewest}, takes {format_bytes(smaller)}; what "
                "gradients are accumulated over is generated together, so that accumulation saves no room there."
            )
    if peak_phase(draft.roles, "device") != "embedding" and job.seq_len > 1:
        half = room.with_seq_len(job.seq_len // 2).smallest.device_bytes
        if half < draft.device_bytes:
            yield f"Sequences of {job.seq_len // 2} tokens take {format_bytes(half)}."


def _to_be_faster(room: Room, draft: Draft) -> Iterator[str]:
    moving = [place for place in draft.placement.placements if place == Placement.STREAMED]
    lane = draft.time.bottleneck
    products = list(_more_for_products(room, draft)) if lane == "compute" else []
    if products:
        yield from products
        return
    if not moving and lane == "compute":
        yield "Every block stays in memory and the step is limited by computation: more memory makes it no faster."
        return
    if lane == "compute":
        yield "The step is limited by computation: transfers hide behind it, and more memory makes it hardly faster."
        return
    yield from _more_memory(room, draft)
    yield from _larger_batch(room, draft)


def _more_for_products(room: Room, draft: Draft) -> Iterator[str]:
    """The budget with which large products are kept for the backward, and what a folder for them would do."""
    if draft.choice.keeps_products or room.placement is not None:
        return
    # Whole sequences take more besides where blocks go in chunks.
    needed = product_bytes(room.shapes, room.job)
    wanted = (room.with_budget(device_bytes=room.device_bytes + times * needed).best() for times in (1, 2, 4))
    better = next((found for found in wanted if found is not None and found.choice.keeps_products), None)
    if better is None or better.time.step_s > _WORTH * draft.time.step_s:
        return
    # As it is printed it may be less by half of its last digit.
    size = round_up(better.device_bytes + _SIZE_STEP_BYTES // 2, _SIZE_STEP_BYTES)
    if room.may_have(device_bytes=size):
        yield (
            f"A device budget of {format_bytes(size)} keeps large products for the backward instead of "
            f"computing them again: {format_seconds(better.time.step_s)} per step."
        )
    on_disk = None if room.has_disk else replace(room, has_disk=True).best()
    if on_disk is not None and on_disk.choice.keeps_products:
        yield (
            f"With Budget(disk=...) they are kept there: {format_seconds(on_disk.time.step_s)} per step, and "
            f"{format_bytes(on_disk.time.written_bytes)} written in each."
        )


def _more_memory(room: Room, draft: Draft) -> Iterator[str]:
    """The budgets that keep all blocks off the disk, where that is faster."""
    short = draft.placement.streamed_bytes
    if not short:
        return
    changes = (("host", room.host_bytes + short), ("device", room.device_bytes + short))
    for tier, size in changes:
        sizes = {f"{tier}_bytes": size}
        better = room.with_budget(**sizes).best() if room.may_have(**sizes) else None
        if better is not None and better.time.step_s <= _WORTH * draft.time.step_s:
            yield (
                f"A {tier} budget of {format_bytes(size)} (+{format_bytes(short)}) keeps all blocks in memory: "
                f"{format_seconds(better.time.step_s)} per step, limited by {better.time.bottleneck}."
            )
            # On a CPU both are the same RAM: one sentence is enough.
            if room.job.device == "cpu":
                return


def _larger_batch(room: Room, draft: Draft) -> Iterator[str]:
    """The largest batch that costs hardly more time, because the step waits for weights."""
    found = None
    batch_size = room.job.batch_size
    while batch_size < _MAX_BATCH_FACTOR * room.job.batch_size:
        batch_size *= 2
        larger = room.with_batch_size(batch_size).best()
        if larger is None or larger.time.step_s > 1.1 * draft.time.step_s:
            break
        found = batch_size, larger.time.step_s
    if found is not None:
        times = found[0] // room.job.batch_size
        yield (
            f"The step waits for weights, whatever the batch: batch_size={found[0]} takes {format_seconds(found[1])} "
            f"instead of {format_seconds(draft.time.step_s)} and goes through {times} times as many tokens."
        )
