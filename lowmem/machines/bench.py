"""`lowmem bench`: measures disk, copies and a model's shapes on this machine, and keeps the rates for plans."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lowmem.machines.measured import measure_shape
from lowmem.machines.rates import (
    SLOW,
    UNSTEADY,
    KeptRates,
    Pace,
    Stopwatch,
    is_steadier,
    keep,
    keep_pace,
    measure_rates,
    read_kept,
)
from lowmem.models.checkpoint import Opened, open_checkpoint, pick_device, resolve
from lowmem.packing.place import as_if_packed
from lowmem.planning.read_model import read_shapes
from lowmem.planning.shapes import ModelShapes
from lowmem.planning.step_time import ShapeRates, Trained
from offload import Budget, probe_disk, probe_scratch

_DISK_S, _DISK_BYTES = 2.0, 1 << 30


def bench_lines(
    model: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    quantization: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    disk: str | Path | None = None,
    autocast: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Mapping[str, object]]:
    """Measure and keep the rates of a model's shapes on this machine.

    Args:
        model: Local folder, or hub id, of a safetensors checkpoint.
        device: Compute device.
        dtype: Compute dtype.
        quantization: Measure what the model takes packed so; nothing is packed. None: as it is stored.
        revision: Branch, tag or commit of the hub repository.
        trust_remote_code: As in transformers.
        disk: Folder in which steps will write what they read back (`Budget(disk=...)`): half a gigabyte is written
            there for a moment. It has to be there. None to take it for as fast as the checkpoint is read.
        autocast: Time a half type under autocast to it.
        clock: Seconds of computing; another than the wall clock's where other programs run.

    Yields:
        One flat record for each setting of the disk, then for copies, products, and each thing that may train; then
        the machine's pace meanwhile, and the file of what is kept: as it was where the machine was steadier then.

    Raises:
        SourceError: A file is missing, damaged or empty.
        ReadError: A file cannot be read.
        UnsupportedError: The architecture cannot be streamed.
        ValueError: `disk` is no folder that can be written to.
        WriteError: It is full, or broken.
    """
    scratch = None if disk is None else _folder_to_write(disk)
    folder, chosen = resolve(model, revision=revision), pick_device(device)

    def opened() -> Opened:
        found = open_checkpoint(
            folder, name=str(model), device=chosen, dtype=dtype, trust_remote_code=trust_remote_code
        )
        return found if quantization is None else as_if_packed(found, quantization)

    checkpoint = opened()
    with checkpoint.source as source:
        bare = read_shapes(checkpoint)
        read = probe_disk(source.files, max_s=_DISK_S, max_bytes=_DISK_BYTES)
    for setting in read.measured:
        yield {
            "probe": "disk",
            "folder": str(folder),
            "gb_per_s": round(setting.read_bytes_per_s / 1e9, 3),
            "num_requests": setting.num_threads,
            "request_bytes": setting.request_bytes,
            "is_chosen": (setting.num_threads, setting.request_bytes) == (read.num_threads, read.request_bytes),
        }
    rates, pace = measure_rates(read, device=chosen, dtype=checkpoint.dtype), Pace(Stopwatch(chosen, clock))
    if scratch is not None:
        rates = replace(rates, scratch_bytes_per_s=probe_scratch(scratch))
        moved = round(rates.moved_bytes_per_s / 1e9, 3)
        yield {"probe": "written and read back", "folder": str(scratch), "gb_per_s": moved}
    common = _machine(chosen)
    yield {"probe": "copy", "gb_per_s": round(rates.copy_bytes_per_s / 1e9, 3), **common}
    yield {
        "probe": "compute",
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "gflop_per_s": round(rates.compute_flops_per_s / 1e9, 2),
        **common,
    }
    found: dict[str, ShapeRates] = {}
    timed = partial(_timed, found=found, autocast=autocast, clock=clock, common=common)
    for trains in _trained(checkpoint, bare):
        yield {"probe": "blocks", "trains": trains, **timed(opened(), trains)}
        pace.look()
    # Another clock's seconds are not compared with what others took, nor is that with them.
    seen = pace.seen if clock is time.perf_counter else None
    yield from _kept(KeptRates(rates=rates, shapes=found, pace=seen), pace, bare, device=chosen, autocast=autocast)


def _machine(device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    numbers = {"torch": torch.__version__, "num_threads": torch.get_num_threads()}
    return {"device": name, "machine": platform.machine(), **numbers}


def _kept(
    measured: KeptRates, pace: Pace, bare: ModelShapes, *, device: torch.device, autocast: bool
) -> Iterator[Mapping[str, object]]:
    """Keep what was measured, and say how steady the machine was."""
    before_ms = None if measured.pace is None else keep_pace(measured.pace, device)
    yield {
        "probe": "pace",
        "looks_ms": pace.looks_ms,
        "slowest_over_fastest": round(pace.slowest_over_fastest, 3),
        # Other programs that run all the while make all looks slow.
        "slower_than_before": None if before_ms is None else round(pace.seen.fastest_ms / before_ms, 3),
        "is_disturbed": pace.seen.is_disturbed(before_ms),
    }
    stays = is_steadier(read_kept(bare, device, autocast=autocast), measured.pace, before_ms)
    kept = keep(measured, bare, device, autocast=autocast)
    yield {"probe": "kept", "file": None if kept is None else str(kept), "is_of_before": stays}


def _folder_to_write(disk: str | Path) -> Path:
    """The folder that is meant, checked before anything is measured; it is not made, for a typo names another drive.

    Raises:
        ValueError: It is a file, not there, or cannot be written to.
    """
    folder = Budget(disk=disk).disk
    assert folder is not None
    if not folder.exists():
        raise ValueError(f"disk: {folder}: no such folder; make it first, on the drive that steps will write to")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"disk: {folder} cannot be written to; give a folder that can")
    return folder


def disturbances(line: Mapping[str, object]) -> Iterator[str]:
    """What a person should be told of a record of `bench_lines`, in sentences."""
    off = "something else has its processor, and plans may be off by as much; measure again when it is quiet"
    changed, slower = line.get("slowest_over_fastest"), line.get("slower_than_before")
    if isinstance(changed, float) and changed > UNSTEADY:
        yield f"this machine was up to {changed:.2f} times as slow as at other times of the measurement: {off}"
    if isinstance(slower, float) and slower > SLOW:
        yield f"a fixed product took {slower:.1f} times as long as it has here before: {off}"
    if line.get("is_of_before"):
        yield (
            "the rates that were kept before stay, since the machine was steadier when they were measured; "
            f"delete {line['file']} to have new ones all the same"
        )


def _timed(
    fresh: Opened,
    trains: Trained,
    *,
    found: dict[str, ShapeRates],
    autocast: bool,
    clock: Callable[[], float],
    common: Mapping[str, object],
) -> Mapping[str, object]:
    """Time a model's shapes, put what they took into `found`, and return what to say of it."""
    fresh.source.close()
    try:
        found[trains] = measure_shape(fresh, _shapes(fresh, trains), trains=trains, autocast=autocast, clock=clock)
    # PEFT has no such adapter for one of its layers (DoRA of stacked experts, for instance), or the code cannot be run.
    except (ValueError, NotImplementedError) as error:
        return {"skipped": str(error)}
    return {**asdict(found[trains]), **common}


def _trained(opened: Opened, bare: ModelShapes) -> tuple[Trained, ...]:
    """What can train there: every weight only of a model that is not packed."""
    is_packed = any(recipe.formats for streamed in opened.built.blocks for recipe in streamed.recipes)
    can_be_full = opened.device.type == "cpu" and opened.dtype == torch.float32 and not is_packed
    of_experts: tuple[Trained, ...] = ("lora of experts",) if _has_experts(bare) else ()
    return ("lora", *of_experts, "dora", *(("full",) if can_be_full else ()))


def _has_experts(shapes: ModelShapes) -> bool:
    return any(block.experts is not None for block in shapes.blocks)


def _shapes(opened: Opened, trains: Trained) -> ModelShapes:
    bare = read_shapes(opened)
    if trains == "full":
        return bare.with_every_weight()
    from peft import LoraConfig

    target: str | list[str] = "all-linear"
    if _has_experts(bare) and trains != "lora of experts":
        # PEFT adapts stacked experts too where it is told the names of their layers, and a block takes several times as
        # long then: attention is what has adapters in most such jobs.
        modules = (pair for streamed in opened.built.blocks for pair in streamed.block.module.named_modules())
        attention = {path: module for path, module in modules if "Attention" in type(module).__name__}
        target = sorted(
            f"{path}.{name}"
            for path, parent in attention.items()
            for name, module in parent.named_modules()
            if isinstance(module, nn.Linear)
        )
    config = LoraConfig(r=16, target_modules=target, use_dora=trains == "dora")
    return read_shapes(opened, peft_config=config)
