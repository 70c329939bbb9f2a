"""What a Trainer of a streamed model looks at before it resumes: that the checkpoint's files are there and whole.

The Trainer opens them one by one, with readers that wait for a named pipe or fail in words of their own.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, TrainerState

from lowmem.errors import UnsupportedError
from lowmem.full.optimizer_engine import check_before_loading
from lowmem.internals.torch import damage_of_saved
from lowmem.models.configuration import naming_field
from lowmem.processes.ranks import ranks
from lowmem.streaming.runtime import is_streamed, runtime_of
from offload import SafetensorsSource, SourceError, read_json_object

ARCHIVES = {"optimizer.pt": "moments", "scheduler.pt": "learning rate", "rng_state.pth": "dropout"}
"""Files that torch writes, and what would start anew without them."""
ANOTHER_CHECKPOINT = "resume from another checkpoint, or restore this one from a copy"
_RESTORED = ("optimizer.pt", "scheduler.pt")
"""What the Trainer restores both of, or neither in silence."""
_GROUPS = "param_groups"
"""What every optimizer's state has, and no scheduler's."""
_STATE = "trainer_state.json"
TRAINER_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_OF_RANK = re.compile(r"rng_state_(\d+)\.pth")
_WEIGHTS = "model*.safetensors*"
_NUMBERS = ("epoch", "global_step", "max_steps", "num_train_epochs", "num_input_tokens_seen", "total_flos")
"""Fields of the Trainer's state that are a number and never null."""
_NEEDED = ("global_step", "max_steps", "train_batch_size")
"""Those without which a run would start from its beginning, or end in the Trainer's arithmetic."""


def damage_of_archive(file: Path) -> str | None:
    """What is wrong with one of these files; None where it is whole."""
    if (damage := damage_of_saved(file)) is not None:
        return damage
    try:
        # What may be in it is the reader's business, but for whose it is.
        with suppress(pickle.UnpicklingError):
            found = torch.load(file, map_location="meta", weights_only=True)
            is_optimizers = isinstance(found, dict) and _GROUPS in found
            if file.name in _RESTORED and is_optimizers != (file.name == _RESTORED[0]):
                return f"it holds {'an' if is_optimizers else 'no'} optimizer's state"
    except (OSError, EOFError, RuntimeError, ValueError) as error:
        return str(error).partition(". ")[0]
    return None


def check_before_resume(model: nn.Module, checkpoint: str) -> None:
    """Look at a Trainer's checkpoint before anything of it is loaded into a streamed model.

    Args:
        model: Of the Trainer; nothing is looked at where it is not streamed.
        checkpoint: The folder to resume from.

    Raises:
        SourceError: A file is missing or damaged; names it, and the newest checkpoint beside it that is complete.
        FileNotFoundError: An adapter's checkpoint has no adapter; likewise.
    """
    if not is_streamed(model):
        return
    folder, is_adapter = Path(checkpoint), hasattr(model, "peft_config")
    try:
        _check(folder, is_adapter=is_adapter, damage_of=damage_of_archive)
        if (full := runtime_of(model).full) is not None:
            _check_shapes(folder, full.stored_shapes())
            # Weights are loaded before the optimizer's state is read: a refusal then would leave them without it.
            check_before_loading(model, folder)
        elif is_adapter:
            from peft import get_peft_model_state_dict

            for name in model.peft_config:  # type: ignore[union-attr]
                where = folder if name == "default" else folder / name
                if (file := where / "adapter_model.safetensors").exists():
                    kept = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
                    _check_shapes(file, {key: tuple(value.shape) for key, value in kept.items()})
    except (SourceError, FileNotFoundError) as error:
        newest = newest_complete(folder.parent, is_adapter=is_adapter, but=folder)
        say = (
            "no other checkpoint in {0} is complete"
            if newest is None
            else ("the newest complete one in {0} is {1}: trainer.train(resume_from_checkpoint={2!r})")
        )
        error.args = (f"{error}; {say.format(folder.parent, newest and newest.name, str(newest))}",)
        raise


def newest_complete(output_dir: Path, *, is_adapter: bool, but: Path | None = None) -> Path | None:
    """The checkpoint of the most steps in a Trainer's folder that has all that a resume reads.

    Looks at what there is and at headers; the bytes of large files are not read.

    Args:
        output_dir: Where the trainer saves.
        is_adapter: Whether an adapter is trained.
        but: A checkpoint that is not to be looked at.
    """
    found = [(TRAINER_CHECKPOINT.fullmatch(path.name), path) for path in output_dir.glob("checkpoint-*")]
    for _, path in sorted(((int(match[1]), path) for match, path in found if match is not None), reverse=True):
        if but is not None and path.name == but.name:
            continue
        with suppress(OSError, ValueError, UnsupportedError):
            _check(path, is_adapter=is_adapter, damage_of=partial(damage_of_saved, reads_records=False))
            return path
    return None


def _check(folder: Path, *, is_adapter: bool, damage_of: Callable[[Path], str | None]) -> None:
    _check_state(folder / _STATE)
    if any(os.path.lexists(folder / name) for name in ARCHIVES):
        for name in _RESTORED:
            if not os.path.lexists(folder / name):
                problem = f"missing: {ARCHIVES[name]} would start anew"
                raise SourceError(folder / name, field="file", problem=problem, remedy=ANOTHER_CHECKPOINT)
    for name in (*ARCHIVES, *_random_states(folder)):
        if os.path.lexists(folder / name) and (damage := damage_of(folder / name)) is not None:
            raise SourceError(folder / name, field="file", problem=damage, remedy=ANOTHER_CHECKPOINT)
        if name not in ARCHIVES and not os.path.lexists(folder / name):
            problem = "missing: dropout of its rank would start anew"
            raise SourceError(folder / name, field="file", problem=problem, remedy=ANOTHER_CHECKPOINT)
    if is_adapter:
        from lowmem.adapters.saved_adapter import read_files

        # The Trainer keeps each of several adapters in a folder of its own.
        if (folder / "adapter_config.json").exists():
            read_files(folder)
    else:
        for name, kind in (("config.json", PreTrainedConfig), ("generation_config.json", GenerationConfig)):
            if os.path.lexists(folder / name):
                values = read_json_object(folder / name, field="file", remedy=ANOTHER_CHECKPOINT)
                with naming_field(folder / name, values.members):
                    kind.from_dict(values.members)
        if not any(folder.glob(_WEIGHTS)):
            file = folder / "model.safetensors"
            raise SourceError(file, field="file", problem="missing", remedy=ANOTHER_CHECKPOINT)
        SafetensorsSource(folder).close()


def _check_shapes(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Torch finds a wrong shape when it has loaded the tensors before it."""
    with closing(SafetensorsSource(folder)) as source:
        for name, spec in source.tensors.items():
            shape = expected.get(name, tuple(spec.shape))
            if tuple(spec.shape) != shape:
                problem = f"shape {list(spec.shape)}, the model's is {list(shape)}"
                raise SourceError(spec.file, field=name, problem=problem, remedy=ANOTHER_CHECKPOINT)


def _random_states(folder: Path) -> Iterator[str]:
    """Where ranks saved: the files of this machine's, each of which writes its own and waits for no other.

    A checkpoint of fewer ranks has none for the others. One process alone gives its file another name, so that fewer
    are two at least.
    """
    found = ranks()
    names = (_OF_RANK.fullmatch(path.name) for path in folder.glob("rng_state_*.pth"))
    saved = {int(match[1]) for match in names if match is not None}
    first = found.rank - found.local_rank
    for rank in range(first, first + found.local_size) if saved and found.are_several else ():
        is_of_fewer = rank >= len(saved) >= 2 and saved == set(range(len(saved)))
        if not is_of_fewer:
            yield f"rng_state_{rank}.pth"


def _check_state(file: Path) -> None:
    fields = read_json_object(file, field="file", remedy=ANOTHER_CHECKPOINT)
    known = {field.name for field in dataclasses.fields(TrainerState)}
    for name, value in fields.members.items():
        if name not in known:
            fields.refuse(name, "expected a field of transformers' TrainerState")
        if name in _NUMBERS and type(value) not in (int, float):
            fields.refuse(name, f"expected a number, got {type(value).__name__}")
    for name in _NEEDED:
        if type(fields.members.get(name)) is not int:
            fields.refuse(name, "expected a whole number")
    for name, kind in (("log_history", list), ("stateful_callbacks", dict)):
        value = fields.members.get(name)
        if value is not None and not isinstance(value, kind):
            fields.refuse(name, f"expected a {kind.__name__}, got {type(value).__name__}")
        entries = value.values() if isinstance(value, dict) else value or ()
        if not all(isinstance(entry, dict | list) for entry in entries):
            fields.refuse(name, "expected objects in it")
