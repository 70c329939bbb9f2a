"""A plan for people: an aligned table for terminals, the same as HTML for notebooks."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from lowmem.costs import ALWAYS
from lowmem.durations import format_seconds
from offload import Placement, format_bytes

if TYPE_CHECKING:
    from lowmem.step_plan import Plan

_TIERS = ("device", "host", "disk")
_PHASES = {
    "embedding": "looking up embeddings",
    "forward": "forward through the blocks",
    "generation": "generating",
    "head": "head and loss",
    "block": "recomputing a block",
}
_MARKS = {Placement.RESIDENT: "#", Placement.HOST: "o", Placement.STREAMED: "."}
_MAX_STRIP = 96
_USUAL_STEPS = 100
"""Whose duration is told where nobody said how many there will be."""
# What makers warrant for a consumer drive of 1 TB.
_RATED_BYTES = 600e12


def plan_text(plan: Plan) -> str:
    """Write a plan in fewer than 45 lines."""
    lines = [_title(plan), _verdict(plan), "", *_table(plan), "", *_facts(plan)]
    return "\n".join([*lines, *(f"-> {sentence}" for sentence in plan.advice)])


def plan_html(plan: Plan) -> str:
    """Write a plan as HTML: a table and a list."""
    rows = "".join(
        "<tr>"
        + "".join(f'<td style="text-align:{align}">{html.escape(cell)}</td>' for cell, align in _aligned(row))
        + "</tr>"
        for row in _rows(plan)
    )
    header = "".join(f"<th>{cell}</th>" for cell in ("role", *_TIERS, "when"))
    facts = "".join(f"<li>{html.escape(line)}</li>" for line in (*_facts(plan), *plan.advice))
    return (
        f"<div><b>{html.escape(_title(plan))}</b><br>{html.escape(_verdict(plan))}"
        f"<table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table><ul>{facts}</ul></div>"
    )


def _title(plan: Plan) -> str:
    job = plan.job
    words = [plan.model, f"{job.task}", f"batch {job.batch_size} x {job.seq_len} tokens"]
    if job.gradient_accumulation_steps > 1:
        words[-1] += f" x {job.gradient_accumulation_steps}"
    if job.generates:
        words[-1] += f" ({job.completion_tokens} generated)"
    words.append(f"{plan.compute_dtype} on {job.device} from {', '.join(plan.stored_dtypes)}")
    return " | ".join([*words, plan.adapter] if plan.adapter != "none" else words)


def _verdict(plan: Plan) -> str:
    sizes = [
        f"{tier} {format_bytes(used)} of {format_bytes(given)}"
        for tier, used, given in (
            ("device", plan.device_bytes, plan.device_budget_bytes),
            ("host", plan.kept_host_bytes, plan.host_budget_bytes),
        )
    ]
    return f"{'FITS' if plan.fits else 'DOES NOT FIT'}: {', '.join(sizes)}"


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
    return [*table, ("peak", *(_cell(nbytes) for nbytes in peaks), "")]


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
    time, rates, job = plan.time, plan.rates, plan.job
    counts = {place: plan.placements.count(place) for place in Placement}
    blocks = ", ".join(f"{count} {place.value}" for place, count in counts.items() if count)
    lines = [f"blocks     {len(plan.placements)}: {blocks}", *_strip(plan)]
    lines.append(f"passes     {plan.passes} over the weights per step, {format_bytes(time.read_bytes)} read from disk")
    along = f", chunks of {plan.chunk_tokens} tokens" if plan.chunk_tokens else ""
    lines.append(
        f"split      {job.num_sequences} sequences in micro-batches of {plan.micro_batch}{along}, boundary activations "
        f"on {plan.boundary_tier}, embedding {'rows from disk' if plan.embedding_on_disk else 'on device'}"
    )
    if plan.choice.keeps_keys_values:
        lines.append(f"           keys and values kept on {plan.boundary_tier}: computing them again takes longer")
    if plan.unchunkable and (job.chunk_tokens or not plan.fits):
        lines.append(f"           whole sequences: {plan.unchunkable}")
    if plan.written_bytes:
        num_steps = _RATED_BYTES / plan.written_bytes
        lines.append(
            f"writes     {format_bytes(plan.written_bytes)} per step to {plan.disk_folder}; a drive rated for "
            f"{_RATED_BYTES / 1e12:.0f} TB of writes takes {num_steps:.2g} steps"
        )
    lanes = f"compute {format_seconds(time.compute_s)}, disk {format_seconds(time.disk_s)}"
    lanes += f", copy {format_seconds(time.copy_s)}" if time.copy_s else ""
    tokens_per_s = (job.step_tokens if job.trains else job.num_generated * job.completion_tokens) / time.step_s
    lines.append(
        f"step       {format_seconds(time.step_s)}, limited by {plan.bottleneck} ({lanes}); {tokens_per_s:.3g} tokens/s"
    )
    run_steps = job.num_steps or (_USUAL_STEPS if job.trains and job.task != "sft" else None)
    if run_steps is not None:
        lines.append(f"run        {run_steps} steps take {format_seconds(run_steps * time.step_s)}")
    numbers = {
        "disk": f"{rates.disk_bytes_per_s / 1e9:.3g} GB/s",
        "copy": f"{rates.copy_bytes_per_s / 1e9:.3g} GB/s",
        "compute": f"{rates.compute_flops_per_s / 1e9:.4g} GFLOP/s",
    }
    words = (
        f"{name} {number} {'measured' if name in rates.measured else 'assumed'}" for name, number in numbers.items()
    )
    lines.append(f"rates      {', '.join(words)}")
    lines.append(f"besides    about {format_bytes(plan.framework_bytes)} of RAM for Python and its libraries")
    return lines


def _strip(plan: Plan) -> list[str]:
    """One character for each block, where that says more than the counts."""
    if len(set(plan.placements)) == 1 or len(plan.placements) > _MAX_STRIP:
        return []
    return [f"           {''.join(_MARKS[place] for place in plan.placements)}  (# device, o host, . disk)"]
