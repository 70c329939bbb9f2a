"""Checks of this machine, of what lies in a folder, and measurements: what is there, what is missing, what to do."""

from __future__ import annotations

import os
import resource
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lowmem.errors import some_of
from lowmem.internals.torch import has_fast_bf16
from lowmem.models.checkpoint import open_checkpoint, pick_device, pick_dtype
from lowmem.models.configuration import read_object
from lowmem.quantization.manifest import MANIFEST, read_manifest
from offload import (
    PAGE_BYTES,
    OffloadError,
    SafetensorsSource,
    StagingBuffer,
    Store,
    available_ram_bytes,
    control_groups,
    format_bytes,
    open_source,
    probe_disk,
    register_host_memory,
    unregister_host_memory,
    verify_store,
)

_NEEDED_TO_TRAIN = ("torch", "safetensors", "transformers", "peft", "trl", "accelerate", "datasets")
_SMALL_RAM_BYTES = 1 << 30
_SLOW_DISK_BYTES_PER_S = 3e8


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    """What."""
    finding: str
    """What was found."""
    remedy: str = ""
    """What to do about it; empty where nothing has to be done."""
    is_broken: bool = False
    """Whether training cannot work before that is done."""


def examine(folder: Path | None, *, trust_remote_code: bool = False) -> Iterator[Check]:
    """Look at versions, memory, devices and, with a folder, at what lies in it and the disk it lies on.

    Args:
        folder: A model, an adapter, a Trainer's checkpoint or a store; None to leave the checks of files out.
        trust_remote_code: As in transformers.
    """
    yield from _versions()
    yield from _memory()
    yield _pinning()
    yield _gpu()
    yield from _fragmentation()
    yield _defaults()
    if folder is not None:
        yield from check_folder(folder, trust_remote_code=trust_remote_code)


def _versions() -> Iterator[Check]:
    ranges = _supported_versions()
    for name in _NEEDED_TO_TRAIN:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check(name=name, finding="not installed", remedy="pip install 'lowmem[train]'", is_broken=True)
            continue
        needed = ranges.get(name, SpecifierSet())
        fits = needed.contains(found, prereleases=True)
        remedy = "" if fits else f"pip install -U '{name}{needed}'"
        yield Check(name=name, finding=found, remedy=remedy, is_broken=not fits)


def _supported_versions() -> dict[str, SpecifierSet]:
    """Versions that this package's own metadata asks for; none where it runs from its source folder."""
    try:
        requirements = metadata.requires("lowmem") or []
    except metadata.PackageNotFoundError:
        return {}
    return {entry.name: entry.specifier for entry in map(Requirement, requirements)}


def _memory() -> Iterator[Check]:
    free_bytes = available_ram_bytes()
    is_small = free_bytes < _SMALL_RAM_BYTES
    remedy = "close other programs or raise the limit: Python and its libraries alone take over half a GiB"
    yield Check(name="RAM", finding=f"{format_bytes(free_bytes)} can be taken", remedy=remedy if is_small else "")
    limits = [(group.limit_bytes, group) for group in control_groups() if group.limit_bytes is not None]
    finding = "none set by a control group"
    if limits:
        limit_bytes, group = min(limits, key=lambda limit: limit[0])
        finding = f"{format_bytes(limit_bytes)}, {format_bytes(group.usage_bytes)} in use ({group.path})"
    yield Check(name="memory limit", finding=finding)


_TRIED_BYTES = 256 << 20
"""What doctor page-locks to see whether that can be had: about the largest block of an 8B model."""


def _pinning() -> Check:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    finding = "unlimited" if limit == resource.RLIM_INFINITY else f"up to {format_bytes(limit)} for one process"
    if not torch.cuda.is_available():
        return Check(name="locked memory", finding=finding)
    # The driver keeps to limits of its own: only trying tells.
    memory = torch.empty(_TRIED_BYTES, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        is_locked = register_host_memory(memory)
    if is_locked:
        unregister_host_memory(memory)
        return Check(name="locked memory", finding=f"the driver locks {format_bytes(_TRIED_BYTES)}; limit {finding}")
    return Check(
        name="locked memory",
        finding=f"the driver refuses {format_bytes(_TRIED_BYTES)}; limit {finding}",
        remedy="copies to the GPU are slower without, and none runs beside computation: ulimit -l unlimited, in a "
        "container --ulimit memlock=-1, in WSL2 a larger memory= in .wslconfig",
    )


def _fragmentation() -> Iterator[Check]:
    if not torch.cuda.is_available():
        return
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    if "expandable_segments:True" in settings:
        yield Check(name="GPU allocator", finding=settings)
    else:
        yield Check(
            name="GPU allocator",
            finding=f"PYTORCH_ALLOC_CONF={settings!r}" if settings else "default segments",
            remedy="where batches have many lengths, PYTORCH_ALLOC_CONF=expandable_segments:True keeps reserved memory "
            "close to what is used",
        )


def _gpu() -> Check:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        free_bytes, total_bytes = torch.cuda.mem_get_info(0)
        bf16 = "with bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "without bf16"
        return Check(
            name="GPU",
            finding=f"{properties.name}, {format_bytes(free_bytes)} of {format_bytes(total_bytes)} free, {bf16}",
        )
    if torch.version.cuda is None:
        return Check(name="GPU", finding="none used: this torch was built without CUDA; computing on the CPU")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "found by the CUDA driver" if hidden is None else f"left by CUDA_VISIBLE_DEVICES={hidden!r}"
    return Check(name="GPU", finding=f"none {why}; computing on the CPU")


def _defaults() -> Check:
    device = pick_device(None)
    dtype = str(pick_dtype(None, device=device, stored=torch.bfloat16)).removeprefix("torch.")
    finding = f"device {device.type}, dtype {dtype}, {torch.get_num_threads()} threads"
    if device.type == "cpu":
        bf16 = "there" if has_fast_bf16() else "not there: bf16 would be up to 100 times slower"
        finding += f", bf16 instructions {bf16}"
    return Check(name="defaults", finding=finding)


def check_folder(folder: Path, *, trust_remote_code: bool = False) -> Iterator[Check]:
    """Check a model, an adapter, a Trainer's checkpoint or a store without loading it; nothing is changed.

    Args:
        folder: Where it lies.
        trust_remote_code: As in transformers.
    """
    yield from _entries(folder)
    if (folder / "trainer_state.json").exists():
        yield from _trainer_checkpoint(folder, trust_remote_code=trust_remote_code)
    elif Store.exists(folder):
        yield from _store(folder)
    elif (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        yield _checked("adapter", _adapter, folder)
    elif _is_cut_off(folder):
        yield _cut_off(folder)
    else:
        yield from _files(folder, trust_remote_code=trust_remote_code)
        if (folder / MANIFEST).exists():
            yield _checked("packed", _packed, folder)


def _checked(name: str, check: Callable[[Path], Check], folder: Path) -> Check:
    """What a check says, or that it could not read what it was to check."""
    try:
        return check(folder)
    except (OffloadError, ValueError, FileNotFoundError) as error:
        return _failed(name, error)


def _entries(folder: Path) -> Iterator[Check]:
    """What lies in a folder by kind and owner, links not followed."""
    from lowmem.models.checkpoint import stays_inside

    strange, leaving, foreign, writable = [], [], [], []
    for place, folders, files in os.walk(folder):
        for path in (Path(place) / name for name in (*folders, *files)):
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                if not stays_inside(path, folder):
                    leaving.append(f"{path.relative_to(folder)} -> {os.readlink(path)}")
                continue
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                strange.append(str(path.relative_to(folder)))
            if status.st_uid not in (os.getuid(), 0):
                foreign.append(f"{path.relative_to(folder)} (user {status.st_uid})")
            if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
                writable.append(str(path.relative_to(folder)))
    found = False
    for names, what, remedy, is_broken in (
        (strange, "neither files nor folders", "remove them: reading a pipe would wait for ever", True),
        (leaving, "links that lead out of the folder", "put copies of the files in their place", False),
        (foreign, "of another user, who may change it", "copy the folder, so that it is yours", False),
        (writable, "writable by everybody", f"chmod -R o-w {folder}", False),
    ):
        if names:
            found = True
            yield Check(name="folder", finding=f"{what}: {some_of(names)}", remedy=remedy, is_broken=is_broken)
    if not found:
        yield Check(name="folder", finding="regular files of yours, no links that lead out of it")


def _trainer_checkpoint(folder: Path, *, trust_remote_code: bool) -> Iterator[Check]:
    """Everything that `train(resume_from_checkpoint=...)` reads; nothing is unpickled but tensors and numbers."""
    yield _checked("checkpoint", _progress, folder)
    from lowmem.monitoring.resume_checks import ARCHIVES

    for name, what in ARCHIVES.items():
        yield _archive(folder / name, without=what)
    if (folder / "adapter_config.json").exists():
        yield _checked("adapter", _adapter, folder)
    else:
        yield from _files(folder, trust_remote_code=trust_remote_code)
    from lowmem.full.saving import FOLDER

    if (folder / FOLDER).is_dir():
        yield _checked("moments", _moments, folder)


def _is_cut_off(folder: Path) -> bool:
    """Whether a folder has a Trainer's name for a checkpoint, and nothing of one."""
    from lowmem.monitoring.resume_checks import TRAINER_CHECKPOINT

    return TRAINER_CHECKPOINT.fullmatch(folder.resolve().name) is not None and not (folder / "config.json").exists()


def _cut_off(folder: Path) -> Check:
    """What to do with it."""
    from lowmem.monitoring.resume_checks import newest_complete

    parent = folder.resolve().parent
    found = (newest_complete(parent, is_adapter=is_adapter, but=folder) for is_adapter in (True, False))
    newest = next((path for path in found if path is not None), None)
    remedy = f"no other checkpoint in {parent} is complete: train anew"
    if newest is not None:
        remedy = f"trainer.train(resume_from_checkpoint={str(newest)!r}), the newest complete one"
    finding = "not whole: no trainer_state.json; it is being written, or its run ended meanwhile"
    return Check(name="checkpoint", finding=finding, remedy=remedy, is_broken=True)


def _progress(folder: Path) -> Check:
    state = read_object(folder / "trainer_state.json")
    return Check(name="checkpoint", finding=f"step {state.get('global_step')} of {state.get('max_steps')}")


_ANOTHER_CHECKPOINT = "resume from another checkpoint, or restore this one from a copy"


def _archive(file: Path, *, without: str) -> Check:
    if not file.exists():
        return Check(
            name=file.name, finding="missing", remedy=f"resume from another: {without} would start anew", is_broken=True
        )
    from lowmem.monitoring.resume_checks import damage_of_archive

    damaged = damage_of_archive(file)
    if damaged is None:
        return Check(name=file.name, finding=f"whole, {format_bytes(file.stat().st_size)}")
    return Check(name=file.name, finding=f"damaged: {damaged}", remedy=_ANOTHER_CHECKPOINT, is_broken=True)


def _moments(folder: Path) -> Check:
    """Moments of a fully tuned model, and whether they are those that optimizer.pt refers to."""
    from lowmem.full.saving import check_checkpoint

    saved = check_checkpoint(folder)
    if saved is None:
        finding = "optimizer.pt does not say which are its own"
        return Check(name="moments", finding=finding, remedy=_ANOTHER_CHECKPOINT, is_broken=True)
    return Check(name="moments", finding=f"whole, after {saved.num_steps} steps")


def _store(folder: Path) -> Iterator[Check]:
    damages = verify_store(folder)
    for damage in damages:
        yield _failed("store", damage)
    if not damages:
        manifest = read_object(folder / "store.json")
        finding = f"whole, of step {manifest.get('step')}, run {str(manifest.get('fingerprint'))[:12]}"
        yield Check(name="store", finding=finding)


def _adapter(folder: Path) -> Check:
    from lowmem.adapters.saved_adapter import read_files

    files = read_files(folder)
    base = files.config.base_model_name_or_path
    return Check(name="adapter", finding=f"{files.kind}, {len(files.tensors)} tensors, of model {base}")


def _packed(folder: Path) -> Check:
    from lowmem.packing.place import verify_pack

    again = "remove the folder and pack the model again (lowmem pack)"
    found, manifest = verify_pack(folder), read_manifest(folder)
    if found:
        finding = f"other bytes than were written: {some_of(found)}"
        return Check(name="packed", finding=finding, remedy=again, is_broken=True)
    assert manifest is not None
    return Check(name="packed", finding=f"whole, {manifest.settings.get('format')} of {manifest.source}")


def _failed(name: str, error: Exception) -> Check:
    return Check(name=name, finding=str(error), remedy="do what this message says", is_broken=True)


def _files(folder: Path, *, trust_remote_code: bool) -> Iterator[Check]:
    try:
        with SafetensorsSource(folder) as source:
            files = source.files
            nbytes = sum(spec.nbytes for spec in source.tensors.values())
            yield Check(
                name="files",
                finding=f"{len(files)} shards, {len(source.tensors)} tensors, {format_bytes(nbytes)}: whole by their "
                "headers (safetensors keeps no checksums of what tensors hold)",
            )
    except OffloadError as error:
        yield _failed("files", error)
        return
    yield _checked("architecture", partial(_architecture, trust_remote_code=trust_remote_code), folder)
    yield _tokenizer(folder)
    largest = max(files, key=lambda file: file.stat().st_size)
    yield _checked("disk", _direct, largest)
    yield _checked("disk", lambda _: _disk(files), folder)


def _disk(files: Sequence[Path]) -> Check:
    rate = probe_disk(files)
    is_slow = rate.read_bytes_per_s < _SLOW_DISK_BYTES_PER_S
    return Check(
        name="disk",
        finding=f"{rate.read_bytes_per_s / 1e9:.2f} GB/s with {rate.num_threads} requests of "
        f"{format_bytes(rate.request_bytes)} in flight",
        remedy="put the model on a local NVMe drive, or give a host budget that caches it" if is_slow else "",
    )


def _architecture(folder: Path, *, trust_remote_code: bool) -> Check:
    device, dtype = torch.device("cpu"), torch.float32
    opened = open_checkpoint(folder, name=folder.name, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    opened.source.close()
    blocks = opened.built.blocks
    return Check(
        name="architecture", finding=f"{type(opened.built.model).__name__}, {len(blocks)} blocks, can be streamed"
    )


_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def _tokenizer(folder: Path) -> Check:
    found = [name for name in _TOKENIZERS if (folder / name).is_file()]
    if found:
        return Check(name="tokenizer", finding=found[0])
    return Check(
        name="tokenizer",
        finding=f"none of {', '.join(_TOKENIZERS)}",
        remedy="download the tokenizer's files too, or give the trainer processing_class=",
    )


def _direct(file: Path) -> Check:
    """Read one page past the page cache, as training will."""
    opened = open_source(file)
    nbytes = min(PAGE_BYTES, file.stat().st_size)
    try:
        with StagingBuffer(PAGE_BYTES) as buffer:
            opened.read(buffer.tensor.numpy().data, offset_bytes=0, nbytes=nbytes)
        works = opened.direct
    finally:
        opened.close()
    return Check(
        name="direct reads",
        finding="work" if works else f"are refused by the file system of {file.parent}",
        remedy="" if works else "reads go through the page cache, which is slower; a local ext4 or xfs disk has them",
    )
