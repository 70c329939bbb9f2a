"""What a run will keep where, and what that costs: frozen, pure data, made before anything is loaded.

As JSON, checked field by field when it is read back; as an aligned table for terminals, and as HTML for notebooks.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lowmem.planning.advice import NOTHING_FITS, Change
from lowmem.planning.job import Job, Task
from lowmem.planning.shapes import OptimizerShape
from lowmem.planning.step_memory import (
    ALWAYS,
    KEPT_PRODUCTS,
    Choice,
    RoleBytes,
    Tier,
    counted_host_bytes,
    peak_bytes,
    peak_phase,
)
from lowmem.planning.step_time import Lane, Rates, StepTime
from offload import BudgetError, Placement, PlacementPlan, format_bytes, format_number, format_seconds

_VERSION = 5


THIS_MACHINE = "this machine"


BEYOND = f"{THIS_MACHINE}, which has only "
"""How `Plan.machine` begins where budgets are more than this machine has: the plan is for another."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan for one model, one job and one budget. It can be printed, compared, hashed and stored as JSON."""

    model: str
    """The model's name."""
    adapter: str
    """What trains, in words."""
    num_trainable: int
    """Parameters that train."""
    compute_dtype: str
    """Dtype the model computes in, by torch's name; where every weight is trained, that of the masters."""
    moved_dtype: str | None
    """Dtype in which blocks' matrices go to a GPU for forwards under autocast; None where they go as they are."""
    stored_dtypes: tuple[str, ...]
    """Dtypes the blocks are stored in."""
    job: Job
    """What one step is to do."""
    choice: Choice
    """Micro-batch, tier of the boundary activations, place of the embedding table."""
    placement: PlacementPlan
    """Where each block is, and the buffers that the others move through."""
    roles: tuple[RoleBytes, ...]
    """Bytes by tensor role and tier."""
    time: StepTime
    """The predicted step."""
    rates: Rates
    """What the prediction rests on, and which of it was measured."""
    device_budget_bytes: int
    """What the device may hold."""
    host_budget_bytes: int
    """What host RAM may hold; 0 for nothing but the buffers that transfers pass through."""
    smallest_device_bytes: int
    """Smallest device budget with which this job fits, the host budget being what it is."""
    disk_folder: str | None
    """Where what must be written goes; None if there is no such folder."""
    unchunkable: str
    """Why the model's blocks cannot be walked along the sequence in chunks; empty if they can."""
    is_supposed: bool
    """Whether nobody has described the job, so that the first batch that trains is planned for whatever it is."""
    framework_bytes: int
    """RAM that Python, torch, transformers, PEFT and TRL take besides: in no budget, but in the process."""
    machine: str
    """What budget and rates are those of, in words."""
    hiding_batch: int | None
    """Batch from which on transfers hide behind computation; None where none that fits does."""
    advice: tuple[str, ...] = ()
    """Sentences on what to change: to make it fit, or to make it faster."""
    optimizer: OptimizerShape | None = None
    """What it was told of the optimizer; None for AdamW."""
    changes: tuple[Change, ...] = ()
    """Where it does not fit: changes that each make it fit, those first that change least of what is trained."""

    @property
    def fits(self) -> bool:
        """Whether device and host stay within their budgets."""
        return self.device_bytes <= self.device_budget_bytes and self.kept_host_bytes <= self.host_budget_bytes

    @property
    def device_bytes(self) -> int:
        """Largest bytes that the device holds at any moment of a step."""
        return peak_bytes(self.roles, "device")

    @property
    def host_bytes(self) -> int:
        """Largest bytes that host RAM holds, staging buffers included, the framework not."""
        return peak_bytes(self.roles, "host")

    @property
    def kept_host_bytes(self) -> int:
        """What counts against the host budget: everything, or where it is 0, all but what transfers pass through."""
        return counted_host_bytes(self.roles, budget_bytes=self.host_budget_bytes)

    @property
    def disk_bytes(self) -> int:
        """Bytes that are on disk only: weights, read in place, and what is written to `disk_folder`."""
        return peak_bytes(self.roles, "disk")

    @property
    def written_bytes(self) -> int:
        """Bytes written to disk in one optimizer step."""
        return self.time.written_bytes

    @property
    def step_s(self) -> float:
        """Predicted seconds of one optimizer step, or of one generation."""
        return self.time.step_s

    @property
    def token_s(self) -> float:
        """Predicted seconds for each token that a step trains on, or that is generated."""
        job = self.job
        return self.time.step_s / (job.step_tokens if job.trains else job.num_generated * job.num_decodes)

    @property
    def bottleneck(self) -> Lane:
        """What a step waits for longest."""
        return self.time.bottleneck

    @property
    def passes(self) -> int:
        """Passes over all weights in one optimizer step."""
        return self.job.num_passes

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Where each block is, in visiting order."""
        return self.placement.placements

    @property
    def task(self) -> Task:
        """The task's short name."""
        return self.job.task

    @property
    def batch_size(self) -> int:
        """Examples of one forward."""
        return self.job.batch_size

    @property
    def seq_len(self) -> int:
        """Tokens of one sequence."""
        return self.job.seq_len

    @property
    def micro_batch(self) -> int:
        """Sequences that go through a block at a time."""
        return self.choice.micro_batch

    @property
    def chunk_tokens(self) -> int | None:
        """Tokens of a sequence that go through a block at a time; None for all of them."""
        return self.choice.chunk_tokens

    @property
    def boundary_tier(self) -> Tier:
        """Where block inputs wait for the backward."""
        return self.choice.boundary_tier

    @property
    def embedding_on_disk(self) -> bool:
        """Whether only the rows that a batch needs are read of the embedding table."""
        return self.choice.embedding_on_disk

    def bytes_of(self, role: str, *, tier: Tier | None = None) -> int:
        """Bytes of a role in one tier, or in all of them.

        Args:
            role: As in `roles`, "adapters" for instance.
            tier: None for all.
        """
        return sum(entry.nbytes for entry in self.roles if entry.role == role and tier in (None, entry.tier))

    def require_fit(self) -> None:
        """Do nothing if the plan fits.

        Raises:
            BudgetError: It does not; states and carries the smallest device budget that works.
        """
        if not self.fits:
            raise BudgetError(self._misfit(), needed_bytes=self.smallest_device_bytes)

    def _misfit(self) -> str:
        parts, advice = [], self.advice[:2]
        if self.device_bytes > self.device_budget_bytes:
            # The first sentence says again what is missing.
            advice = self.advice[1:3]
            parts.append(
                f"the device budget of {format_bytes(self.device_budget_bytes)} is too small for {self.model}: "
                f"a {self.task} step of {self.job.num_sequences} x {self.seq_len} tokens needs at least "
                f"{format_bytes(self.smallest_device_bytes)} ({self.smallest_device_bytes} bytes)"
            )
        else:
            parts.append(
                f"the host budget of {format_bytes(self.host_budget_bytes)} is too small: "
                f"it has to hold at least {format_bytes(self.kept_host_bytes)} ({self.kept_host_bytes} bytes)"
                + (', or "0" for the buffers of transfers alone' if self.placement.staging_bytes else "")
            )
        return ". ".join((*parts, *(sentence.rstrip(".") for sentence in advice)))

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON: every field, and the numbers that follow from them under `summary`."""
        summary = {name: getattr(self, name) for name in _SUMMARY}
        plain = dataclasses.asdict(self, dict_factory=_with_lists)
        return {"version": _VERSION, **plain, "placement": self.placement.to_dict(), "summary": summary}

    @staticmethod
    def from_dict(data: Mapping[str, object]) -> Plan:
        """Make the plan that `to_dict` wrote.

        Raises:
            ValueError: Another version wrote it, or a field is missing or unknown.
        """
        if data.get("version") != _VERSION:
            raise ValueError(
                f"plan: expected version {_VERSION}, got {data.get('version')!r}; plan again with lowmem.plan"
            )
        fields = {key: value for key, value in data.items() if key not in ("version", "summary")}
        if isinstance(placement := fields.get("placement"), Mapping):
            # The bytes by tier that it also writes follow from these.
            known = {entry.name for entry in dataclasses.fields(PlacementPlan)}
            fields["placement"] = {key: value for key, value in placement.items() if key in known}
        plan: Plan = _read_fields(Plan, fields, "plan")
        return plan

    def __str__(self) -> str:
        """Fewer than 50 lines: the verdict in three, what it is a verdict on, bytes, facts, advice."""
        lines = [*_verdict(self), "", plan_title(self), "", *_table(self), "", *_facts(self)]
        return "\n".join([*lines, *(f"-> {sentence}" for sentence in self.advice)])

    def _repr_html_(self) -> str:
        return _html(self)


_SUMMARY = ("fits", "device_bytes", "host_bytes", "disk_bytes", "step_s", "bottleneck", "passes")


_ADDED: dict[str, object] = {"caveat": "", "chunk_attention_flops_per_s": ()}
"""Fields of rates that plans of earlier versions do not have, and what they meant by that."""


def _with_lists(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    """A dataclass's fields as JSON has them; those that older plans lack only where they say something."""
    kept = (pair for pair in pairs if pair not in _ADDED.items())
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept}


def _read_fields(kind: type[Any], data: object, field: str) -> Any:
    """Make a dataclass of what `Plan.to_dict` made of one.

    Raises:
        ValueError: A field is missing, unknown or of the wrong type; names it.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{field}: expected an object, got {data!r}")
    types, prefix = get_type_hints(kind), "" if kind is Plan else f"{field}."
    data = {**{name: none for name, none in _ADDED.items() if name in types}, **data}
    values = {name: _read(types[name], value, prefix + name) for name, value in data.items() if name in types}
    if set(data) != set(types):
        missing, unknown = sorted(set(types) - set(data)), sorted(set(data) - set(types))
        raise ValueError(f"{field}: missing fields {missing}, unknown fields {unknown}; plan again with lowmem.plan")
    return kind(**values)


def _read(kind: Any, value: object, field: str) -> Any:
    """A value of an annotated type: a dataclass, a tuple, an enumeration, a literal or a plain value, or None."""
    arguments = get_args(kind)
    if NoneType in arguments:
        return None if value is None else _read(arguments[0], value, field)
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, field)  # type: ignore[arg-type]
    if get_origin(kind) is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise ValueError(f"{field}: expected a list, got {value!r}")
        return tuple(_read(arguments[0], entry, field) for entry in value)
    if get_origin(kind) is Literal:
        if value not in arguments:
            raise ValueError(f"{field}: expected one of {', '.join(arguments)}, got {value!r}")
        return value
    if issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from error
    if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{field}: expected {kind.__name__}, got {value!r}")
    return value


_TIERS = get_args(Tier)


_PHASES = {
    "embedding": "looking up embeddings",
    "forward": "forward through the blocks",
    "generation": "generating",
    "head": "head and loss",
    "block": "recomputing a block",
    "update": "updating",
}


_MARKS = {Placement.RESIDENT: "#", Placement.HOST: "o", Placement.STREAMED: "."}


_MAX_STRIP = 96


_USUAL_STEPS = 100
"""Whose duration is told where nobody said how many there will be."""


_RATED_WRITES = 600
"""How often over makers warrant that a consumer drive may be written: 600 TB for 1 TB."""


_DAY_S = 86_400


def _html(plan: Plan) -> str:
    """Write a plan as HTML: a table and a list."""
    rows = "".join(
        "<tr>"
        + "".join(f'<td style="text-align:{align}">{html.escape(cell)}</td>' for cell, align in _aligned(row))
        + "</tr>"
        for row in _rows(plan)
    )
    header = "".join(f"<th>{cell}</th>" for cell in ("role", *_TIERS, "held while"))
    strip = {line: f"<code>{html.escape(line.strip())}</code>" for line in _strip(plan)}
    lines = (strip.get(line, html.escape(line)) for line in (*_facts(plan), *plan.advice))
    facts = "".join(f"<li>{line}</li>" for line in lines)
    return (
        f"<div><b>{html.escape(plan_title(plan))}</b><br>{'<br>'.join(map(html.escape, _verdict(plan)))}"
        f"{tier_bars(plan)}<table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table><ul>{facts}</ul></div>"
    )


_BAR_COLOURS = (
    *("#4f7cac", "#e39b3a", "#4f9d69", "#9a7bb0", "#d1495b", "#6fa8a0", "#b08968", "#8a8f98"),
    *("#a3bfdb", "#f1cc94", "#a6cfb3", "#cdbcd8", "#e8a0a8", "#5b4b8a", "#c2b280", "#3f5f5f"),
)
_LEAST_PERCENT = 2
"""Of a tier's bar: what is narrower has no name below it."""


def tier_bars(plan: Plan) -> str:
    """Draw device and host as HTML: what is held in the fullest moment, role by role, against the budget."""
    tiers: tuple[tuple[Tier, int], ...] = (("device", plan.device_budget_bytes), ("host", plan.host_budget_bytes))
    bars = []
    for tier, budget_bytes in tiers:
        moment = peak_phase(plan.roles, tier)
        held = [role for role in plan.roles if role.tier == tier and role.phase in (ALWAYS, moment) and role.nbytes]
        if not held and not budget_bytes:
            bars.append(f"<div>{tier}: nothing</div>")
            continue
        scale = 100 / max(sum(role.nbytes for role in held), budget_bytes, 1)
        # Those that are named first, so that no two of them have one colour.
        named = [role for role in held if scale * role.nbytes >= _LEAST_PERCENT]
        held = named + [role for role in held if scale * role.nbytes < _LEAST_PERCENT]
        parts = "".join(
            f'<div title="{html.escape(role.role)}: {format_bytes(role.nbytes)}" style="float:left;height:1.2em;'
            f'width:{scale * role.nbytes:.2f}%;background:{_BAR_COLOURS[number % len(_BAR_COLOURS)]}"></div>'
            for number, role in enumerate(held)
        )
        legend = ", ".join(
            f'<span style="white-space:nowrap"><span style="color:{_BAR_COLOURS[number % len(_BAR_COLOURS)]}">'
            f"&#9632;</span> {html.escape(role.role)}</span>"
            for number, role in enumerate(named)
        )
        # The frame ends where the budget does, unless more is held.
        frame = f"width:{scale * budget_bytes:.2f}%;border:1px solid #888;height:1.2em"
        bars.append(
            f"<div>{tier}: {format_bytes(sum(role.nbytes for role in held))} of {format_bytes(budget_bytes)}</div>"
            f'<div style="{frame}"><div style="width:{1e4 / max(scale * budget_bytes, 1):.2f}%">{parts}</div></div>'
            f"<small>{legend}</small>"
        )
    return f'<div style="max-width:60em">{"".join(bars)}</div>'


def plan_title(plan: Plan) -> str:
    """Model and job in a line."""
    job = plan.job
    words = [plan.model, f"{job.task}", f"batch {job.batch_size} x {job.seq_len} tokens"]
    if job.gradient_accumulation_steps > 1:
        words[-1] += f" x {job.gradient_accumulation_steps}"
    if job.generates:
        words[-1] += f" ({job.num_decodes} generated)"
    moved = "" if plan.moved_dtype is None else f", matrices as {plan.moved_dtype},"
    alone = "" if job.autocast or plan.compute_dtype == "float32" else " without autocast"
    words.append(f"{plan.compute_dtype}{alone}{moved} on {job.device} from {', '.join(plan.stored_dtypes)}")
    return " | ".join([*words, plan.adapter] if plan.adapter != "none" else words)


def _verdict(plan: Plan) -> list[str]:
    """Whether it fits and what makes it fit; how fast it is and what it waits for; how long it takes."""
    sizes = ", ".join(
        f"{tier} {format_bytes(used)} of {format_bytes(given)}"
        for tier, used, given in (
            ("device", plan.device_bytes, plan.device_budget_bytes),
            ("host", plan.kept_host_bytes, plan.host_budget_bytes),
        )
    )
    instead = f"; would fit: {plan.changes[0].text}" if plan.changes else ""
    if any(sentence.startswith(NOTHING_FITS) for sentence in plan.advice):
        instead = f"; {NOTHING_FITS[0].lower()}{NOTHING_FITS[1:]}"
    lines = [f"FITS: {sizes}" if plan.fits else f"DOES NOT FIT: {sizes}{instead}"]
    job, time = plan.job, plan.time
    lanes = f"compute {format_seconds(time.compute_s)}, disk {format_seconds(time.disk_s)}"
    lanes += f", copy {format_seconds(time.copy_s)}" if time.copy_s else ""
    what = "step" if job.trains else "generation"
    would = "" if plan.fits else "would take "
    lines.append(
        f"{would}{format_seconds(time.step_s)} per {what} of {_batch_words(plan)}, "
        f"{format_number(1 / plan.token_s)} tokens/s, limited by {plan.bottleneck} ({lanes})"
    )
    lines.append(f"{_run_words(plan)}; {_hiding_words(plan)}" if plan.fits else _run_words(plan))
    if plan.machine.startswith(BEYOND):
        lines.append(
            f"these are another machine's budgets: {THIS_MACHINE} has only {plan.machine.removeprefix(BEYOND)}, and "
            "from_pretrained refuses to take more than there is"
        )
    return lines


def _batch_words(plan: Plan) -> str:
    """What goes through in a step: what a search found stands here."""
    along = f" in chunks of {plan.chunk_tokens}" if plan.chunk_tokens else ""
    accumulated = plan.job.gradient_accumulation_steps
    times = f" x {accumulated}" if accumulated > 1 else ""
    return f"batch {plan.batch_size} x {plan.seq_len} tokens{times}{along}, weights in {', '.join(plan.stored_dtypes)}"


def _run_words(plan: Plan) -> str:
    job = plan.job
    if not job.trains:
        return "nothing is trained"
    steps = job.run_steps or _USUAL_STEPS
    examples = "" if job.num_examples is None else f"{job.num_epochs:g} x {job.num_examples:,} examples: "
    return f"{examples}{steps:,} steps take {format_seconds(steps * plan.time.step_s)}"


def _hiding_words(plan: Plan) -> str:
    if plan.hiding_batch is None:
        return "no batch that fits hides the transfers"
    if plan.hiding_batch <= 1:
        return "transfers hide behind computation with any batch"
    return f"transfers hide behind computation from a batch of {plan.hiding_batch} on"


def _rows(plan: Plan) -> list[tuple[str, ...]]:
    """Role, bytes by tier and phase; then the peaks."""
    rows: dict[tuple[str, str], dict[str, int]] = {}
    for role in plan.roles:
        cells = rows.setdefault((role.role, role.phase), dict.fromkeys(_TIERS, 0))
        cells[role.tier] += role.nbytes
    table = [
        (role, *(_cell(cells[tier]) for tier in _TIERS), _PHASES.get(phase, "" if phase == ALWAYS else phase))
        for (role, phase), cells in rows.items()
    ]
    peaks = (plan.device_bytes, plan.host_bytes, plan.disk_bytes)
    # Which of the rows add up to the peak: moments exclude each other.
    when = f"always, and {_PHASES[peak_phase(plan.roles, 'device')]}"
    return [*table, ("peak", *map(_cell, peaks), when)]


def _cell(nbytes: int) -> str:
    return format_bytes(nbytes) if nbytes else "-"


def _aligned(row: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(cell, "left" if column in (0, len(row) - 1) else "right") for column, cell in enumerate(row)]


def _table(plan: Plan) -> list[str]:
    rows = [("role", *_TIERS, "held while"), *_rows(plan)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if align == "left" else cell.rjust(width)
            for (cell, align), width in zip(_aligned(row), widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    rule = "-" * max(len(line) for line in lines)
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]


def _facts(plan: Plan) -> list[str]:
    rates, job = plan.rates, plan.job
    counts = {place: plan.placements.count(place) for place in Placement}
    blocks = ", ".join(f"{count} {place.value}" for place, count in counts.items() if count)
    lines = [f"blocks     {len(plan.placements)}: {blocks}", *_strip(plan)]
    lines.append(
        f"passes     {plan.passes} over the weights per step, {format_bytes(plan.time.read_bytes)} read from disk"
    )
    along = f", chunks of {plan.chunk_tokens} tokens" if plan.chunk_tokens else ""
    lines.append(
        f"split      {job.num_sequences} sequences in micro-batches of {plan.micro_batch}{along}, boundary activations "
        f"on {plan.boundary_tier}, embedding {'rows from disk' if plan.embedding_on_disk else 'on device'}"
    )
    if plan.choice.keeps_keys_values:
        lines.append(f"           keys and values kept on {plan.boundary_tier}: computing them again takes longer")
    if plan.choice.keeps_products:
        kept = format_bytes(plan.bytes_of(KEPT_PRODUCTS, tier=plan.boundary_tier))
        lines.append(f"           {kept} of large products kept on {plan.boundary_tier}, not computed again")
    if plan.unchunkable and (job.chunk_tokens or not plan.fits):
        lines.append(f"           whole sequences: {plan.unchunkable}")
    if plan.written_bytes:
        lines.append(f"writes     {_written_words(plan)}")
    if job.device != "cpu" and job.tuning == "full":
        lines.append(f"bus        {_bus_words(plan)}")
    gflops = rates.compute_flops_per_s / 1e9
    numbers = {
        "disk": f"{format_number(rates.disk_bytes_per_s / 1e9)} GB/s",
        "copy": f"{format_number(rates.copy_bytes_per_s / 1e9)} GB/s",
        "compute": f"{format_number(gflops / 1e3)} TFLOP/s" if gflops >= 1e3 else f"{gflops:.4g} GFLOP/s",
    }
    words = (
        f"{name} {number} {'measured' if name in rates.measured else 'assumed'}" for name, number in numbers.items()
    )
    moved = rates.scratch_bytes_per_s
    again = "" if moved is None else f", written and read back {format_number(moved / 1e9)} GB/s measured"
    lines.append(f"rates      {', '.join(words)}{again}")
    if rates.shape is not None:
        how = "measured" if "compute" in rates.measured else "by operations and bytes, of which the card does so many"
        lines.append(f"           blocks, attention, head and unpacking of these shapes {how}")
    if rates.caveat:
        lines.append(f"           {rates.caveat}")
    if not plan.machine.startswith(THIS_MACHINE):
        lines.append(f"machine    {plan.machine}")
    if job.num_sharing > 1:
        is_full = job.tuning == "full"
        what = "train one copy of the state, a part each," if is_full else "read blocks once, and keep one copy"
        lines.append(f"shares     {job.num_sharing} ranks of the machine {what} in RAM")
    by = "" if plan.optimizer is None else f", by {plan.optimizer.name}"
    lines.append(f"trains     {plan.num_trainable:,} parameters: {plan.adapter}{by}")
    lines.append(f"besides    about {format_bytes(plan.framework_bytes)} of RAM for Python and its libraries")
    return lines


def _bus_words(plan: Plan) -> str:
    share, time = plan.choice.update_share, plan.time
    words = [f"{format_bytes(time.up_bytes)} to the GPU and {format_bytes(time.down_bytes)} from it per step"]
    if share:
        words.append(f"it updates {share:.0%} of the blocks")
    if plan.choice.reduces_gradients:
        words.append("of matrices' gradients only projections leave it")
    return "; ".join(words)


def _written_words(plan: Plan) -> str:
    per_day_bytes = plan.written_bytes * _DAY_S / plan.time.step_s
    per_day = f"{format_number(per_day_bytes / 1e12)} TB a day"
    num_days = _RATED_WRITES * 1e12 / per_day_bytes
    lasts = f"{num_days:.0f} days" if num_days < 1000 else f"{num_days / 365:.0f} years"
    return (
        f"{format_bytes(plan.written_bytes)} per step to {plan.disk_folder}, {per_day}; a "
        f"drive of 1 TB rated for {_RATED_WRITES} TB lasts {lasts} of training"
    )


def _strip(plan: Plan) -> list[str]:
    """One character for each block, where that says more than the counts."""
    if len(set(plan.placements)) == 1 or len(plan.placements) > _MAX_STRIP:
        return []
    return [f"           {''.join(_MARKS[place] for place in plan.placements)}  (# device, o host, . disk)"]
