"""The command line: plan a job, look at the machine, measure it, merge an adapter, draw a trace."""

from __future__ import annotations

import json
import re
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, cast

import typer

from lowmem import __version__

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

    from lowmem.machines.cards import Machine
    from lowmem.packing.selection import Included
    from lowmem.planning.job import Task
    from lowmem.planning.plan import Plan


_FAILED = 2
"""Exit status where something was refused or went wrong; 1 is for answers of "no" (`plan`, `doctor`)."""

app = typer.Typer(
    help="Fine-tune a model that fits in neither device memory nor RAM.",
    add_completion=True,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(is_asked_for: bool) -> None:
    if is_asked_for:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


Model = Annotated[str, typer.Argument(help="Local folder, or hub id, of a safetensors checkpoint.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repository.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code of the checkpoint.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quantization = Annotated[str | None, typer.Option(help="Packed weights: nf4, fp4 or int8.")]
ComputeOn = Annotated[str | None, typer.Option(help="Compute device: cpu or cuda; the GPU if there is one.")]
ComputeIn = Annotated[str | None, typer.Option(help="Compute dtype; float32 on a CPU.")]
Autocast = Annotated[
    bool, typer.Option(help="A model in a half type trains under autocast to it, as TRL's trainers do by default.")
]


@app.command()
def plan(
    model: Model,
    task: Annotated[str, typer.Option(help="sft, dpo, kto, reward, grpo, rloo or generate.")] = "sft",
    batch_size: Annotated[int | None, typer.Option(help="Examples per device and forward; 1 if absent.")] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Find the batch that is fastest per token, instead.")
    ] = False,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sequence, prompt and completion together.")] = 2048,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Batches per optimizer step.")] = 1,
    completion_tokens: Annotated[int | None, typer.Option(help="Tokens generated for each sequence.")] = None,
    num_steps: Annotated[int | None, typer.Option(help="Optimizer steps of the whole run.")] = None,
    examples: Annotated[int | None, typer.Option(help="Examples of the data set, instead of steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="How often a run goes through them; once if absent.")] = None,
    lora_r: Annotated[int, typer.Option(help="Rank of the LoRA adapter; 0 for none, where nothing is trained.")] = 16,
    lora_dropout: Annotated[float, typer.Option(help="Dropout of the adapter's inputs.")] = 0.0,
    dora: Annotated[bool, typer.Option("--dora", help="Train DoRA instead of LoRA.")] = False,
    target_modules: Annotated[str, typer.Option(help="all-linear, or names separated by commas.")] = "all-linear",
    device: Annotated[str | None, typer.Option(help="Device memory, 20GiB for instance; measured if absent.")] = None,
    host: Annotated[str | None, typer.Option(help="RAM to cache blocks in; measured if absent, 0 for none.")] = None,
    disk: Annotated[Path | None, typer.Option(help="Folder for what must be written.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences that go through a block at a time.")] = None,
    chunk_tokens: Annotated[int | None, typer.Option(help="Tokens of each that go through it at a time.")] = None,
    quantization: Quantization = None,
    tuning: Annotated[str, typer.Option(help="adapter, or full: every weight.")] = "adapter",
    optimizer: Annotated[str | None, typer.Option(help="galore, badam, adafactor, ...; AdamW if absent.")] = None,
    masters: Annotated[str | None, typer.Option(help="With --tuning full, type of the weights: fp32 or bf16.")] = None,
    state_dtype: Annotated[str | None, typer.Option(help="How AdamW keeps its moments: fp32, bf16 or 8bit.")] = None,
    use_reference: Annotated[bool | None, typer.Option(help="Compute a reference's values; else as TRL does.")] = None,
    gpu: Annotated[str | None, typer.Option(help='Plan for a machine with this card, "RTX 4090" for instance.')] = None,
    ram: Annotated[str | None, typer.Option(help="Plan for a machine with so much RAM, 64GiB for instance.")] = None,
    disk_gbps: Annotated[float | None, typer.Option(help="GB/s that its drive reads.")] = None,
    vram: Annotated[str | None, typer.Option(help="Memory of its card, instead of the table's.")] = None,
    tflops: Annotated[float | None, typer.Option(help="Dense 16-bit TFLOP/s of its card.")] = None,
    pcie_gbps: Annotated[float | None, typer.Option(help="GB/s of copies to its card.")] = None,
    memory_gbps: Annotated[float | None, typer.Option(help="GB/s of its card's memory.")] = None,
    gpus: Annotated[int | None, typer.Option(help="How many such cards it has, each with a process.")] = None,
    nodes: Annotated[int | None, typer.Option(help="How many such machines there are.")] = None,
    on: ComputeOn = None,
    dtype: ComputeIn = None,
    autocast: Autocast = True,
    measure: Annotated[bool, typer.Option("--measure", help="Measure disk and compute first (1 s).")] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Say whether a job fits, what takes how much where, and how long a step takes. Loads nothing.

    A hub id costs its config.json and the shards' headers; a folder with config.json alone is enough. With --gpu, --ram
    or --disk-gbps the plan is for another machine, of which nothing need be here. Exits with 1 if it does not fit.
    """
    from lowmem.api import plan as make_plan
    from offload import Budget

    lora = _lora(lora_r, lora_dropout, dora=dora, target_modules=target_modules, tuning=tuning, task=task)
    card = {"gpu": gpu, "vram": vram, "tflops": tflops, "pcie_gbps": pcie_gbps, "memory_gbps": memory_gbps}
    machine = _machine(on=on, measure=measure, ram=ram, disk_gbps=disk_gbps, gpus=gpus, nodes=nodes, **card)
    opening: dict[str, Any] = {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
    opening |= {"masters": masters, "micro_batch": micro_batch, "chunk_tokens": chunk_tokens, "autocast": autocast}
    made = make_plan(
        model,
        task=cast("Task", task),
        batch_size=_batch(batch_size, search=search),
        seq_len=seq_len,
        gradient_accumulation_steps=gradient_accumulation_steps,
        completion_tokens=completion_tokens,
        num_steps=num_steps,
        num_examples=examples,
        num_epochs=_epochs(epochs, examples=examples),
        machine=machine,
        peft_config=lora,
        quantization=quantization,
        tuning=tuning,  # type: ignore[arg-type]  # an unknown one is refused by name
        optimizer=_optimizer(optimizer, state_dtype=state_dtype),
        use_reference=use_reference,
        budget=Budget(device=device, host=host, disk=disk),
        device=on,
        rates="measure" if measure else None,
        **opening,
    )
    _show(made, as_json=as_json)


def _batch(batch_size: int | None, *, search: bool) -> int | Literal["auto"]:
    """The batch that was asked for, or that one is to be found.

    Raises:
        ValueError: Both.
    """
    if not search:
        return 1 if batch_size is None else batch_size
    if batch_size is not None:
        raise ValueError(f"--batch-size {batch_size} with --search, which finds the batch: leave one of them out")
    return "auto"


def _epochs(epochs: float | None, *, examples: int | None) -> float:
    """How often a run goes through its examples.

    Raises:
        ValueError: Nobody says how many these are.
    """
    if epochs is not None and examples is None:
        raise ValueError(f"--epochs {epochs} without --examples: give it too, or leave --epochs out")
    return 1.0 if epochs is None else epochs


def _optimizer(named: str | None, *, state_dtype: str | None) -> str | partial[torch.optim.Optimizer] | None:
    """The optimizer to plan for: the one that is named, or AdamW with moments as they are to be kept.

    Raises:
        ValueError: Moments of another optimizer.
    """
    if state_dtype is None:
        return named
    if named is not None and named.lower() != "adamw":
        raise ValueError(f"--state-dtype {state_dtype} with --optimizer {named}: only AdamW has moments in other types")
    from lowmem.optim import AdamW

    # Masters in bf16 that were rounded to nearest would lose small updates; fp32 is written as it is.
    return cast("partial[torch.optim.Optimizer]", partial(AdamW, state_dtype=state_dtype, writer="stochastic"))


def _show(made: Plan, *, as_json: bool) -> None:
    typer.echo(json.dumps(made.to_dict()) if as_json else str(made))
    if not made.fits:
        raise typer.Exit(1)


def _machine(*, on: str | None, measure: bool, **given: object) -> Machine | None:
    """The machine that was described; None where none of it was, for this one.

    Raises:
        ValueError: It is not here to be measured, or says itself what computes; or a number is one of no card.
    """
    named = {name: value for name, value in given.items() if value is not None}
    if not named:
        return None
    if "tflops" in named and "gpu" not in named:
        raise ValueError(f"--tflops {named['tflops']} without --gpu: give it too, or leave --tflops out")
    if measure or on is not None:
        option = "--measure" if on is None else f"--on {on}"
        raise ValueError(f"{option} with --gpu or another machine's numbers: it is of this one; leave it out")
    from lowmem.machines.cards import Machine

    return Machine(**named)  # type: ignore[arg-type]  # types are those of the options


def _lora(rank: int, dropout: float, *, dora: bool, target_modules: str, tuning: str, task: str) -> PeftConfig | None:
    """The adapter that was asked for; None where every weight is trained, or without a rank.

    Raises:
        ValueError: An option has no adapter to belong to, or nothing would be trained.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"--lora-dropout {dropout}: expected at least 0 and less than 1")
    if dora and (tuning == "full" or rank == 0):
        raise ValueError(f"--dora with {'--tuning full' if tuning == 'full' else '--lora-r 0'}: leave one of them out")
    if rank == 0 and tuning != "full" and task != "generate":
        raise ValueError("--lora-r 0: nothing would be trained; give a rank, --tuning full or --task generate")
    if rank == 0 or tuning == "full":
        return None
    from peft import LoraConfig

    names = target_modules if target_modules == "all-linear" else target_modules.split(",")
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=dropout, use_dora=dora, target_modules=names, task_type="CAUSAL_LM"
    )


@app.command()
def doctor(
    folder: Annotated[
        str | None, typer.Argument(help="A model (or its hub id), adapter, Trainer checkpoint or store to check too.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Check versions, memory, devices and, with a folder, whether what lies in it is whole; loads nothing.

    Exits with 1 if something has to be done before training can work.
    """
    from dataclasses import asdict

    from lowmem.doctor import examine
    from lowmem.models.checkpoint import resolve

    place = None if folder is None else resolve(folder, revision=revision)
    num_broken = 0
    for check in examine(place, trust_remote_code=trust_remote_code):
        num_broken += check.is_broken
        if as_json:
            typer.echo(json.dumps(asdict(check)))
            continue
        mark = "FAIL" if check.is_broken else "note" if check.remedy else "ok"
        typer.echo(f"{mark:4}  {check.name:14}  {check.finding}")
        if check.remedy:
            typer.echo(f"{'':22}-> {check.remedy}")
    if num_broken:
        raise typer.Exit(1)


@app.command()
def bench(
    model: Model,
    on: ComputeOn = None,
    dtype: ComputeIn = None,
    autocast: Autocast = True,
    quantization: Quantization = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    disk: Annotated[
        str | None, typer.Option(help="Measure writing and reading back too, in this folder (Budget.disk).")
    ] = None,
) -> None:
    """Measure disk, copies and the products of this model's shapes, and keep the rates for plans; JSON lines.

    Takes a minute or two, more for mixtures of experts, and the memory of one block of each kind.
    """
    from lowmem.machines.bench import bench_lines, disturbances

    lines = bench_lines(
        model,
        device=on,
        dtype=dtype,
        quantization=quantization,
        revision=revision,
        trust_remote_code=trust_remote_code,
        disk=disk,
        autocast=autocast,
    )
    for line in lines:
        typer.echo(json.dumps(line))
        for words in disturbances(line):
            sys.stderr.write(f"lowmem: {words}\n")


@app.command()
def merge(
    model: Annotated[str, typer.Argument(help="The checkpoint that the adapter was trained on: folder or hub id.")],
    adapter: Annotated[Path, typer.Option(help="Folder of the saved adapter.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must be empty or absent.")],
    dtype: Annotated[str | None, typer.Option(help="Type to store weights in; each keeps its own if absent.")] = None,
    quantization: Quantization = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write model and adapter as one ordinary checkpoint, a tensor at a time; packed with --quantization.

    Says how much of the adapter's change was lost to rounding, where that is more than 1%, or how far packing moved the
    weights.
    """
    from lowmem.adapters.merge import merge as merge_adapter

    with warnings.catch_warnings(record=True) as warned:
        folder = merge_adapter(
            model,
            adapter=adapter,
            output=output,
            dtype=dtype,
            quantization=quantization,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    for warning in warned:
        if warning.category is UserWarning:
            sys.stderr.write(f"lowmem: {warning.message}\n")
    typer.echo(str(folder))


@app.command()
def pack(
    model: Model,
    quantization: Quantization = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write; must be empty or absent.")] = None,
    include: Annotated[
        str | None, typer.Option(help="embeddings, head, or both with a comma between them: packed too.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare a packed folder with its checksums instead.")
    ] = False,
    on: ComputeOn = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Quantise a checkpoint's decoder blocks into a folder of their own, a block at a time; goes on if interrupted.

    With --verify MODEL is a folder that was packed: names damaged tensors, and exits with 1 if there are any.
    """
    from lowmem.packing.place import pack as pack_model
    from lowmem.packing.place import verify_pack

    if verify:
        given = {"--quantization": quantization, "--output": output, "--include": include, "--revision": revision}
        if beside := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"lowmem pack --verify reads a folder and takes no {' or '.join(beside)}; leave it out")
        found = verify_pack(model)
        for name in found:
            typer.echo(f"damaged: {name}")
        if found:
            raise typer.Exit(1)
        typer.echo("every tensor is as it was written")
        return
    if quantization is None or output is None:
        raise ValueError("lowmem pack needs --quantization and --output, or --verify")
    folder = pack_model(
        model,
        quantization=quantization,
        output=output,
        include=cast("list[Included]", [part.strip() for part in include.split(",")] if include else []),
        device=on,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(str(folder))


@app.command()
def trace(
    run: Annotated[Path, typer.Argument(help="A run's output folder, or a trace that lowmem.Monitor saved.")],
    png: Annotated[Path | None, typer.Option(help="Draw a step's timeline into this file.")] = None,
    step: Annotated[int | None, typer.Option(help="Which step to draw, by its number; one of median length.")] = None,
) -> None:
    """Say where each second of a run went, what it waited for, and how time and memory compare with the plan.

    The trace file itself opens in Perfetto (https://ui.perfetto.dev).
    """
    from lowmem.monitoring.account import RunFacts, account_text
    from lowmem.monitoring.timeline import draw_timeline, read_trace, steps_of

    file = run / "trace.json" if run.is_dir() else run
    spans, notes = read_trace(file)
    facts = RunFacts.from_dict(notes)
    steps = steps_of(spans, () if facts is None else facts.starts_ns)
    drawn = {timeline.step: timeline for timeline in steps}
    if step is not None and step not in drawn:
        raise ValueError(f"--step {step}: the trace has steps {min(drawn)} to {max(drawn)}")
    typer.echo(account_text(steps, facts))
    if png is not None:
        by_length = sorted(steps, key=lambda timeline: timeline.duration_s)
        chosen = by_length[len(by_length) // 2] if step is None else drawn[step]
        draw_timeline(chosen, png)
        typer.echo(f"step {chosen.step} drawn: {png}")


def main() -> None:
    """Run the command line. What was refused or went wrong is told in one line, with exit status 2."""
    try:
        app()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        _fail(error)
    except RuntimeError as error:
        # Imported only now: `--help` does not wait for torch.
        from offload import OffloadError

        if not isinstance(error, OffloadError):
            raise
        _fail(error)


_OPTIONS = {
    **{f"Budget.{name}": f"--{name}" for name in ("device", "host", "disk")},
    **{
        f"Machine.{name}": f"--{name.replace('_', '-')}"
        for name in ("gpu", "ram", "disk_gbps", "vram", "tflops", "pcie_gbps", "memory_gbps", "gpus", "nodes")
    },
    **{
        name: f"--{name.replace('_', '-')}"
        for name in (
            *("task", "batch_size", "seq_len", "gradient_accumulation_steps", "completion_tokens", "num_steps"),
            *("use_reference", "micro_batch", "chunk_tokens", "quantization", "tuning", "optimizer", "masters"),
            *("state_dtype", "target_modules", "gpu", "vram", "tflops", "pcie_gbps", "memory_gbps", "dtype"),
            *("revision", "trust_remote_code", "autocast", "output", "include"),
        )
    },
    "num_examples": "--examples",
    "num_epochs": "--epochs",
    "device": "--on",
}
"""What is called otherwise in Python, by its name there."""


_QUOTES = "'\""


_NAMED = re.compile(
    r"\bBudget\((?P<size>device|host|disk)=[^()]*\)"
    r"|(?<![-\w./])(?P<name>(?:Machine\.|Budget\.)?[a-z_]+)"
    r"(?P<given>=(?P<value>'[^']*'|\"[^\"]*\"|[^\s,;:()'\"]*[^\s,;:()'\".])?)?"
)


def _as_typed(message: str) -> str:
    """What Python's functions say, with the options of the command line by their names there."""

    def option(found: re.Match[str]) -> str:
        if found["size"]:
            return f"--{found['size']}"
        name, value = found["name"], found["value"]
        # Without a value, what is no word of English: "device" alone is a device.
        if name not in _OPTIONS or (found["given"] is None and "_" not in name and "." not in name):
            return found[0]
        if value in (None, "", "True", "False"):
            return _OPTIONS[name] if value != "False" else f"--no-{_OPTIONS[name][2:]}"
        return f"{_OPTIONS[name]} {value.removeprefix('torch.').strip(_QUOTES) or value}"

    return _NAMED.sub(option, message).replace(", or None to let", "; leave it out to let").replace(", or None", "")


def _fail(error: Exception) -> NoReturn:
    message = _as_typed(" ".join(str(error).split())) or type(error).__name__
    sys.stderr.write(f"lowmem: {message}\n")
    sys.exit(_FAILED)
