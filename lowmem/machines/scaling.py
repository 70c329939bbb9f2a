"""What several cards and several machines make of a plan: tokens in all, bytes over each link, and what limits them.

Arithmetic only. Each card has a rank of its own and its own copies; a machine's ranks read the base once and have its
RAM together, the state of full tuning too; gradients go around all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lowmem.planning.planner import plan_step
from offload import Budget, format_bytes, format_number, format_seconds

if TYPE_CHECKING:
    from lowmem.machines.cards import Machine
    from lowmem.planning.plan import Plan
    from lowmem.planning.shapes import ModelShapes

GRADIENT_BYTES = 4
"""Of an adapter's gradient: PEFT keeps adapters in fp32."""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """A step of all ranks, and what one card alone would do on the same machine."""

    gpus: int
    """Ranks of a machine."""
    nodes: int
    """Machines."""
    tokens_per_s: float
    """Of all ranks."""
    times_one: float
    """How many times as fast as one card is with its own batch."""
    read_bytes: int
    """From each machine's disk per step, for all of its ranks together."""
    link_bytes: int
    """Over the slowest link between two ranks, per step and direction."""
    link_s: float
    """What that takes, if none of it hides behind the backward."""

    @property
    def words(self) -> str:
        """A sentence for the plan."""
        num = self.gpus * self.nodes
        link = "the network" if self.nodes > 1 else "the cards' links"
        machines = (
            f"{self.nodes} machines of {self.gpus}, each reading" if self.nodes > 1 else "one machine, which reads"
        )
        return (
            f"{num} ranks on {machines} {format_bytes(self.read_bytes)} per step for all of its ranks: "
            f"{format_number(self.tokens_per_s)} tokens/s in all, {self.times_one:.2g} times one card's; "
            f"{format_bytes(self.link_bytes)} of gradients over {link} per step, {format_seconds(self.link_s)} at most"
        )


def scaling_of(plan: Plan, alone: Plan, machine: Machine, *, num_in_blocks: int = 0) -> Scaling:
    """Compare a plan of one rank among others with that of one card.

    A ring of n ranks sends 2 (n - 1) / n of the gradients over each of its links (Patarasuk and Yuan, "Bandwidth
    optimal all-reduce algorithms for clusters of workstations", 2009), once per optimizer step whatever its batches.
    Where every weight is trained, blocks' gradients meet in the machine's RAM, and go between machines with each batch.

    Args:
        plan: One rank's, of `machine.gpus * machine.nodes`.
        alone: The same job on one card that has the machine for itself.
        machine: With its number of cards and of machines.
        num_in_blocks: Trained weights whose gradients DDP does not see: those of the blocks, where all are trained.
    """
    num, nodes = machine.gpus * machine.nodes, machine.nodes
    around = (num - 1) / num * (plan.num_trainable - num_in_blocks)
    between = (nodes - 1) / nodes * num_in_blocks * plan.job.num_backwards
    link_bytes = round(2 * (around + between) * GRADIENT_BYTES)
    per_s = machine.network_gbps * 1e9 if machine.nodes > 1 else machine.rates.copy_bytes_per_s
    link_s = link_bytes / per_s
    tokens_per_s = num * _step_tokens(plan) / (plan.step_s + link_s)
    return Scaling(
        gpus=machine.gpus,
        nodes=machine.nodes,
        tokens_per_s=tokens_per_s,
        times_one=tokens_per_s / (_step_tokens(alone) / alone.step_s),
        read_bytes=plan.placement.step_read_bytes,
        link_bytes=link_bytes,
        link_s=link_s,
    )


def _step_tokens(plan: Plan) -> float:
    job = plan.job
    return float(job.step_tokens if job.trains else job.num_generated * job.num_decodes)


def with_scaling(plan: Plan, shapes: ModelShapes, machine: Machine, *, alone: Budget) -> Plan:
    """The plan of one rank, with a sentence of what all of them do.

    Args:
        plan: One rank's.
        shapes: The model with what trains.
        machine: What the plan is for.
        alone: The budget of one card that has such a machine for itself.
    """
    if machine.gpus * machine.nodes == 1 or not plan.fits:
        return plan
    job = replace(plan.job, num_sharing=1)
    one = plan_step(shapes, job, budget=alone, rates=plan.rates, machine=plan.machine)
    num_in_blocks = shapes.num_params if job.tuning == "full" else 0
    found = scaling_of(plan, one, machine, num_in_blocks=num_in_blocks)
    return replace(plan, advice=(found.words, *plan.advice))
