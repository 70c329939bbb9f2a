"""What a fully tuned model writes and reads: weights tensor by tensor, in bounded RAM, and the moments beside them.

A checkpoint is found by itself: the optimizer's state names its moments by an identifier, which is their folder's name,
and the weights that they belong to by a digest.
"""

from __future__ import annotations

import os
import re
import shutil
import weakref
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from secrets import token_hex
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.full.disk_tier import DiskTier
from lowmem.full.engine import FullTuning, Saved
from lowmem.full.flat import EXP_AVG, EXP_AVG_SQ, ParamPlace
from lowmem.models.whole import alive
from lowmem.optim.rule import State
from offload import (
    JsonObject,
    OutputTensor,
    SafetensorsSource,
    ShardFile,
    SourceError,
    Store,
    TensorReader,
    TensorSpec,
    parse_bytes,
    replacing_checkpoint,
    split_into_shards,
    sync_folder,
    unfinished_folder,
    verify_store,
    write_index,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowmem.models.mapping import Recipe


FOLDER = "optimizer_state"
"""Name of the folder in a checkpoint that holds a folder of moments, by its identifier, for each saved state."""

_MOMENTS = (EXP_AVG, EXP_AVG_SQ)
_IDENTIFIER = re.compile(r"[0-9a-f]{32}")
_BESIDE = ".saving-"
_REMEDY = "resume from another checkpoint, or restore this one from a copy"


@dataclass(frozen=True, kw_only=True)
class SavedMoments:
    """Moments in a checkpoint, as the optimizer's state refers to them."""

    identifier: str
    """Name of their folder."""
    checksums: Mapping[str, int]
    """CRC-32 of each file's tensors, one after the other, by the file's name; empty where state is on disk."""


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """What an optimizer's state dict says of the parameters of a fully tuned model."""

    num_steps: int
    """Steps that had been taken."""
    steps: Mapping[str, int]
    """Updates that each parameter's moments have had, by name."""
    states: Mapping[str, State]
    """State of rules that was kept in memory, by parameter."""
    states_on_disk: bool
    """Whether state of rules lies beside the weights."""
    moments: SavedMoments | None
    """What lies beside the weights."""
    weights: str | None
    """Digest of the weights."""
    folder: Path | None
    """Where the user says that the moments are."""

    @classmethod
    def read(cls, entry: object, checkpoint: Path | None, *, params: Collection[str] | None) -> SavedState:
        """Read it from a state dict's entry, nothing of which is believed.

        Args:
            entry: The entry.
            checkpoint: Folder that it comes from, if that is known.
            params: Names of the model's parameters; None where there is no model to compare it with.

        Raises:
            SourceError: It is damaged; names file and field.
        """
        file = Path("optimizer.pt") if checkpoint is None else checkpoint / "optimizer.pt"
        outer = JsonObject(file=file, remedy=_REMEDY, prefix="", members={"lowmem_full": entry})
        fields = outer.inner("lowmem_full")
        steps, num_steps = steps_of(fields, params=params)
        states: dict[str, State] = {}
        for key in (found := fields.inner("states")):
            state = found.members[key]
            if (
                not _is_param(key, params)
                or not isinstance(state, dict)
                or not all(map(torch.is_tensor, state.values()))
            ):
                found.refuse(str(key), "expected tensors that belong to a parameter of this model")
            states[key] = state
        is_on_disk, folder, moments = fields.members.get("states_on_disk"), fields.members.get("folder"), None
        if not isinstance(is_on_disk, bool):
            fields.refuse("states_on_disk", f"expected True or False, got {is_on_disk!r}")
        if "moments" in fields.members:
            own = fields.inner("moments")
            if not _IDENTIFIER.fullmatch(own.text("identifier")):
                own.refuse("identifier", "expected 32 hexadecimal digits")
            sums = own.inner("checksums")
            for name in sums:
                if not isinstance(name, str) or "/" in name:
                    sums.refuse(str(name), "expected the name of a file")
            checksums = {name: sums.natural(name) for name in sums}
            moments = SavedMoments(identifier=own.text("identifier"), checksums=checksums)
        elif steps or is_on_disk:
            fields.refuse("moments", "there is none, although there were moments to save")
        return cls(
            num_steps=num_steps,
            steps=steps,
            states=states,
            states_on_disk=is_on_disk,
            moments=moments,
            weights=fields.text("weights") if "weights" in fields.members else None,
            folder=Path(folder) if isinstance(folder, str) else None,
        )


def _is_param(key: object, params: Collection[str] | None) -> bool:
    return isinstance(key, str) and (params is None or key in params)


def steps_of(record: JsonObject, *, params: Collection[str] | None) -> tuple[dict[str, int], int]:
    """How many updates each parameter has had, by name, and steps that were taken.

    Raises:
        SourceError: The record is damaged.
    """
    found = record.inner("steps")
    for key in found:
        if not _is_param(key, params):
            found.refuse(str(key), "expected a parameter of this model")
    return {key: found.natural(key) for key in found}, record.natural("num_steps")


def save_moments(full: FullTuning, folder: Path) -> SavedMoments:
    """Keep the moments beside weights of the same step.

    State on disk is linked where the file system can, else copied; state in memory is written, one parameter at a time
    in RAM. They are there as a whole or not at all. Those of the state before stay, which the optimizer's file refers
    to until it is written anew; older ones go.

    Args:
        full: The engine, whose updates are complete.
        folder: Where the weights were written.

    Raises:
        OffloadError: They cannot be written.
    """
    folder = folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    identifier = token_hex(16)
    with unfinished_folder(folder, prefix=_BESIDE) as beside:
        checksums = {}
        if isinstance(full.tier, DiskTier):
            full.tier.save_to(beside)
        else:
            checksums = _write_moments(full, beside)
        sync_folder(beside)
        beside.rename(folder / identifier)
        sync_folder(folder)
    earlier = [found for found in folder.iterdir() if _IDENTIFIER.fullmatch(found.name) and found.name != identifier]
    for old in sorted(earlier, key=lambda found: found.stat().st_mtime_ns)[:-1]:
        shutil.rmtree(old, ignore_errors=True)
    return SavedMoments(identifier=identifier, checksums=checksums)


def _write_moments(full: FullTuning, folder: Path) -> dict[str, int]:
    checksums = {}
    for layout in full.tier.layouts:
        named = [(place, field) for place in layout.places for field in _MOMENTS]
        outputs = [
            OutputTensor(name=f"{place.key}.{field}", dtype=torch.float32, shape=tuple(place.shape))
            for place, field in named
        ]
        file, checksum = folder / f"{layout.name}.safetensors", 0
        with ShardFile(file, outputs, mode=0o600) as shard:
            for place, field in named:
                value = full.read(place.key, field)
                checksum = _checksum(value, checksum)
                shard.write(value)
        checksums[file.name] = checksum
    return checksums


def find_moments(saved: SavedMoments, folders: Iterable[Path]) -> Path:
    """The folder of moments in one of these folders.

    Raises:
        FileNotFoundError: They are in none.
    """
    places = list(dict.fromkeys(folders))
    for place in places:
        if (place / saved.identifier).is_dir():
            return place / saved.identifier
    looked = ", ".join(map(str, places)) or "no folder: none is known"
    raise FileNotFoundError(
        f"moments {saved.identifier} of this optimizer state are not there (looked in {looked}); have the Trainer "
        "resume from the checkpoint that they belong to, or set ['lowmem_full']['folder'] in the optimizer's state to "
        f"the folder {FOLDER} of that checkpoint"
    )


def load_moments(
    full: FullTuning, folder: Path, saved: SavedMoments, *, keys: Collection[str], stale: Iterable[str]
) -> None:
    """Take moments that `save_moments` kept.

    Args:
        full: The engine.
        folder: What `find_moments` returned.
        saved: What is known of them.
        keys: Parameters that have moments.
        stale: Parameters that have moments now and have none in the checkpoint.

    Raises:
        SourceError: They are damaged; names file and field. State in memory may have been changed in part.
        UnsupportedError: They were saved with state on disk, and this run keeps it in memory.
    """
    if Store.exists(folder):
        if not isinstance(full.tier, DiskTier):
            raise UnsupportedError(
                f"resuming from {folder} with state in memory",
                reason="it was saved with state on disk, and consists of that run's files",
                instead="a budget with Budget.disk that puts the state on disk, as when it was saved",
            )
        full.adopt(folder)
        return
    with ExitStack() as stack:
        sources = {}
        # All of them before anything is changed.
        for layout in full.tier.layouts:
            file = folder / f"{layout.name}.safetensors"
            source = stack.enter_context(closing(SafetensorsSource([file])))
            sources[file] = [
                (place.key, field, _moment_in(source, file, place, field))
                for place in layout.places
                for field in _MOMENTS
            ]
        for key in stale:
            for field in _MOMENTS:
                full.write(key, torch.zeros(full.params[key].place.shape), field)
        reader = stack.enter_context(closing(TensorReader()))
        for file, tensors in sources.items():
            checksum = 0
            for key, field, spec in tensors:
                value = reader.read(spec, 0, nbytes=spec.nbytes).view(spec.shape)
                checksum = _checksum(value, checksum)
                if key in keys:
                    full.write(key, value, field)
            _compare(file, checksum, saved.checksums.get(file.name))


def read_state(checkpoint: Path) -> dict[str, object] | None:
    """What an optimizer of a fully tuned model has left in a Trainer's checkpoint; None where it is of another kind.

    Raises:
        SourceError: It cannot be read.
    """
    file = checkpoint / "optimizer.pt"
    if not file.is_file():
        return None
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    # Its reader steps through the bytes as they come, and fails as they have it.
    except (
        AssertionError,
        AttributeError,
        EOFError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        UnpicklingError,
        ValueError,
    ) as error:
        raise SourceError(
            file, field="file", problem=f"torch cannot read it ({type(error).__name__})", remedy=_REMEDY
        ) from error
    return state if isinstance(state, dict) and "lowmem_full" in state else None


def check_checkpoint(checkpoint: Path) -> SavedState | None:
    """Read all that an optimizer of a fully tuned model has left in a Trainer's checkpoint; no model is opened.

    Returns:
        What it says, or None where the checkpoint is of another kind.

    Raises:
        SourceError: Something is damaged; names file and field.
        FileNotFoundError: The moments are not there.
    """
    state = read_state(checkpoint)
    return None if state is None else check_state(state, checkpoint)


def check_state(state: Mapping[str, object], checkpoint: Path, full: FullTuning | None = None) -> SavedState:
    """Read all that a state refers to; nothing is loaded.

    Args:
        state: What `read_state` returned.
        checkpoint: The folder that it lies in.
        full: Of the model that it should be of; None where no model is opened.

    Returns:
        What it says.

    Raises:
        SourceError: Something is damaged; names file and field.
        FileNotFoundError: The moments are not there.
    """
    saved = SavedState.read(state["lowmem_full"], checkpoint, params=None if full is None else full.params)
    if saved.moments is None:
        return saved
    folder = find_moments(saved.moments, [checkpoint / FOLDER])
    if Store.exists(folder):
        for damage in verify_store(folder):
            raise damage
        return saved
    with closing(TensorReader()) as reader:
        for name, expected in saved.moments.checksums.items():
            with closing(SafetensorsSource([folder / name])) as source:
                for layout in () if full is None else full.tier.layouts:
                    for place in layout.places if name == f"{layout.name}.safetensors" else ():
                        for field in _MOMENTS:
                            _moment_in(source, folder / name, place, field)
                checksum = 0
                for spec in sorted(source.tensors.values(), key=lambda spec: spec.offset_bytes):
                    checksum = _checksum(reader.read(spec, 0, nbytes=spec.nbytes), checksum)
                _compare(folder / name, checksum, expected)
    return saved


def _moment_in(source: SafetensorsSource, file: Path, place: ParamPlace, field: str) -> TensorSpec:
    name = f"{place.key}.{field}"
    spec = source.tensors.get(name)
    if spec is None or spec.dtype != torch.float32 or tuple(spec.shape) != tuple(place.shape):
        found = "nothing" if spec is None else f"{spec.dtype} of shape {list(spec.shape)}"
        raise SourceError(
            file, field=name, problem=f"expected fp32 of shape {list(place.shape)}, got {found}", remedy=_REMEDY
        )
    return spec


def _compare(file: Path, checksum: int, expected: int | None) -> None:
    if checksum != expected:
        problem = "its checksum is not the one that was saved with it: bytes of it have changed"
        raise SourceError(file, field="data", problem=problem, remedy=_REMEDY)


def _checksum(value: Tensor, start: int = 0) -> int:
    return zlib.crc32(value.contiguous().view(-1).view(torch.uint8).numpy().data, start)


def weights_digest(checksums: Mapping[str, int]) -> str:
    """What stands for all weights of a model: a hash of their CRC-32s by parameter name."""
    return sha256(repr(sorted(checksums.items())).encode()).hexdigest()


def current_digest(full: FullTuning) -> str:
    """`weights_digest` of the weights as they are now; reads all of them."""
    return weights_digest({key: _checksum(full.read(key)) for key in full.params})


_SHARD = "2GB"
"""Trainer reads a whole shard into RAM when it resumes."""


@dataclass(frozen=True, kw_only=True)
class StoredNames:
    """What parameters are called in the checkpoint that the model was opened from."""

    by_key: Mapping[str, str]
    """Stored names by model name, of parameters that are stored as they are."""
    converted: Sequence[Recipe] = ()
    """How the others are made of stored tensors, such as a block's experts of one tensor each."""

    def keys_of(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under model names, whichever of the two names they come under.

        Stored tensors that are converted are so where all of a group are there; of others `load_state_dict` says that
        it does not know them.
        """
        by_stored = {name: key for key, name in self.by_key.items()}
        found = dict(stored)
        for recipe in self.converted:
            names = [spec.name for spec in recipe.sources]
            if all(name in found for name in names):
                found |= recipe.run({name: found.pop(name) for name in names})
        return {by_stored.get(name, name): value for name, value in found.items()}


class Saving:
    """Stands in for two methods of a model instance, which holds this.

    Args:
        model: The model.
        full: Its engine.
        names: Under which names tensors are written.
        source: Folder of the checkpoint that it was opened from.
    """

    def __init__(self, model: PreTrainedModel, full: FullTuning, names: StoredNames, *, source: Path) -> None:
        self._model = weakref.ref(model)
        self._full, self._names, self._source = full, names, source

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = _SHARD,
        variant: str | None = None,
        **refused: object,
    ) -> None:
        """Write configuration and master weights as a checkpoint that transformers loads. Completes pending updates.

        Args:
            save_directory: Folder, made if need be, other than the one that the model was opened from. An earlier
                checkpoint in it is replaced when this one is on the disk; other files stay.
            is_main_process: Nothing is written if not.
            state_dict: Only None: the model's own.
            push_to_hub: Only False.
            max_shard_size: Largest file, "2GB" for instance.
            variant: Only None.
            refused: Other options of transformers; refused by name unless they are at their defaults.

        Raises:
            UnsupportedError: An option that is not honoured, or the model's own folder.
            RuntimeError: Nobody keeps the model.
            TierFull: The disk has no room; an earlier checkpoint stays.
            WriteError: The disk failed; likewise.
        """
        _refuse({"state_dict": state_dict, "variant": variant, "push_to_hub": push_to_hub or None}, refused)
        if not is_main_process:
            return
        model = alive(self._model)
        folder = Path(save_directory)
        if folder.exists() and folder.samefile(self._source):
            raise UnsupportedError(
                f"save_pretrained({str(folder)!r})",
                reason="the model was opened from this folder, and its weights are still read from there",
                instead="another folder; it may take this one's place once the model is closed",
            )
        max_shard_bytes = parse_bytes(max_shard_size, field="max_shard_size")
        self._full.finish()
        shards = split_into_shards(self._outputs(model), max_shard_bytes=max_shard_bytes)
        checksums: dict[str, int] = {}
        model.config.dtype = next(iter(self._full.params.values())).param.dtype
        model.config.architectures = [type(model).__name__]
        with replacing_checkpoint(folder) as beside:
            for file, tensors in shards.items():
                with ShardFile(beside / file, tensors) as shard:
                    for value in self._values(model, tensors, checksums):
                        shard.write(value)
            write_index(beside, shards)
            model.config.save_pretrained(beside)
            if model.can_generate():
                model.generation_config.save_pretrained(beside)
        self._full.saved = Saved(folder=folder, version=self._full.version, digest=weights_digest(checksums))

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> tuple[list[str], list[str]]:
        """As `torch.nn.Module.load_state_dict`; tensors may also have the names that they have in the checkpoint."""
        if assign:
            raise UnsupportedError(
                "load_state_dict(assign=True)",
                reason="the weights are kept in their tier, not in the tensors that are given",
                instead="assign=False",
            )
        model = alive(self._model)
        # Between steps nothing may be pending: an update would change what is loaded here.
        self._full.finish()
        loaded: tuple[list[str], list[str]] = torch.nn.Module.load_state_dict(
            model, self._names.keys_of(state_dict), strict=strict
        )
        self._full.version += 1
        return loaded

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that a save writes, by their names."""
        outputs = self._outputs(alive(self._model))
        return {one.name: one.shape for some in outputs for one in (some if isinstance(some, tuple) else (some,))}

    def _outputs(self, model: PreTrainedModel) -> list[OutputTensor | tuple[OutputTensor, ...]]:
        """Parameters first, then the persistent buffers that the checkpoint has.

        What one conversion is undone to stays together: so that it can be read back from one file.
        """
        first = {recipe.targets[0]: recipe for recipe in self._names.converted}
        converted = {key for recipe in self._names.converted for key in recipe.targets}
        found: list[OutputTensor | tuple[OutputTensor, ...]] = []
        for key, entry in self._full.params.items():
            if key in first:
                shapes = {spec.name: tuple(spec.shape) for spec in first.pop(key).sources}
                dtype = entry.param.dtype
                found.append(tuple(OutputTensor(name=name, dtype=dtype, shape=to) for name, to in shapes.items()))
            elif key not in converted:
                name = self._names.by_key[key]
                found.append(OutputTensor(name=name, dtype=entry.param.dtype, shape=tuple(entry.place.shape)))
        persistent = model.state_dict(keep_vars=True)
        for name, buffer in model.named_buffers():
            if name in persistent and name not in converted:
                found.append(OutputTensor(name=name, dtype=buffer.dtype, shape=tuple(buffer.shape)))
        return found

    def _values(
        self, model: PreTrainedModel, tensors: Iterable[OutputTensor], checksums: dict[str, int]
    ) -> Iterator[Tensor]:
        """What is written, one tensor at a time in memory, or what one conversion is undone to."""
        keys = {name: key for key, name in self._names.by_key.items()}
        recipes = {spec.name: recipe for recipe in self._names.converted for spec in recipe.sources}
        undone: dict[str, Tensor] = {}
        for tensor in tensors:
            recipe = recipes.get(tensor.name)
            if recipe is None:
                yield self._checked(model, keys.get(tensor.name, tensor.name), checksums)
                continue
            if tensor.name not in undone:
                undone = dict(
                    recipe.stored_again({key: self._checked(model, key, checksums) for key in recipe.targets})
                )
            yield undone.pop(tensor.name).contiguous()

    def _checked(self, model: PreTrainedModel, key: str, checksums: dict[str, int]) -> Tensor:
        value = self._value(model, key)
        if key in self._full.params:
            checksums[key] = _checksum(value)
        return value

    def _value(self, model: PreTrainedModel, key: str) -> Tensor:
        if key in self._full.params:
            return self._full.read(key).cpu().contiguous()
        buffer: Tensor = model.get_buffer(key)
        return buffer.detach().cpu().contiguous()


def install_saving(model: PreTrainedModel, full: FullTuning, names: StoredNames, *, source: Path) -> None:
    """Give a model instance these methods.

    Args:
        model: The model.
        full: Its engine.
        names: What its parameters are called in its checkpoint.
        source: Folder of that checkpoint.
    """
    saving = Saving(model, full, names, source=source)
    object.__setattr__(model, "save_pretrained", saving.save_pretrained)
    object.__setattr__(model, "load_state_dict", saving.load_state_dict)
    # The model keeps `saving`, and that the engine: the other way round it were a circle, which only a collection ends.
    shapes = weakref.WeakMethod(saving.stored_shapes)
    full.stored_shapes = lambda: found() if (found := shapes()) is not None else {}


def _refuse(named: Mapping[str, object], others: Mapping[str, object]) -> None:
    defaults = {"safe_serialization": True, "token": None, "save_peft_format": True, "save_original_format": True}
    defaults["distributed_checkpoint"] = False
    given = [name for name, value in named.items() if value is not None]
    given += [name for name, value in others.items() if name not in defaults or defaults[name] is not value]
    if given:
        raise UnsupportedError(
            f"save_pretrained({given[0]}=...)",
            reason="the weights of a fully tuned model are written tensor by tensor from their tier",
            instead="save_pretrained(folder, max_shard_size=...), and what you need done with the folder",
        )
