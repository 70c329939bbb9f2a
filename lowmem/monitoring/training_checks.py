"""What every Trainer of a streamed model checks, with or without `lowmem.Monitor`, before a weight is changed.

Options that cannot be honoured are refused when the Trainer is made, a model in which nothing trains when training
begins, and a step whose gradients did not come from the streamed blocks before the optimizer uses them.
"""

from __future__ import annotations

import fcntl
import os
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from lowmem.errors import UnsupportedError
from lowmem.internals.transformers import add_default_callback, before_resume, leave_where_it_is, on_interruption
from lowmem.monitoring.resume_checks import check_before_resume, newest_complete
from lowmem.optim.optimizer import RuleOptimizer
from lowmem.planning.optimizer_sizes import sizes_in_training
from lowmem.processes.ranks import ranks
from lowmem.streaming.runtime import Runtime, is_streamed, runtime_of
from offload import FolderInUse

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

    from lowmem.streaming.runtime import Visit


_ANOTHER_ENGINE = "another engine would need all weights, which are streamed"
_PLACES_WEIGHTS = "it moves and shards the weights itself"
# Options of trainers that are refused where they are set, why, and what to write instead.
_REFUSED = {
    "activation_offloading": (
        "it would take streamed weights for activations",
        "Budget.device: block inputs go to the host where the plan finds no room",
    ),
    "torch_compile": (
        "a compiled graph cannot have its weights exchanged from block to block",
        "torch_compile=False",
    ),
    "use_vllm": (_ANOTHER_ENGINE, "use_vllm=False: generate goes block by block with the whole batch"),
    "use_transformers_continuous_batching": (
        _ANOTHER_ENGINE,
        "use_transformers_continuous_batching=False: generate goes block by block with the whole batch",
    ),
    "deepspeed": (_PLACES_WEIGHTS, "no deepspeed: the scheduler streams the weights"),
    "fsdp": (_PLACES_WEIGHTS, "no fsdp: the scheduler streams the weights"),
}


def refuse_training_options(args: TrainingArguments) -> None:
    """Refuse what would be ignored or would go wrong.

    Gradient checkpointing itself may be on or off: blocks are recomputed either way.

    Args:
        args: Of transformers or TRL.

    Raises:
        UnsupportedError: Names the option, the reason and what to use instead.
    """
    kwargs = getattr(args, "activation_checkpointing_kwargs", None) or {}
    harmless = {"every_n_layers": (None, 1), "offload": (None, False), "selective": (None, False)}
    for option, values in harmless.items():
        # By identity: True equals 1.
        if not any(kwargs.get(option) is value for value in values):
            raise UnsupportedError(
                f"activation_checkpointing_kwargs={{{option!r}: {kwargs[option]!r}}}",
                reason="a streamed block is always recomputed in its backward, and keeps only its input",
                instead="lowmem.plan, which decides from the budget what is kept where",
            )
    for option, (reason, instead) in _REFUSED.items():
        value = getattr(args, option, None)
        if value:
            raise UnsupportedError(f"{option}={value!r}", reason=reason, instead=instead)
    if getattr(args, "ddp_static_graph", False) and args.gradient_accumulation_steps > 1:
        raise UnsupportedError(
            f"ddp_static_graph=True with gradient_accumulation_steps={args.gradient_accumulation_steps}",
            reason="torch's DDP fails an internal check where a static graph goes through several backwards in a step",
            instead="ddp_static_graph=None; or a larger per_device_train_batch_size, which shares one transfer of the "
            "weights, and gradient_accumulation_steps=1",
        )


def how_to_go_on(output_dir: str, *, is_adapter: bool) -> str:
    """What to do after an interruption, in a sentence: a checkpoint to go on from, or how to have one.

    Args:
        output_dir: Where the trainer saves.
        is_adapter: Whether an adapter is trained.
    """
    complete = newest_complete(Path(output_dir), is_adapter=is_adapter)
    if complete is None:
        return (
            f"training was interrupted, and there is no checkpoint in {output_dir} yet: start again, with a smaller "
            "save_steps to lose less"
        )
    # One that was being written then may come after it, and is what True stands for.
    last = get_last_checkpoint(output_dir)
    which = "True" if last is not None and Path(last).name == complete.name else repr(str(complete))
    return (
        f"training was interrupted; its last checkpoint is {complete}: run the script again with "
        f"trainer.train(resume_from_checkpoint={which})"
    )


def _claim(folder: Path, until_closed: ExitStack) -> None:
    """Keep other trainings out of an output folder, as far as its file system can.

    The folder itself is locked, nothing is written to it. The lock goes with the process.

    Args:
        folder: The folder.
        until_closed: Closing it lets others in again.

    Raises:
        FolderInUse: A model is being trained into it.
    """
    # Some network file systems lock no folders.
    with suppress(OSError), ExitStack() as opened:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        opened.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderInUse(folder, pid=None, holder="a training that saves its checkpoints there") from error
        # A data loader's workers have the lock as well, and may live longer: closing it is not enough.
        opened.callback(fcntl.flock, lock, fcntl.LOCK_UN)
        until_closed.push(opened.pop_all())


class TrainingChecks(TrainerCallback):
    """Stands in front of the reporters in every Trainer; does nothing where the model is not streamed."""

    def __init__(self) -> None:
        self._runtime: weakref.ref[Runtime] | None = None
        self._stop_listening: Callable[[], None] = lambda: None
        self._num_visits: Counter[str] = Counter()

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        """Refuse options that a streamed model cannot honour, as soon as the Trainer is made."""
        model = kwargs.get("model")
        if isinstance(model, nn.Module) and is_streamed(model):
            refuse_training_options(args)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        """Refuse a model in which nothing trains, options that were set since, a folder that another run saves to."""
        self._stop_listening()  # a train() that raised has no on_train_end
        self._runtime = None
        model = kwargs.get("model")
        if not isinstance(model, nn.Module) or not is_streamed(model):
            return
        refuse_training_options(args)
        if not any(param.requires_grad for param in model.parameters()):
            raise ValueError(
                "nothing in this model is to be trained: lowmem.from_pretrained freezes every weight; give the trainer "
                "a peft_config, pass a model made by peft.get_peft_model (PeftModel.from_pretrained: "
                'is_trainable=True), or open it with tuning="full"'
            )
        runtime = runtime_of(model)
        optimizer = getattr(kwargs.get("optimizer"), "optimizer", kwargs.get("optimizer"))
        if runtime.full is None or not isinstance(optimizer, RuleOptimizer):
            # One of lowmem's on weights of its own has told already.
            trained = [param for param in model.parameters() if param.requires_grad]
            runtime.optimizer = sizes_in_training(
                optimizer, str(getattr(args.optim, "value", args.optim)), trained, model=model
            )
        self._runtime = weakref.ref(runtime)
        if state.is_world_process_zero and 0 < state.max_steps <= state.global_step:
            # By the trainer's rules, and as without streaming: it looks at its limit behind a step, not before one.
            warnings.warn(
                f"the checkpoint is of a run that has taken all its steps ({state.global_step} of {state.max_steps}): "
                "nothing is left to train, though the Trainer takes one more step where the last epoch is unfinished; "
                "for more, raise max_steps or num_train_epochs",
                UserWarning,
                stacklevel=2,
            )
        runtime.output_claim.close()
        if state.is_world_process_zero and args.save_strategy != "no":
            _claim(Path(args.output_dir), runtime.output_claim)
        self._stop_listening = runtime.listen(self._visited)
        runtime.advise_interrupted = partial(how_to_go_on, args.output_dir, is_adapter=hasattr(model, "peft_config"))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        """Begin an optimizer step."""
        self._num_visits.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object
    ) -> None:
        """Make sure that the step went through the streamed blocks, before the optimizer uses its gradients.

        Raises:
            RuntimeError: No block was called, or blocks with trainable parameters got no backward.
        """
        runtime = None if self._runtime is None else self._runtime()
        if runtime is None or self._num_visits["backward"]:
            return
        step = f"step {state.global_step + 1} of a streamed model"
        if not self._num_visits:
            raise RuntimeError(
                f"{step} called none of its {runtime.num_blocks} blocks, so its loss did not come from their weights: "
                "something replaced the forward of the model or of its layers after lowmem.from_pretrained; build the "
                "model again and leave those alone"
            )
        for index, streamed in enumerate(runtime.blocks):
            names = [name for name, param in streamed.block.module.named_parameters() if param.requires_grad]
            if names:
                raise RuntimeError(
                    f"{step} had {self._num_visits.total()} block calls but no backward through any block, although "
                    f"{names[0]} of block {index} is to be trained: it got no gradient; check that the loss depends on "
                    "the model's output and that the forward does not run under torch.no_grad"
                )

    def on_log(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        """Let a monitor add its values before the reporters, which come next, take the log as it is."""
        logs = kwargs.get("logs")
        runtime = None if self._runtime is None else self._runtime()
        if runtime is not None and runtime.add_to_log is not None and isinstance(logs, dict):
            runtime.add_to_log(state, logs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        """Stop listening."""
        self._stop_listening()
        runtime = None if self._runtime is None else self._runtime()
        if runtime is not None:
            runtime.advise_interrupted = None
            runtime.output_claim.close()

    def _visited(self, visit: Visit) -> None:
        if not visit.started:
            self._num_visits[visit.phase] += 1


def check_every_trainer() -> None:
    """Have every Trainer that is made from now on begin with `TrainingChecks`.

    Raises:
        UnsupportedError: This version of transformers gives no way to.
    """
    add_default_callback(TrainingChecks)
    before_resume(check_before_resume)
    on_interruption(_say_how_to_go_on)
    leave_where_it_is(is_streamed)


_LOSS_WAIT_S = 2.0
"""Longest wait for word of a lost process, after a collective operation has failed: word comes within milliseconds."""


_ENDED_ELSEWHERE = (
    "a rank of this run has ended or cannot be reached, perhaps one on another machine: look at what it wrote there; "
    "start all ranks again, from the last checkpoint"
)


def _is_of_ranks(error: RuntimeError) -> bool:
    """Whether ranks could not reach each other: gloo's errors have no class of their own, NCCL's have."""
    return "gloo" in str(error) or isinstance(error, getattr(torch.distributed, "DistError", ()))


def _say_how_to_go_on(model: nn.Module, interruption: BaseException) -> None:
    if not is_streamed(model):
        return
    runtime = runtime_of(model)
    runtime.output_claim.close()
    if not isinstance(interruption, (KeyboardInterrupt, RuntimeError)):
        return
    if isinstance(interruption, RuntimeError):
        # DDP says that a connection was closed, and by which address.
        lost = None if runtime.find_lost is None else runtime.find_lost(_LOSS_WAIT_S)
        if lost is None and ranks().are_several and _is_of_ranks(interruption):
            interruption.add_note(_ENDED_ELSEWHERE)
        elif lost is not None and lost is not interruption:
            interruption.add_note(str(lost))
        return
    if runtime.advise_interrupted is not None:
        interruption.add_note(runtime.advise_interrupted())
    if runtime.note_interrupted is not None:
        runtime.note_interrupted()
