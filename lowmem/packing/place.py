"""`lowmem.pack`, and `quantization=` of an ordinary checkpoint: packed once, into a folder that later runs find again.

The folder is `packed_dir` if given, else one in the user's cache that is named for the model, the format and the
fingerprint of the model's files: another version of the model gets another folder.
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args

import torch

from lowmem.errors import UnsupportedError
from lowmem.models.checkpoint import Described, Opened, open_checkpoint, pick_device, resolve
from lowmem.packing.bake import BakeInput, bake, is_baked
from lowmem.packing.selection import Included, select
from lowmem.progress_line import say, showing_bytes
from lowmem.quantization.manifest import check_files, check_opened, damaged
from lowmem.quantization.packing import Packer, packer_for
from offload import SafetensorsSource, SourceError, format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

_Known = TypeVar("_Known", bound=Described)


def pack(
    model: str | os.PathLike[str],
    *,
    quantization: str,
    output: str | os.PathLike[str],
    include: Sequence[Included] = (),
    device: torch.device | str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write a checkpoint whose decoder blocks are quantised, as bitsandbytes stores them, in bounded memory.

    What is written is an ordinary folder: `lowmem.from_pretrained` streams it, and transformers with bitsandbytes loads
    it unless the model has fused experts or its embeddings are packed. Linear layers and experts of the blocks are
    packed; norms and routers stay as they are, and so do embeddings and head unless `include` names them. A call that
    was interrupted goes on where it was; the folder has its name only when it is whole. Several processes may pack the
    same model: one works, the others wait and find it done.

    Args:
        model: Local folder, or hub id, of a safetensors checkpoint that is not quantised.
        quantization: "nf4" or "fp4" in blocks of 64 with quantised absmaxes, or "int8" by rows.
        output: The folder; must not exist, be empty, or be what would be made.
        include: "embeddings", "head", or both, where they are two tables: packed too. They take less on disk, and are
            unpacked when the model is opened; embeddings that stay as they are may be read row by row.
        device: Where values are quantised: the GPU if there is one, else the CPU. On a GPU, codes of values that lie
            in the middle between two may differ from those of a CPU.
        revision: Branch, tag or commit of the hub repository.
        trust_remote_code: Run model code that comes with the checkpoint, and copy it.

    Returns:
        The folder.

    Raises:
        UnsupportedError: An unknown format, a checkpoint that cannot be packed or is quantised already, or an
            `include` that it cannot have.
        FileExistsError: Something else lies at `output`.
        offload.TierFull: The disk has no room; what is done stays beside `output`, and the next call goes on.
        offload.SourceError: The checkpoint is damaged.
    """
    packer, chosen = packer_for(quantization), _included(include)
    opened = open_checkpoint(
        resolve(model, revision=revision),
        name=str(model),
        device=torch.device("cpu"),
        dtype="auto",
        trust_remote_code=trust_remote_code,
    )
    with closing(opened.source):
        given = BakeInput.of(opened, trust_remote_code=trust_remote_code)
        return bake(given, packer, output=Path(output).expanduser(), device=pick_device(device), include=chosen)


def _included(include: Sequence[str] | None) -> frozenset[Included]:
    """Check what is to be packed outside the blocks.

    Raises:
        UnsupportedError: There is no such part.
    """
    names = (include,) if isinstance(include, str) else tuple(include or ())
    for name in names:
        if name not in get_args(Included):
            raise UnsupportedError(
                f"include={name!r}",
                reason="nothing of that name can be packed outside the decoder blocks",
                instead=" or ".join(map(repr, get_args(Included))),
            )
    return frozenset(names)  # type: ignore[arg-type]  # checked above


def verify_pack(folder: str | os.PathLike[str]) -> Sequence[str]:
    """Read a packed folder and compare every tensor with its checksum.

    Args:
        folder: What `pack` made.

    Returns:
        Names of damaged tensors; empty where all is well.

    Raises:
        offload.SourceError: A file is missing or cut, or the folder has no manifest.
    """
    place = Path(folder).expanduser()
    manifest = check_files(place)
    with SafetensorsSource(place) as source:
        if manifest is None:
            raise SourceError(
                place,
                field="lowmem_pack.json",
                problem="the folder has none, so that nothing says what its bytes should be",
                remedy="give a folder that lowmem pack made",
            )
        check_opened(place, manifest, source)
        num_bytes = sum(spec.nbytes for spec in source.tensors.values())
        found = []
        with showing_bytes("verifying", num_bytes, delay_s=1.0) as done:
            for name, is_damaged in damaged(manifest, source.tensors):
                done(source.tensors[name].nbytes)
                if is_damaged:
                    found.append(name)
    return found


def _kept_place(given: BakeInput, packer: Packer) -> Path:
    """Where the packed form of a checkpoint is kept if nobody says."""
    from platformdirs import user_cache_path

    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in Path(given.name).name)
    kept = f"{name or 'model'}-{packer.settings['format']}-{given.fingerprint[:12]}"
    return user_cache_path("lowmem") / "packed" / kept


def open_packed(
    opened: Opened,
    quantization: str,
    *,
    packed_dir: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> Opened:
    """Open the packed form of an ordinary checkpoint, made first where it is not there yet.

    Says before it makes it where it will be and how large.

    Args:
        opened: The checkpoint; closed, also after an error.
        quantization: As in `pack`.
        packed_dir: The folder; one in the user's cache if not given.
        trust_remote_code: As in transformers.
        attn_implementation: As in transformers.

    Raises:
        As `pack` does.
    """
    with closing(opened.source):
        packer = packer_for(quantization)
        given = BakeInput.of(opened, trust_remote_code=trust_remote_code)
        place = _kept_place(given, packer) if packed_dir is None else Path(packed_dir).expanduser().absolute()
        if not is_baked(place, given.manifest(packer)):
            size = format_bytes(given.select(packer).nbytes)
            say(f"packing {given.name} to {quantization}, once, into {place} ({size})")
            place.parent.mkdir(parents=True, exist_ok=True)
            bake(given, packer, output=place, device=opened.device)
    return open_checkpoint(
        place,
        name=given.name,
        device=opened.device,
        dtype=opened.dtype,
        num_labels=opened.num_labels,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )


def as_if_packed(opened: _Known, quantization: str) -> _Known:
    """The same checkpoint with the sizes that its packed form will have, for plans; nothing is packed."""
    packer = packer_for(quantization)
    return replace(opened, built=select(opened.built, packer).as_found(opened.built, packer))
