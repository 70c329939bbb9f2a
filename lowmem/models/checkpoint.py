"""Where a model's files are: a local folder, or a hub id resolved to its folder in the cache."""

from __future__ import annotations

import os
import warnings
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lowmem.errors import UnsupportedError
from lowmem.models.build import Skeleton, skeleton
from lowmem.models.configuration import check_counts, check_generation_config, models_in, read_config, take_quantization
from lowmem.processes.ranks import Ranks, ranks
from lowmem.quantization.manifest import check_files, check_opened
from lowmem.quantization.registry import find_packed
from offload import SafetensorsSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What a streamed model needs of a repository; pickled weights are never fetched.
_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]


def resolve(model: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Find the folder that holds a model's config, tokenizer and weights.

    Args:
        model: A local folder, or a hub id ("Qwen/Qwen3-32B"), whose files are downloaded into the hub cache.
        revision: Branch, tag or commit of the hub repository.

    Returns:
        The folder. Nothing in it is ever written or deleted.

    Raises:
        FileNotFoundError: No such folder, and no such repository can be reached.
        UnsupportedError: The path is a single file.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UnsupportedError(
            f"model={str(model)!r}",
            reason="it is a file",
            instead="the folder that holds config.json and the .safetensors files",
        )
    # A Trainer's checkpoint is asked for by its path; no hub repository is called so.
    is_path = folder.is_absolute() or str(model).startswith(".") or folder.name.startswith("checkpoint-")
    if is_path or str(model).count("/") != 1:
        raise FileNotFoundError(
            f"{folder}: no such folder{_did_you_mean(folder)}; give a local folder or a hub id of the form owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=_PATTERNS))
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise unreachable(model, error) from error


def unreachable(model: str | os.PathLike[str], error: Exception) -> FileNotFoundError:
    """What to raise for a model that is neither here nor on the hub: says what lies where its folder was looked for.

    Args:
        model: As it was asked for.
        error: Of the hub's client.
    """
    from huggingface_hub import is_offline_mode

    why = str(error)
    if is_offline_mode():
        why = "HF_HUB_OFFLINE is set, so that the hub was not asked, and its cache does not have it"
    beside = _beside(Path(model).expanduser())
    return FileNotFoundError(f"{model}: neither a local folder{beside} nor a hub repository that can be reached: {why}")


def _did_you_mean(folder: Path) -> str:
    """The models beside a folder that is not there which are called nearly like it."""
    near = get_close_matches(folder.name, models_in(folder.parent), n=2, cutoff=0.75)
    return f" (did you mean {' or '.join(str(folder.parent / name) for name in near)}?)" if near else ""


def _beside(folder: Path) -> str:
    """What lies where a folder was looked for, if that place is there at all."""
    if not folder.parent.is_dir():
        return ""
    names = sorted(entry.name for entry in folder.parent.iterdir() if entry.is_dir())
    return f" ({folder.parent} has {', '.join(names[:4]) or 'no folders'})"


@dataclass(frozen=True, kw_only=True)
class Described:
    """A model of which sizes and types are known, and no weight need be there."""

    built: Skeleton
    """The model on meta, matched with its stored tensors."""
    device: torch.device
    """Compute device."""
    dtype: torch.dtype
    """Compute dtype."""
    folder: Path
    """Where it lies."""
    num_labels: int | None = None
    """Outputs of a sequence classification model; None for a language model."""


@dataclass(frozen=True, kw_only=True)
class Opened(Described):
    """A checkpoint whose files and configuration have been checked; no weight is read yet."""

    source: SafetensorsSource
    """Its files."""


def checked_config(
    folder: Path,
    *,
    name: str,
    num_labels: int | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PretrainedConfig, object | None]:
    """A folder's configuration, where its model can be streamed as far as that says; arguments as `open_checkpoint`.

    Returns:
        The configuration without what it says of quantisation, and that; None where its weights are not packed.

    Raises:
        UnsupportedError: The architecture cannot be streamed.
        SourceError: A file is damaged.
    """
    from lowmem.models.blocks import refuse_config, refuse_labels

    config = read_config(folder, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code)
    # The text part as well: of some checkpoints only that is built.
    config.name_or_path = config.get_text_config().name_or_path = name
    quantization = take_quantization(config)
    refuse_config(config)
    if num_labels is not None:
        refuse_labels(config, num_labels)
        config.num_labels = num_labels
    check_generation_config(folder)
    return config, quantization


def open_checkpoint(
    folder: Path,
    *,
    name: str,
    device: torch.device,
    dtype: torch.dtype | str | None,
    num_labels: int | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Opened:
    """Check a checkpoint and match it with its model class.

    Args:
        folder: Local folder.
        name: What the user called it; adapters record it as their base model.
        device: Compute device.
        dtype: Compute dtype; None or "auto" for the usual one of the device.
        num_labels: Outputs of a sequence classification model; None for a language model.
        attn_implementation: As in transformers.
        trust_remote_code: As in transformers.

    Raises:
        UnsupportedError: The architecture or the checkpoint cannot be streamed.
        SourceError: A file is missing, damaged, or does not fit the configuration.
    """
    config, quantization = checked_config(
        folder,
        name=name,
        num_labels=num_labels,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    compute = pick_dtype(dtype, device=device, stored=config.dtype or torch.float32)
    # What lowmem packed is packed again where a file is missing, not downloaded.
    manifest = check_files(folder)
    source = SafetensorsSource(folder)
    try:
        if manifest is not None:
            check_opened(folder, manifest, source)
        packed = None
        if quantization is not None:
            packed = find_packed(quantization, source.tensors, file=folder / "config.json")
        check_counts(config, source.tensors, file=folder / "config.json")
        built = skeleton(
            config,
            source.tensors,
            dtype=compute,
            folder=folder,
            classifies=num_labels is not None,
            trust_remote_code=trust_remote_code,
            packed=packed,
        )
    except BaseException:
        source.close()
        raise
    return Opened(
        source=source,
        built=built,
        device=device,
        dtype=compute,
        folder=folder,
        num_labels=num_labels,
    )


def gatherable_embedding(built: Skeleton) -> str | None:
    """Name of the input embedding's table if its rows can be read one by one from the checkpoint, else None."""
    model = built.model
    table = model.get_input_embeddings()
    output = model.get_output_embeddings()
    weight = getattr(table, "weight", None)
    if not isinstance(table, torch.nn.Embedding) or (output is not None and output.weight is weight):
        return None
    name = next((name for name, param in model.named_parameters() if param is weight), None)
    tied = getattr(model, "all_tied_weights_keys", {})
    if name is None or name in tied or name in tied.values():
        return None
    recipe = built.mapping.recipes.get(name)
    return name if recipe is not None and recipe.plain is not None and table.max_norm is None else None


def stays_inside(file: Path, folder: Path) -> bool:
    """Whether a file of a folder lies there, whatever links lead to it; one that leads to itself lies nowhere."""
    try:
        real, home = file.resolve(), folder.resolve()
    except RuntimeError:
        return False
    # In the hub's cache a snapshot's files are links into the repository's blobs.
    is_cached = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    return real.is_relative_to(home) or is_cached


def pick_device(device: torch.device | str | None) -> torch.device:
    """The compute device: the one asked for, else the GPU if there is one, else the CPU.

    Among several processes each has the GPU of its local rank.

    Raises:
        UnsupportedError: A device that is neither, or a GPU that is another rank's or none's.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen: torch.device | None = None
    with suppress(RuntimeError):  # "auto", "gpu"
        chosen = torch.device(device)
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise UnsupportedError(
            f"device={str(device)!r}",
            reason="a streamed model computes on one CUDA device or on the CPU",
            instead='"cuda" or "cpu"; without device=, the GPU is taken if there is one',
        )
    if chosen.type == "cuda":
        num_gpus = torch.cuda.device_count()
        if (chosen.index or 0) >= num_gpus:
            built = "" if torch.version.cuda else " (this torch was built without CUDA)"
            raise UnsupportedError(
                f"device={str(device)!r}",
                reason=f"torch finds {num_gpus or 'no'} GPU{'s' if num_gpus > 1 else ''} here{built}",
                instead='device="cpu", or leave it out; lowmem doctor says what this machine has',
            )
        found = ranks()
        chosen = _gpu_of_rank(chosen, num_gpus, found) if found.are_several else _pick_gpu(chosen, num_gpus)
    return chosen


def _gpu_of_rank(chosen: torch.device, num_gpus: int, found: Ranks) -> torch.device:
    """The GPU with the local rank's number: accelerate puts this rank's batches there, and DDP its gradients.

    Raises:
        UnsupportedError: There is none, or another one was asked for.
    """
    if found.local_size > num_gpus:
        raise UnsupportedError(
            f"LOCAL_WORLD_SIZE={found.local_size} on a machine with {num_gpus} GPU{'s' if num_gpus > 1 else ''}",
            reason="each needs a GPU of its own",
            instead=f"--nproc_per_node {num_gpus} (accelerate launch: --num_processes)",
        )
    if chosen.index not in (None, found.local_rank):
        raise UnsupportedError(
            f"device={str(chosen)!r} on {found}",
            reason=f"the Trainer puts the batches of local rank {found.local_rank} on cuda:{found.local_rank}",
            instead='device="cuda", or leave it out',
        )
    # Before anything is allocated: without this a rank would open a context on the first GPU too.
    torch.cuda.set_device(found.local_rank)
    return torch.device("cuda", found.local_rank)


def _pick_gpu(chosen: torch.device, num_gpus: int) -> torch.device:
    """The first GPU that is visible: the Trainer and accelerate put batches there.

    Raises:
        UnsupportedError: Another one was asked for.
    """
    if (chosen.index or torch.cuda.current_device()) != 0:
        raise UnsupportedError(
            f"device={str(chosen)!r}",
            reason="the Trainer puts its batches on the first GPU that the process sees",
            instead=f"CUDA_VISIBLE_DEVICES={chosen.index or torch.cuda.current_device()} in the environment, "
            'and device="cuda"',
        )
    if num_gpus > 1:
        # Of the same text and place, Python shows one.
        warnings.warn(
            f"{num_gpus} GPUs are visible, and a streamed model uses one: the first, {torch.cuda.get_device_name(0)}; "
            "CUDA_VISIBLE_DEVICES chooses another; torchrun --nproc_per_node N trains on N of them, one process each",
            stacklevel=4,
        )
    return torch.device("cuda", 0)


def _dtype_of_gpu(stored: torch.dtype) -> torch.dtype:
    if stored == torch.float32:
        return stored
    # Older cards (before Ampere) emulate bf16, many times slower, and say that they support it.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if stored == torch.bfloat16:
        warnings.warn(
            f"{torch.cuda.get_device_name()} does not compute in bf16, in which this model is stored: computing in "
            'fp32. dtype="fp16" is faster, where the model\'s activations stay below 65504',
            stacklevel=4,
        )
        return torch.float32
    return stored


def pick_dtype(dtype: torch.dtype | str | None, *, device: torch.device, stored: torch.dtype) -> torch.dtype:
    """The compute dtype: the one asked for, else fp32 on a CPU and the stored one on a GPU (fp32 for bf16 it has not).

    "auto" is the stored one anywhere, as in transformers.

    Raises:
        UnsupportedError: Not a floating-point dtype that models compute in.
    """
    if isinstance(dtype, str):
        dtype = {"auto": stored, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(
            dtype, getattr(torch, dtype, dtype)
        )
    if dtype is None:
        return torch.float32 if device.type == "cpu" else _dtype_of_gpu(stored)
    if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedError(
            f"dtype={dtype!r}",
            reason="it is no floating-point type that models compute in",
            instead="float32, bfloat16 or float16",
        )
    assert isinstance(dtype, torch.dtype)
    return dtype
