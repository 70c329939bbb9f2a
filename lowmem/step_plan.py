"""What a run will keep where, and what that costs: frozen, pure data, made before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from lowmem.costs import BOUNDARY_BUFFERS, Choice, RoleBytes, peak_bytes
from lowmem.job import Job
from lowmem.rates import Rates
from lowmem.step_time import StepTime
from offload import BudgetError, Placement, PlacementPlan, format_bytes

_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan for one model, one job and one budget. It can be printed, compared, hashed and stored as JSON."""

    model: str
    """The model's name."""
    adapter: str
    """What trains, in words."""
    compute_dtype: str
    """Dtype the model computes in, by torch's name."""
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
    """What may be kept in host RAM besides staging buffers."""
    smallest_device_bytes: int
    """Smallest device budget with which this job fits, the host budget being what it is."""
    disk_folder: str | None
    """Where what must be written goes; None if there is no such folder."""
    unchunkable: str
    """Why the model's blocks cannot be walked along the sequence in chunks; empty if they can."""
    framework_bytes: int
    """RAM that Python, torch, transformers, PEFT and TRL take besides: in no budget, but in the process."""
    advice: tuple[str, ...] = ()
    """Sentences on what to change: to make it fit, or to make it faster."""

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
        """What counts against the host budget: all but the buffers that transfers pass through."""
        return self.host_bytes - self.placement.staging_bytes - self.bytes_of(BOUNDARY_BUFFERS, tier="host")

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
    def bottleneck(self) -> str:
        """What a step waits for longest: "compute", "disk" or "copy"."""
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
    def task(self) -> str:
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
    def boundary_tier(self) -> str:
        """Where block inputs wait for the backward: "device", "host" or "disk"."""
        return self.choice.boundary_tier

    @property
    def embedding_on_disk(self) -> bool:
        """Whether only the rows that a batch needs are read of the embedding table."""
        return self.choice.embedding_on_disk

    def bytes_of(self, role: str, *, tier: str | None = None) -> int:
        """Bytes of a role in one tier, or in all of them.

        Args:
            role: As in `roles`, "adapters" for instance.
            tier: "device", "host" or "disk".
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
                f"{format_bytes(self.kept_host_bytes)} have to be kept there"
            )
        return "; ".join((*parts, *(sentence.rstrip(".") for sentence in advice)))

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON: every field, and the numbers that follow from them under `summary`."""
        return {
            "version": _VERSION,
            "model": self.model,
            "adapter": self.adapter,
            "compute_dtype": self.compute_dtype,
            "stored_dtypes": list(self.stored_dtypes),
            "job": asdict(self.job),
            "choice": asdict(self.choice),
            "placement": self.placement.to_dict(),
            "roles": [asdict(role) for role in self.roles],
            "time": asdict(self.time),
            "rates": asdict(self.rates) | {"measured": list(self.rates.measured)},
            "device_budget_bytes": self.device_budget_bytes,
            "host_budget_bytes": self.host_budget_bytes,
            "smallest_device_bytes": self.smallest_device_bytes,
            "disk_folder": self.disk_folder,
            "unchunkable": self.unchunkable,
            "framework_bytes": self.framework_bytes,
            "advice": list(self.advice),
            "summary": self._summary(),
        }

    def _summary(self) -> dict[str, object]:
        return {
            "fits": self.fits,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "disk_bytes": self.disk_bytes,
            "step_s": self.step_s,
            "bottleneck": self.bottleneck,
            "passes": self.passes,
        }

    @staticmethod
    def from_dict(data: Mapping[str, object]) -> Plan:
        """Make the plan that `to_dict` wrote.

        Raises:
            ValueError: Another version wrote it, or a field is missing or unknown.
        """
        from lowmem.plan_json import plan_from_dict

        if data.get("version") != _VERSION:
            raise ValueError(
                f"plan: expected version {_VERSION}, got {data.get('version')!r}; plan again with lowmem.plan"
            )
        return plan_from_dict(data)

    def __str__(self) -> str:
        from lowmem.plan_text import plan_text

        return plan_text(self)

    def _repr_html_(self) -> str:
        from lowmem.plan_text import plan_html

        return plan_html(self)


__all__ = ["Plan"]
