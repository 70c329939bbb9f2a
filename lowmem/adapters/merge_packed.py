"""Merging an adapter into a packed folder: merged values are quantised as they are computed, block by block.

No 16-bit checkpoint is written on the way, and nothing is rounded to 16 bits. Weights that the adapter leaves alone and
that are packed in the same format already keep their bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from math import prod, sqrt
from pathlib import Path

import torch
from torch import Tensor

from lowmem.adapters.merge_plan import MergedTensor, MergePlan, plan_merge
from lowmem.adapters.merged_values import MergedValues
from lowmem.models.build import Skeleton, skeleton
from lowmem.models.configuration import read_config, take_quantization
from lowmem.packing.bake import BakeInput, bake
from lowmem.packing.beside import files_beside
from lowmem.packing.writing import StoredContents
from lowmem.quantization.format import PackedWeight
from lowmem.quantization.packing import Packer
from offload import SafetensorsSource, TensorSpec


@dataclass(kw_only=True)
class PackingLoss:
    """How far packing moves the weights that an adapter changes, and how far the adapter did."""

    changed: float = 0.0
    """Sum of squares of the adapter's changes."""
    size: float = 0.0
    """Sum of squares of the merged values."""
    moved: float = 0.0
    """Sum of squares of what packing changes of them."""
    is_counted: bool = False
    """Whether what is being read is quantised, and changed by the adapter."""
    counts_exact: bool = True
    """See `Counts`: values are quantised as they were computed."""

    def add(self, old: Tensor, new: Tensor, stored: Tensor) -> None:
        """See `Counts`; works in the memory of the first two."""
        if self.is_counted:
            change = new.sub_(old).reshape(-1)
            self.changed += float(change @ change)

    def observe(self, values: Tensor, stored: Tensor) -> None:
        """See `lowmem.quantization.packing.Observe`."""
        if self.is_counted:
            self.size += float(values @ values)
            lost = stored.sub_(values)
            self.moved += float(lost @ lost)

    def told(self, name: object) -> str | None:
        """It in a sentence; None where nothing that the adapter changes was packed."""
        if not self.size:
            return None
        return (
            f"packing to {name} moved the merged weights by {sqrt(self.moved / self.size):.1%} of their size, the "
            f"adapter had moved them by {sqrt(self.changed / self.size):.1%}; the adapter beside its base, or a merge "
            "without quantization (--quantization), keeps what it learned"
        )


class MergedContents:
    """Merged values, and the bytes of what stays packed."""

    def __init__(
        self,
        plan: MergePlan,
        merged: Mapping[str, MergedTensor],
        *,
        stored: Mapping[str, TensorSpec],
        quantised: Collection[str],
        loss: PackingLoss,
    ) -> None:
        """Open nothing yet.

        Args:
            plan: The merge.
            merged: What is computed, by name, in the dtype in which it is wanted.
            stored: Tensors that are taken from the base as they are, by name.
            quantised: Names of those that are quantised.
            loss: Counts what is changed and quantised.
        """
        self._merged, self._loss = merged, loss
        self._stored, self._quantised = stored, quantised
        self._values, self._files = MergedValues(plan, loss), StoredContents()

    def tiles(self, spec: TensorSpec) -> Iterator[Tensor]:
        """See `Contents`."""
        if spec.name in self._stored:
            yield from self._files.tiles(self._stored[spec.name])
            return
        tensor = self._merged[spec.name]
        self._loss.is_counted = spec.name in self._quantised and _is_changed(tensor)
        for tile in self._values.values(tensor):
            yield tile.reshape(-1)

    def close(self) -> None:
        """See `Contents`."""
        self._values.close()
        self._files.close()


def merge_into_packed(
    base: Path, adapter: Path, packer: Packer, *, name: str, output: Path, trust_remote_code: bool
) -> str | None:
    """Write the packed folder that a model and its adapter make together.

    Args:
        base: The model's folder.
        adapter: The adapter's.
        packer: Writes the format.
        name: The model as the user called it.
        output: Folder to write.
        trust_remote_code: As in transformers.

    Returns:
        What packing did to the adapter's change, in a sentence; None where the output was there already.

    Raises:
        As `lowmem.merge` and `lowmem.packing.bake.bake` do.
    """
    loss = PackingLoss()
    with SafetensorsSource(base) as source:
        plan = plan_merge(base, adapter, source=source, dtype=None, trust_remote_code=trust_remote_code)
        given = _input_of(plan, base, source=source, packer=packer, loss=loss, trust_remote_code=trust_remote_code)
        given = replace(
            given,
            name=f"{name} with {adapter}",
            fingerprint=sha256(f"{source.fingerprint()} {_digest(adapter)}".encode()).hexdigest(),
            copies=files_beside(base, has_code=trust_remote_code, adapter=adapter),
        )
        bake(given, packer, output=output, device=torch.device("cpu"))
    return loss.told(packer.settings["format"])


def _input_of(
    plan: MergePlan,
    base: Path,
    *,
    source: SafetensorsSource,
    packer: Packer,
    loss: PackingLoss,
    trust_remote_code: bool,
) -> BakeInput:
    kept = {
        tensor.source.name: plan.packed[tensor.source.name]
        for tensor in plan.tensors
        if _stays_packed(tensor, plan, str(packer.settings["format"]))
    }
    stored = {spec.name: spec for weight in kept.values() for spec in (*weight.parts, *weight.read_once)}
    merged = {tensor.output.name: tensor for tensor in plan.tensors if tensor.output.name not in kept}
    build = partial(_built, plan, base, kept, stored, trust_remote_code=trust_remote_code)
    first = build(merged)
    said_dtype = _said_dtype(plan, first)

    def check() -> None:
        for file in source.files:
            source.check_unchanged(file)

    given = BakeInput(
        name="",
        built=first,
        tensors=stored | _specs(merged),
        folder=base,
        fingerprint="",
        contents=StoredContents,
        check=check,
        copies={},
        has_code=trust_remote_code,
        config_changes=plan.config_changes,
        keeps_packed=True,
        said_dtype=said_dtype,
        observe=loss.observe,
    )
    # What is quantised comes unrounded; what is stored as it is, in the dtype that it has in the base.
    units = given.select(packer).units
    converted = {id(recipe) for unit in units for recipe, _ in unit.converted}
    recipes = (entry.recipe for unit in units for entry in unit.packed)
    quantised = {spec.name for recipe in recipes if id(recipe) not in converted for spec in recipe.sources}
    merged = {
        key: replace(tensor, output=replace(tensor.output, dtype=torch.float32))
        if key in quantised and (_is_changed(tensor) or tensor.source.name in plan.packed)
        else tensor
        for key, tensor in merged.items()
    }
    return replace(
        given,
        built=build(merged),
        tensors=stored | _specs(merged),
        contents=partial(MergedContents, plan, merged, stored=stored, quantised=quantised, loss=loss),
    )


def _is_changed(tensor: MergedTensor) -> bool:
    return tensor.whole_layer is not None or any(segment.updates for segment in tensor.segments)


def _stays_packed(tensor: MergedTensor, plan: MergePlan, form: str) -> bool:
    weight = plan.packed.get(tensor.source.name)
    same = weight is not None and weight.format == form and tensor.output.name == tensor.source.name
    return same and not _is_changed(tensor) and tuple(tensor.output.shape) == tuple(tensor.source.shape)


def _specs(merged: Mapping[str, MergedTensor]) -> dict[str, TensorSpec]:
    """Merged tensors as if a file held them; only their names, types and shapes are looked at."""
    return {
        name: replace(
            tensor.source,
            name=name,
            dtype=tensor.output.dtype,
            shape=tuple(tensor.output.shape),
            nbytes=prod(tensor.output.shape) * tensor.output.dtype.itemsize,
        )
        for name, tensor in merged.items()
    }


def _built(
    plan: MergePlan,
    base: Path,
    kept: Mapping[str, PackedWeight],
    stored: Mapping[str, TensorSpec],
    merged: Mapping[str, MergedTensor],
    *,
    trust_remote_code: bool,
) -> Skeleton:
    config = read_config(base, trust_remote_code=trust_remote_code, allows_adapter=True)
    take_quantization(config)
    for name, value in plan.config_changes.items():
        if name in ("vocab_size", "tie_word_embeddings"):
            setattr(config.get_text_config(decoder=True) if name == "vocab_size" else config, name, value)
    return skeleton(
        config,
        {**stored, **_specs(merged)},
        dtype=torch.float32,
        folder=base,
        trust_remote_code=trust_remote_code,
        packed=kept,
    )


def _said_dtype(plan: MergePlan, built: Skeleton) -> torch.dtype:
    """What the weights are said to have been before: transformers computes gradients in that type."""
    named = plan.config_changes.get("dtype") or built.model.config.dtype or "bfloat16"
    found = getattr(torch, str(named).removeprefix("torch."))
    assert isinstance(found, torch.dtype)
    return found


def _digest(adapter: Path) -> str:
    """Of the files of an adapter."""
    digest = sha256()
    for file in sorted(adapter.glob("adapter_*")):
        digest.update(file.name.encode())
        with file.open("rb") as opened:
            while part := opened.read(1 << 22):
                digest.update(part)
    return digest.hexdigest()
