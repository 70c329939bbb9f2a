"""How many bytes keys and values may take, on the device and beyond it on the host. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem.costs import ALWAYS
from offload import BudgetError
from offload.units import format_bytes

if TYPE_CHECKING:
    from lowmem.step_plan import Plan


@dataclass(frozen=True, kw_only=True)
class KvRoom:
    """What a plan leaves for keys and values while tokens are generated."""

    device_bytes: int
    """On the device, next to the weights and what a block's forward holds."""
    host_bytes: int
    """In host RAM, next to the blocks that are cached there. On a CPU both are RAM."""
    prefill_tokens: int
    """Tokens that may go through a block at a time."""

    @classmethod
    def of(cls, plan: Plan) -> KvRoom:
        """Read a plan: made for generating, or for training, when nothing is recomputed."""
        always = sum(role.nbytes for role in plan.roles if role.tier == "device" and role.phase == ALWAYS)
        if plan.job.generates:
            transient = plan.bytes_of("block forward", tier="device") + plan.bytes_of("logits", tier="device")
        else:
            # A forward holds less than half of what recomputing and differentiating the same tokens does.
            transient = plan.bytes_of("block recomputation", tier="device") // 2
        whole = plan.job.num_generated * plan.seq_len
        kept_host_bytes = plan.host_bytes - plan.placement.staging_bytes
        return cls(
            device_bytes=max(0, plan.device_budget_bytes - always - transient),
            host_bytes=max(0, plan.host_budget_bytes - kept_host_bytes),
            prefill_tokens=max(whole, plan.micro_batch * plan.seq_len),
        )

    def num_on_device(self, layer_bytes: int, *, num_layers: int, what: str) -> int:
        """How many layers keep their keys and values on the device; those that follow keep them on the host.

        Args:
            layer_bytes: Bytes of one layer at its longest.
            num_layers: Number of layers.
            what: The batch, for the error.

        Raises:
            BudgetError: They do not fit on both together.
        """
        num_device = min(num_layers, self.device_bytes // max(1, layer_bytes))
        left_bytes = (num_layers - num_device) * layer_bytes
        if left_bytes > self.host_bytes:
            total = num_layers * layer_bytes
            raise BudgetError(
                f"keys and values of {what} take {format_bytes(total)}; the budget leaves "
                f"{format_bytes(self.device_bytes)} on the device and {format_bytes(self.host_bytes)} on the host; "
                "generate fewer sequences or fewer tokens at a time, or raise Budget.device or Budget.host",
                needed_bytes=total,
            )
        return num_device


__all__ = ["KvRoom"]
