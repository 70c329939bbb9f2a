"""`plan` and `from_pretrained`: arguments are checked, refusals come first, and the work is handed on."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from lowmem.adapters.support import check_peft_config
from lowmem.errors import UnsupportedError
from lowmem.full.opening import master_dtype, moved_name, refuse_unsupported
from lowmem.headers.description import describing
from lowmem.loading import load, prepare_device
from lowmem.machines.cards import Machine, described, refuse_beyond
from lowmem.machines.rates import rates_again, rates_as_loaded, rates_for
from lowmem.machines.scaling import with_scaling
from lowmem.models.checkpoint import open_checkpoint, pick_device, resolve
from lowmem.monitoring.training_checks import check_every_trainer
from lowmem.packing.place import as_if_packed, open_packed
from lowmem.planning.job import Job, Task, Tuning, kind_of
from lowmem.planning.optimizer_sizes import OptimizerChoice, read_optimizer
from lowmem.planning.plan import Plan
from lowmem.planning.planner import plan_for, plan_step, read_with_assumed_adapter
from lowmem.planning.read_model import read_shapes
from lowmem.planning.shapes import ModelShapes
from lowmem.planning.step_memory import exchange_bytes
from lowmem.planning.step_time import Rates
from lowmem.processes.node import shared_bytes
from lowmem.processes.ranks import (
    Ranks,
    agreed,
    budget_of_rank,
    opening_together,
    ranks,
    refuse_another,
    refuse_engines,
    refuse_full,
    with_shared,
)
from lowmem.quantization.packing import packer_for
from offload import Budget, BudgetError, format_bytes, format_number, format_seconds

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from lowmem.models.checkpoint import Described, Opened


def from_pretrained(
    model: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    budget: Budget | None = None,
    tuning: Tuning = "adapter",
    optimizer: OptimizerChoice | None = None,
    masters: torch.dtype | str | None = None,
    quantization: str | None = None,
    packed_dir: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    chunk_tokens: int | None = None,
    micro_batch: int | None = None,
    num_labels: int | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cap_device: bool = False,
    **others: object,
) -> PreTrainedModel:
    """Open a checkpoint as the real transformers model, with its decoder blocks left on disk until they are visited.

    The result is what `AutoModelForCausalLM.from_pretrained` gives, class and all, and goes where that goes: PEFT, the
    Trainer, TRL's trainers, `generate`. Its weights are frozen. In processes of torchrun, DDP trains adapters.

    Args:
        model: Local folder, or hub id, of a safetensors checkpoint.
        plan: What `lowmem.plan` returned for this model, device and dtype, which need not be given again; planned for a
            batch of one sequence if not given.
        budget: Bounds for device and host memory, where no plan is given; measured where absent.
        tuning: "adapter": every weight is frozen and PEFT adapters train; "full": every weight is trained, by
            `lowmem.optim.AdamW` or any other optimizer.
        optimizer: What will train it, as in `plan`; AdamW if not given.
        masters: Type of the weights with tuning="full": fp32, or "bf16", in which blocks then compute and which
            `lowmem.optim.AdamW(writer="stochastic")` changes without losing small updates.
        quantization: None: weights move as they are stored, which may be quantised. "nf4", "fp4" or "int8": those of
            an ordinary checkpoint are packed once, into a folder that later runs read (`lowmem.pack`).
        packed_dir: That folder; one in the user's cache if not given. Said with its size before it is made.
        device: Compute device; the plan's, else the GPU if there is one, else the CPU.
        dtype: Compute dtype; the plan's, else float32 on a CPU and with tuning="full", on a GPU bfloat16 where it can.
            bfloat16 with tuning="full" on a GPU: only matrices move as bf16, for forwards under autocast.
        chunk_tokens: Tokens of a sequence that go through a block at a time; None for the planner's choice.
        micro_batch: Sequences that go through a block at a time; None for the planner's choice.
        num_labels: Give the sequence classification model with so many outputs, 1 for a reward model; a head that the
            checkpoint does not have is drawn at random and trained with `modules_to_save=["score"]`.
        attn_implementation: As in transformers; None for the model's own choice, which is "sdpa" for most.
        revision: Branch, tag or commit of the hub repository.
        trust_remote_code: Run model code that comes with the checkpoint.
        cap_device: Have torch refuse this whole process more of the GPU than the budget, beyond what it has now.
        others: Options of transformers that have no meaning here: refused, naming what to use instead.

    Raises:
        UnsupportedError: An option or the architecture cannot be honoured exactly; nothing was loaded.
        ValueError: The plan is for another model, device or dtype than is asked for, or `packed_dir` has no meaning.
        FileNotFoundError: There is no such folder or repository.
        offload.SourceError: A file is missing, damaged, or does not fit the configuration.
        offload.BudgetError: The budget is too small; says the smallest that works.
    """
    refuse_options(tuning=tuning, quantization=quantization, packed_dir=packed_dir, budget=budget, others=others)
    _refuse_other_types(model, plan, num_labels=num_labels, micro_batch=micro_batch, chunk_tokens=chunk_tokens)
    if plan is not None:
        _refuse_beside_plan(budget, micro_batch, chunk_tokens, optimizer)
        device, (dtype, masters) = device or plan.job.device, _types_of(plan, dtype, masters)
        num_labels = 1 if num_labels is None and plan.job.task == "reward" else num_labels
    chosen = pick_device(device)
    how: dict[str, Any] = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    given: dict[str, Any] = {"micro_batch": micro_batch, "chunk_tokens": chunk_tokens, "optimizer": optimizer}
    compute, given["moved_dtype"] = _dtypes(dtype, masters, tuning=tuning, device=chosen)
    with opening_together(), ExitStack() as unless_loaded:
        folder = resolve(model, revision=revision)
        opened = open_checkpoint(folder, name=str(model), device=chosen, dtype=compute, num_labels=num_labels, **how)
        if quantization is not None:
            opened = open_packed(opened, quantization, packed_dir=packed_dir, **how)
        unless_loaded.callback(opened.source.close)
        plan = _checked_plan(opened, plan, tuning=tuning, budget=budget, given=given, cap_device=cap_device)
        check_every_trainer()
        loaded = load(opened, plan=plan, rates_of=partial(rates_again, device=chosen))
        unless_loaded.pop_all()
    return loaded


def _refuse_beside_plan(*others: object) -> None:
    if any(other is not None for other in others):
        raise ValueError("give plan, or budget, micro_batch, chunk_tokens and optimizer, not both: the plan has them")


def _types_of(
    plan: Plan, dtype: torch.dtype | str | None, masters: torch.dtype | str | None
) -> tuple[torch.dtype | str | None, torch.dtype | str | None]:
    """Compute dtype and the masters' type: those given, else those of the plan."""
    if plan.job.tuning == "full":
        return dtype or plan.moved_dtype, masters or plan.compute_dtype
    return dtype or plan.compute_dtype, masters


def _checked_plan(
    opened: Opened,
    plan: Plan | None,
    *,
    tuning: Tuning,
    budget: Budget | None,
    given: Mapping[str, Any],
    cap_device: bool,
) -> Plan:
    """The plan given, or one for a job that nobody has described; rank 0's for all. It fits, and caps the device."""
    if tuning == "full":
        refuse_unsupported(opened.built, device=opened.device, dtype=opened.dtype)
    _refuse_another_opening(opened, tuning, given)

    def make() -> Plan:
        if plan is not None:
            return plan
        bounds = _bounds(budget, opened, ranks(), tuning=tuning)
        return plan_for(opened, budget=bounds, rates=rates_as_loaded(opened), tuning=tuning, **given)

    found = agreed("plan", make)
    if plan is not None:
        _refuse_another_plan(found, opened, tuning=tuning, moved=given["moved_dtype"])
    _require_fit(found, opened, tuning=tuning)
    if tuning == "full":
        refuse_full(ranks(), tier=found.choice.state_tier)
    _check_disk(found)
    prepare_device(opened.device, found if cap_device else None)
    return found


def _require_fit(plan: Plan, opened: Opened, *, tuning: Tuning) -> None:
    """As the plan's own; where ranks share, the budget it states is the one to give, before their part is taken off."""
    try:
        plan.require_fit()
    except BudgetError as error:
        passing = _passing_bytes(opened, ranks(), tuning=tuning)
        if not passing or opened.device.type != "cpu" or plan.device_bytes <= plan.device_budget_bytes:
            raise
        raise with_shared(error, passing) from error


def _bounds(budget: Budget | None, opened: Described, found: Ranks, *, tuning: Tuning) -> Budget:
    """What a plan has to keep to: one rank's part, where this process is one of several."""
    passing = _passing_bytes(opened, found, tuning=tuning)
    return budget_of_rank(budget, opened.device, shared_bytes=passing, found=found)


def _passing_bytes(opened: Described, found: Ranks, *, tuning: Tuning) -> int:
    """What a rank's budget has less, for the memory through which ranks of a machine pass on what they share."""
    if not found.are_several:
        return 0
    if tuning == "full":
        every_weight = read_shapes(opened).with_every_weight()
        return exchange_bytes(every_weight, num_sharing=found.local_size, on_gpu=opened.device.type != "cpu")
    return shared_bytes([streamed.spec for streamed in opened.built.blocks], found)


def _refuse_another_opening(opened: Opened, tuning: Tuning, given: Mapping[str, Any]) -> None:
    """Refuse ranks that open something else than rank 0 does, or it with other settings; as `refuse_another`."""
    if not ranks().are_several:
        return
    described = sha256((opened.folder / "config.json").read_bytes()).hexdigest()
    fingerprint = opened.source.fingerprint(of_copies=True) + described
    types = {"dtype": str(opened.dtype).removeprefix("torch."), "num_labels": opened.num_labels}
    split = {name: given[name] for name in ("micro_batch", "chunk_tokens", "moved_dtype")}
    refuse_another(opened.folder, fingerprint, settings={"tuning": tuning, **types, **split})


def _dtypes(
    dtype: torch.dtype | str | None, masters: torch.dtype | str | None, *, tuning: str, device: torch.device
) -> tuple[torch.dtype | str | None, str | None]:
    """Type of the model's parameters, the masters' where every weight is trained; and that of matrices on their way."""
    kept = master_dtype(masters, dtype, tuning=tuning)
    if tuning != "full":
        return dtype, None
    refuse_full(ranks(), masters=kept)
    moved = moved_name(dtype, device=device, masters=kept)
    if kept == torch.float32 and moved is None and dtype not in (None, torch.float32, "float32", "fp32"):
        raise UnsupportedError(
            f"tuning='full' with dtype={dtype}",
            reason="blocks compute from the fp32 master weights, or on a GPU from copies of them in bf16",
            instead="masters='bf16', dtype=torch.float32, or the trainer's bf16=True",
        )
    return kept, moved


def _check_disk(plan: Plan) -> None:
    """See that the plan's folder can be written to, before anything is loaded.

    Raises:
        ValueError: It cannot, naming why.
    """
    if plan.disk_folder is None or "disk" not in (plan.choice.state_tier, plan.choice.boundary_tier):
        return
    try:
        Path(plan.disk_folder).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=plan.disk_folder):
            pass
    except OSError as error:
        raise ValueError(
            f"Budget.disk: {plan.disk_folder} cannot be written to ({error.strerror}); give a folder on a local disk"
        ) from error


def _refuse_other_types(model: object, plan: object = None, **sizes: object) -> None:
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"model: expected a folder or a hub id, got {type(model).__name__}")
    if plan is not None and not isinstance(plan, Plan):
        raise TypeError(f"plan: expected what lowmem.plan returns, got {type(plan).__name__}")
    for name, value in sizes.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name}={value!r}: expected a whole number")


def plan(
    model: str | os.PathLike[str],
    *,
    task: Task = "sft",
    batch_size: int | Literal["auto"] = 1,
    seq_len: int,
    peft_config: PeftConfig | None = None,
    quantization: str | None = None,
    tuning: Tuning = "adapter",
    optimizer: OptimizerChoice | None = None,
    masters: torch.dtype | str | None = None,
    budget: Budget | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    rates: Rates | str | None = None,
    micro_batch: int | None = None,
    chunk_tokens: int | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    gradient_accumulation_steps: int = 1,
    completion_tokens: int | None = None,
    use_reference: bool | None = None,
    num_steps: int | None = None,
    num_examples: int | None = None,
    num_epochs: float = 1.0,
    machine: Machine | None = None,
    autocast: bool = True,
) -> Plan:
    """Find out what a job takes, whether it fits, and what to change, from the configuration and the shards' headers.

    Args:
        model: Folder of a safetensors checkpoint, or of its config.json alone; or a hub id: only headers are fetched.
        task: "sft", "dpo", "kto", "reward", "grpo", "rloo" or "generate".
        batch_size: Examples of one forward, pairs in DPO and Reward; "auto" for the smallest that is nearly as
            fast per token as any that fits; the advice then says what packed weights would change.
        seq_len: Tokens of one sequence, prompt and completion together.
        peft_config: The adapter that will be trained; a LoRA of rank 16 on all linear layers is assumed if not given.
        quantization: None: weights move as they are stored. "nf4", "fp4" or "int8": sized as if they were packed.
        tuning: "adapter": every weight is frozen and PEFT adapters train; "full": every weight is trained.
        optimizer: A name ("galore", "badam", or one of `SFTConfig(optim=...)`), a class of `lowmem.optim` or
            `torch.optim`, or `functools.partial` of one with its options; AdamW if not given.
        masters: As in `from_pretrained`.
        budget: Bounds for device and host memory; measured where absent.
        device: Compute device; the GPU if there is one, else the CPU.
        dtype: Compute dtype; float32 on a CPU, on a GPU bfloat16 where it can.
        rates: How fast this machine is: "measure" to find out now; if not given, what `lowmem bench` kept, or assumed.
        micro_batch: Sequences that go through a block at a time; None for the planner's choice.
        chunk_tokens: Tokens of a sequence that go through a block at a time; None for the planner's choice.
        revision: Branch, tag or commit of the hub repository.
        attn_implementation: As in transformers; give `from_pretrained` the same.
        trust_remote_code: Run model code that comes with the checkpoint.
        gradient_accumulation_steps: Batches per optimizer step; each passes over all weights anew.
        completion_tokens: Tokens generated for each sequence, where the task generates; 256, or half of `seq_len`.
        use_reference: Whether a step computes reference log-probabilities; as TRL's trainer does by default if None.
        num_steps: Optimizer steps of the whole run, to be told how long it takes.
        num_examples: Examples of the data set, in place of `num_steps`.
        num_epochs: How often a run goes through them.
        machine: What to plan for, if not this machine: no device of it is needed, and none is made.
        autocast: Whether a half type trains under autocast, TRL's default; a run is planned again for what it does.

    Raises:
        UnsupportedError: An option or the architecture cannot be honoured exactly.
        offload.SourceError: A file is missing, damaged, or does not fit the configuration.
        ValueError: A number is out of range.
    """
    refuse_options(tuning=tuning, quantization=quantization, budget=budget, peft_config=peft_config)
    _refuse_other_types(model)
    chosen = pick_device(device) if machine is None else _device_of(machine, budget, device=device, rates=rates)
    given: dict[str, Any] = {"num_steps": num_steps, "num_examples": num_examples, "num_epochs": num_epochs}
    given |= {"micro_batch": micro_batch, "chunk_tokens": chunk_tokens, "completion_tokens": completion_tokens}
    given |= {"gradient_accumulation_steps": gradient_accumulation_steps, "uses_reference": use_reference}
    given |= {"has_dropout": _has_dropout(peft_config), "autocast": autocast, "device": kind_of(chosen)}
    job = Job(task=task, batch_size=1 if batch_size == "auto" else batch_size, seq_len=seq_len, tuning=tuning, **given)
    opening: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    opening["attn_implementation"] = attn_implementation
    how: dict[str, Any] = {"peft_config": peft_config, "optimizer": optimizer, "budget": budget, "rates": rates}
    opening["dtype"], how["moved"] = _dtypes(dtype, masters, tuning=tuning, device=chosen)
    planned: Callable[..., Plan] = partial(_planned, model, job, device=chosen, opening=opening, machine=machine, **how)
    return _compared(planned, quantization, finds_batch=batch_size == "auto", packs=tuning == "adapter")


def _planned(
    model: str | os.PathLike[str],
    job: Job,
    quantization: str | None,
    *,
    finds_batch: bool = True,
    device: torch.device,
    opening: Mapping[str, Any],
    peft_config: PeftConfig | None,
    optimizer: OptimizerChoice | None,
    moved: str | None,
    budget: Budget | None,
    rates: Rates | str | None,
    machine: Machine | None,
) -> Plan:
    """The plan with the weights as they are stored, or as they would be packed."""
    found = ranks() if machine is None else Ranks(size=machine.gpus * machine.nodes, local_size=machine.gpus)
    job = replace(job, num_sharing=found.local_size)
    with describing(model, device=device, has_bf16=_has_bf16(machine), **opening) as opened:
        if quantization is not None:
            opened = as_if_packed(opened, quantization)
        shapes = _shapes_for(opened, job, moved, peft_config=peft_config, optimizer=optimizer)
        speeds = (
            rates_for(opened, shapes, rates, autocast=job.autocast) if machine is None else machine.rates_for(shapes)
        )
        whole = budget if machine is None else machine.budget(budget)
        bounds = _bounds(whole, opened, found, tuning=job.tuning)
    name, memory = described(machine, budget, bounds, device=device, num_sharing=found.local_size)
    made = plan_step(shapes, job, budget=bounds, rates=speeds, machine=name, finds_batch=finds_batch, memory=memory)
    if job.tuning == "full":
        dtype, other = made.compute_dtype, shapes.optimizer_of_whole_params
        refuse_full(found, masters=dtype, tier=made.choice.state_tier, optimizer=other)
    return made if machine is None else with_scaling(made, shapes, machine, alone=machine.budget(budget))


_COMPARED = {"int8": "8 bits", "nf4": "4 bits"}
_WORTH = 0.95
"""As for other advice: a change is worth a sentence if a token takes at most this part of its time."""


def _compared(planned: Callable[..., Plan], quantization: str | None, *, finds_batch: bool, packs: bool) -> Plan:
    """The plan, and where a batch was looked for what packed weights would change."""
    made = planned(quantization, finds_batch=finds_batch)
    compares = finds_batch and packs and quantization is None
    return replace(made, advice=(*made.advice, *(_packed_advice(made, planned) if compares else ())))


def _packed_advice(made: Plan, planned: Callable[[str], Plan]) -> Iterator[str]:
    """What a search found for packed weights, which change the result and are never chosen by themselves."""
    for quantization, bits in _COMPARED.items():
        try:
            other = planned(quantization)
        except UnsupportedError:  # It is quantised already, or has nothing to pack.
            return
        if other.fits and (not made.fits or other.token_s <= _WORTH * made.token_s):
            speed = f"{format_seconds(other.step_s)} per step, {format_number(1 / other.token_s)} tokens/s"
            yield (
                f'quantization="{quantization}" (frozen weights rounded to {bits}; another result): a batch of '
                f"{other.batch_size} takes {speed}, on {format_bytes(other.device_bytes)} of the device and "
                f"{format_bytes(other.host_bytes)} of the host."
            )


def _device_of(machine: object, budget: Budget | None, **others: object) -> torch.device:
    """The kind of device of a machine that is planned for; none is made.

    Raises:
        TypeError: It is no machine.
        ValueError: What it says is given too, or the budget is more than it has.
    """
    if not isinstance(machine, Machine):
        raise TypeError(f"machine={machine!r}: expected lowmem.Machine(gpu=..., ram=..., disk_gbps=...)")
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name}={value!r}: give machine or {name}, not both: the machine says it")
    refuse_beyond(machine, budget)
    return torch.device(machine.device)


def _has_bf16(machine: Machine | None) -> bool | None:
    return None if machine is None or machine.card is None else machine.card.has_bf16


def _has_dropout(peft_config: PeftConfig | None) -> bool:
    return bool(getattr(peft_config, "lora_dropout", 0.0))


_PLACES_ITSELF = "weights are placed block by block, within a budget"
_QUANTIZES = "weights are packed once, into a folder that later runs share"


_HUB = "files come through huggingface_hub, which reads its settings from the environment"

# What scripts pass to transformers, why it has no meaning here, and what to write instead.
_OTHERS = {
    "device_map": (_PLACES_ITSELF, 'device="cuda" or "cpu", and budget=lowmem.Budget(device=..., host=...)'),
    "max_memory": (_PLACES_ITSELF, "budget=lowmem.Budget(device=..., host=...)"),
    "offload_folder": (_PLACES_ITSELF, "budget=lowmem.Budget(disk=...)"),
    "offload_state_dict": (_PLACES_ITSELF, "leave it out"),
    "offload_buffers": (_PLACES_ITSELF, "leave it out"),
    "low_cpu_mem_usage": (_PLACES_ITSELF, "leave it out: no more than the budget is taken"),
    "use_safetensors": ("nothing else is read", "leave it out"),
    "torch_dtype": ("transformers calls it dtype now", "dtype="),
    "load_in_4bit": (_QUANTIZES, 'quantization="nf4"; a checkpoint that is quantised already needs no option'),
    "load_in_8bit": (_QUANTIZES, 'quantization="int8"; a checkpoint that is quantised already needs no option'),
    "quantization_config": (_QUANTIZES, 'quantization="nf4", "fp4" or "int8"'),
    "use_flash_attention_2": ("transformers calls it attn_implementation now", 'attn_implementation="sdpa"'),
    "use_cache": ("it is a field of the configuration", "model.config.use_cache = ... afterwards"),
    "config": ("the folder's config.json is what its files are checked against", "edit a copy of the folder"),
    "adapter_name": ("adapters are PEFT's", "peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)"),
    "cache_dir": (_HUB, "HF_HOME in the environment"),
    "local_files_only": (_HUB, "HF_HUB_OFFLINE=1 in the environment"),
    "token": (_HUB, "hf auth login, or HF_TOKEN in the environment"),
    "force_download": (_HUB, "hf download --force-download"),
    "subfolder": ("a checkpoint is one folder", "the path of that folder, of a copy on disk"),
    "variant": ("a checkpoint is one set of files", "a folder that holds these files under their usual names"),
    "max_seq_length": ("sequences may have any length", "max_length of the trainer's configuration"),
    "full_finetuning": ("it is called tuning here", 'tuning="full"'),
}


def _refuse_others(others: Mapping[str, object]) -> None:
    """Name what to use instead of an option that `from_pretrained` does not have.

    Raises:
        UnsupportedError: It is known from elsewhere.
        TypeError: It is not.
    """
    for name, value in others.items():
        if name in _OTHERS:
            reason, instead = _OTHERS[name]
            raise UnsupportedError(f"{name}={ascii(value)[:60]}", reason=reason, instead=instead)
        if name in inspect.signature(plan).parameters:
            raise TypeError(
                f"lowmem.from_pretrained has no option {name!r}: it belongs to a plan; "
                f"plan=lowmem.plan(model, {name}=...) brings it here"
            )
        options = [option for option in inspect.signature(from_pretrained).parameters if option != "others"]
        near = get_close_matches(name, options, n=1)
        hint = f"did you mean {near[0]}=?" if near else f"it takes {', '.join(options[1:])}"
        raise TypeError(
            f"lowmem.from_pretrained has no option {name!r}: {hint}; fields of the model's configuration can be set on "
            "model.config afterwards"
        )


def _refuse_another_plan(plan: Plan, opened: Opened, *, tuning: str, moved: str | None) -> None:
    """Refuse a plan that was made for something else than what is opened.

    Raises:
        ValueError: Model, device, dtype or tuning differ.
    """
    shapes = read_shapes(opened)
    if plan.job.tuning == "full":
        shapes = shapes.with_every_weight()
    if opened.num_labels is not None:
        shapes = shapes.with_score_head()
    dtype = str(opened.dtype).removeprefix("torch.")
    for what, planned, found in (
        ("tuning", plan.job.tuning, tuning),
        ("device", plan.job.device, opened.device.type),
        ("dtype", plan.compute_dtype, dtype),
        ("dtype of matrices on the GPU", plan.moved_dtype, moved),
        ("blocks", len(plan.placements), len(shapes.blocks)),
        ("bytes of the blocks", sum(plan.placement.block_bytes), shapes.stored_bytes),
        ("bytes of the head", plan.bytes_of("head", tier="device"), shapes.head_bytes),
    ):
        if planned != found:
            raise ValueError(
                f"the plan is for {plan.model} with {what}: {planned}, and {shapes.name} is opened with {found}; plan "
                "with the same, or leave device and dtype out here: the plan has them"
            )


def refuse_options(
    *,
    tuning: str,
    quantization: str | None,
    packed_dir: object = None,
    budget: object = None,
    peft_config: PeftConfig | None = None,
    others: Mapping[str, object] | None = None,
) -> None:
    """Refuse what cannot be planned or loaded yet.

    Raises:
        UnsupportedError: Full tuning, a quantisation, or an adapter that cannot be trained exactly.
        ValueError: A folder to pack into, and nothing to pack.
        TypeError: A budget that is none, or an option that is not known.
    """
    if budget is not None and not isinstance(budget, Budget):
        given = repr(budget) if isinstance(budget, str) else '"6GiB"'
        raise TypeError(f"budget={budget!r}: expected lowmem.Budget(device={given}, host=...), each of them optional")
    _refuse_others(others or {})
    refuse_engines()
    if peft_config is not None:
        if not hasattr(peft_config, "peft_type"):
            raise TypeError(f"peft_config: expected one of PEFT's, such as LoraConfig(r=16), got {peft_config!r:.80}")
        check_peft_config(peft_config)
    if tuning not in get_args(Tuning):
        raise UnsupportedError(
            f"tuning={tuning!r}", reason="it is not known", instead=f"one of {', '.join(map(repr, get_args(Tuning)))}"
        )
    if tuning == "full" and peft_config is not None:
        raise UnsupportedError(
            'peft_config with tuning="full"',
            reason="an adapter is trained on frozen weights",
            instead='tuning="adapter" with the adapter, or tuning="full" without it',
        )
    if packed_dir is not None and quantization is None:
        raise ValueError(
            f"packed_dir={str(packed_dir)!r} without quantization=: it is the folder that quantization= packs into; a "
            "folder that is packed already is opened as the model"
        )
    if quantization is not None:
        packer_for(quantization)
        if tuning == "full":
            raise UnsupportedError(
                f"quantization={quantization!r} with tuning='full'",
                reason="a trained weight would be rounded to a few bits in every step",
                instead="tuning='adapter' with it, or tuning='full' without it",
            )


def _shapes_for(
    opened: Described, job: Job, moved: str | None, *, peft_config: PeftConfig | None, optimizer: OptimizerChoice | None
) -> ModelShapes:
    if job.tuning == "full":
        refuse_unsupported(opened.built, device=opened.device, dtype=opened.dtype)
    if peft_config is None and job.tuning == "adapter" and job.trains:
        shapes = read_with_assumed_adapter(opened, seq_len=job.seq_len)
    else:
        shapes = read_shapes(opened, peft_config=peft_config, seq_len=job.seq_len)
    if job.tuning == "full":
        shapes = shapes.with_every_weight(moved)
    if job.trains:
        shapes = replace(shapes, optimizer=read_optimizer(optimizer, shapes, opened.built.model))
    return shapes.with_score_head() if job.task == "reward" else shapes
