"""Sentences on what to change: the smallest budget that fits, or which change buys the most time. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lowmem.planning.search import Draft, Room
from lowmem.planning.step_memory import boundary_bytes, peak_phase
from offload import Placement, format_bytes, format_seconds

_WORTH = 0.95
"""A change is worth a sentence if the step takes at most this part of its time."""


_MAX_BATCH_FACTOR = 64


_NUM_GENERATIONS = {"grpo": 8, "rloo": 2}
"""Completions of a prompt by TRL's default: a batch holds whole groups of them."""


def advise(room: Room, draft: Draft, *, fits: bool) -> tuple[str, ...]:
    """Say what to change.

    Args:
        room: The job and its budget.
        draft: What was chosen; the smallest draft where nothing fits.
        fits: Whether it fits.
    """
    return tuple(_to_fit(room, draft) if not fits else _to_be_faster(room, draft))


def _to_fit(room: Room, draft: Draft) -> Iterator[str]:
    needed = draft.device_bytes
    if needed > room.device_bytes:
        yield (
            f"The smallest device budget that fits is {format_bytes(needed)} ({needed} bytes), "
            f"{format_bytes(needed - room.device_bytes)} more than given."
        )
    boundary = boundary_bytes(room.shapes, room.job)
    # On a CPU both budgets are RAM: moving activations from one to the other gains nothing.
    if room.job.device != "cpu" and draft.choice.boundary_tier == "device" and boundary > room.host_bytes:
        with_host = room.with_budget(host_bytes=boundary).smallest
        if with_host.device_bytes < needed:
            yield (
                f"With a host budget of {format_bytes(boundary)} the boundary activations move there and "
                f"{format_bytes(with_host.device_bytes)} on the device are enough."
            )
    yield from _with_disk(room, needed)
    yield from _smaller_job(room, draft)


def _with_disk(room: Room, needed: int) -> Iterator[str]:
    """What a folder to write to would change."""
    if room.has_disk:
        return
    with_disk = replace(room, has_disk=True).smallest
    if with_disk.device_bytes < needed and with_disk.choice != room.smallest.choice:
        what = "state" if with_disk.choice.state_tier == "disk" else "boundary activations"
        yield (
            f"With a folder on disk for {what}, Budget(disk=...), {format_bytes(with_disk.device_bytes)} on the device "
            "are enough."
        )


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
    if not moving and lane == "compute":
        yield "Every block stays in memory and the step is limited by computation: more memory makes it no faster."
        return
    if lane == "compute":
        yield "The step is limited by computation: transfers hide behind it, and more memory makes it hardly faster."
        return
    yield from _more_memory(room, draft)
    yield from _larger_batch(room, draft)


def _more_memory(room: Room, draft: Draft) -> Iterator[str]:
    """The budgets that keep all blocks off the disk, where that is faster."""
    short = draft.placement.streamed_bytes
    if not short:
        return
    changes = (
        ("host", room.host_bytes + short, room.with_budget(host_bytes=room.host_bytes + short)),
        ("device", room.device_bytes + short, room.with_budget(device_bytes=room.device_bytes + short)),
    )
    for tier, size, changed in changes:
        better = changed.best()
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
