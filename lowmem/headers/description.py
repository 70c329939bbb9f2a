"""One way to a model's sizes, wherever it is: files here, a repository on the hub, or nothing but a configuration."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lowmem.errors import UnsupportedError
from lowmem.headers.hub import read_remote
from lowmem.models.build import skeleton, skeleton_of_config
from lowmem.models.checkpoint import Described, checked_config, open_checkpoint, pick_dtype, resolve
from lowmem.models.configuration import check_counts
from lowmem.quantization.registry import find_packed

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".ckpt")


@contextmanager
def describing(
    model: str | os.PathLike[str],
    *,
    device: torch.device,
    dtype: torch.dtype | str | None,
    has_bf16: bool | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Iterator[Described]:
    """Find out a model's sizes and types; no weight is read, and none need be here.

    Args:
        model: A folder with a checkpoint, a folder with config.json and no weights, or a hub id, of which config.json
            and the shards' headers are fetched.
        device: Compute device; nothing is made on it.
        dtype: Compute dtype; None for the usual one of the device.
        has_bf16: Whether the device computes in bf16, where it is not in this machine; None to ask the one that is.
        revision: Branch, tag or commit of the hub repository.
        attn_implementation: As in transformers.
        trust_remote_code: As in transformers.

    Yields:
        An `Opened` checkpoint where the files are here, closed at the end; a `Described` one elsewhere.

    Raises:
        FileNotFoundError: There is no such folder or repository.
        UnsupportedError: The architecture cannot be streamed.
        SourceError: A file or a header is damaged, or does not fit the configuration.
    """
    name = str(model)
    path = Path(name).expanduser()
    remote = None
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        folder = resolve(path)
        # Be it one that is refused.
        is_checkpoint = any(file.name.endswith(_WEIGHTS) for file in folder.iterdir())
    else:
        remote = read_remote(name, revision=revision, with_code=trust_remote_code)
        folder, is_checkpoint = remote.folder, remote.tensors is None
    config, quantization = checked_config(
        folder, name=name, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
    )
    stored = config.dtype or torch.float32
    if dtype is None and has_bf16 is not None:
        dtype = stored if stored != torch.bfloat16 or has_bf16 else torch.float16
    if is_checkpoint:
        opened = open_checkpoint(
            folder,
            name=name,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
        try:
            yield opened
        finally:
            opened.source.close()
        return
    compute = pick_dtype(dtype, device=device, stored=stored)
    file = folder / "config.json"
    if remote is None or remote.tensors is None:
        if quantization is not None:
            raise UnsupportedError(
                f"model={name!r}",
                reason="its weights are packed, and how large they are then only their files say",
                instead="the hub id, of which the files' headers are fetched, or the folder with its files",
            )
        built = skeleton_of_config(config, dtype=compute, folder=folder, trust_remote_code=trust_remote_code)
    else:
        packed = None if quantization is None else find_packed(quantization, remote.tensors, file=file)
        check_counts(config, remote.tensors, file=file)
        built = skeleton(
            config, remote.tensors, dtype=compute, folder=folder, packed=packed, trust_remote_code=trust_remote_code
        )
    yield Described(built=built, device=device, dtype=compute, folder=folder)
