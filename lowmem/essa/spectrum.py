"""A LoRA adapter as U diag(s) V^T, with singular values s of its own for every row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowmem.errors import UnsupportedError
from lowmem.essa.strategy import check_tensor
from lowmem.streaming.runtime import ActiveRows


@dataclass(frozen=True, kw_only=True)
class _Factor:
    """One adapted layer."""

    down: nn.Linear
    """PEFT's lora_A; holds V^T."""
    up: nn.Linear
    """PEFT's lora_B; holds U over PEFT's scaling."""
    start: int
    """Where its values begin in the vector of all."""
    rank: int


class Spectrum:
    """The singular values of all adapted layers, and nothing else, made variable.

    Each product B A of the adapter is factored once; U and V stay. A layer that adds nothing yet (B = 0) gets U from an
    orthonormal random matrix and singular values of zero. Coordinates are measured in the layer's mean singular value
    (or in 1 over the square root of its rank's width where that is zero), from where it began.

    Args:
        model: A PEFT model whose active adapter is a LoRA on linear layers.
        rows: Which rows of the batch the layers' inputs are.
        seed: Of the random matrices.

    Raises:
        UnsupportedError: The adapter is of another kind.
    """

    def __init__(self, model: nn.Module, *, rows: ActiveRows, seed: int = 0) -> None:
        self._rows = rows
        self._factors: list[_Factor] = []
        self._values: Tensor | None = None
        self._member_of_row: Tensor | None = None
        generator = torch.Generator().manual_seed(seed)
        starts: list[Tensor] = []
        units: list[Tensor] = []
        position = 0
        for name, module in model.named_modules():
            found = _lora_of(name, module)
            if found is None:
                continue
            down, up, scaling = found
            values, unit = _factor(down, up, scaling=scaling, generator=generator)
            factor = _Factor(down=down, up=up, start=position, rank=len(values))
            down.register_forward_hook(self._scale(factor))
            self._factors.append(factor)
            starts.append(values)
            units.append(torch.full_like(values, unit))
            position += len(values)
        if not self._factors:
            raise UnsupportedError(
                "ESSA without a LoRA adapter",
                reason="it evolves an adapter's singular values",
                instead="peft_config=LoraConfig(...), or a model with a LoRA adapter",
            )
        self._start, self._unit = torch.cat(starts), torch.cat(units)

    @property
    def num_values(self) -> int:
        """Singular values of all layers."""
        return self._start.numel()

    def values_at(self, coordinates: Tensor) -> Tensor:
        """Singular values, shape (..., n), at coordinates of that shape; zero is where the adapter began."""
        return (self._start + coordinates.to(self._start) * self._unit).to(torch.float32)

    @contextmanager
    def population(self, coordinates: Tensor, *, member_of_row: Tensor) -> Iterator[None]:
        """Give every row of the batches inside the `with` the singular values of its member.

        Args:
            coordinates: Of the members, shape (members, n).
            member_of_row: Numbers of members, shape (rows,).
        """
        device = self._factors[0].down.weight.device
        self._values = self.values_at(coordinates).to(device)
        self._member_of_row = member_of_row.to(device)
        try:
            yield
        finally:
            self._values = self._member_of_row = None

    @contextmanager
    def written(self, coordinates: Tensor) -> Iterator[None]:
        """Write singular values into the adapter's own weights for the time of a `with`: what PEFT saves and runs."""
        values = self.values_at(coordinates)
        before = [factor.down.weight.detach().clone() for factor in self._factors]
        for factor in self._factors:
            own = values[factor.start : factor.start + factor.rank].to(factor.down.weight)
            factor.down.weight.data.mul_(own[:, None])
        try:
            yield
        finally:
            for factor, weight in zip(self._factors, before, strict=True):
                factor.down.weight.data.copy_(weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The factors and where the values began."""
        state = {"start": self._start, "unit": self._unit}
        for index, factor in enumerate(self._factors):
            state |= {f"down.{index}": factor.down.weight.detach(), f"up.{index}": factor.up.weight.detach()}
        return state

    def check_state_dict(self, state: Mapping[str, object]) -> None:
        """See that `load_state_dict` can go on from it.

        Raises:
            ValueError: It is of another adapter, or holds what `state_dict` does not give; says which field.
        """
        expected = self.state_dict()
        if state.keys() != expected.keys():
            raise ValueError(f"it has {len(state)} fields, and this adapter {len(expected)}")
        for name, own in expected.items():
            check_tensor(name, state[name], like=own)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ValueError: It is of another adapter; nothing is changed.
        """
        self.check_state_dict(state)
        self._start, self._unit = state["start"], state["unit"]
        for index, factor in enumerate(self._factors):
            factor.down.weight.data.copy_(state[f"down.{index}"])
            factor.up.weight.data.copy_(state[f"up.{index}"])

    def _scale(self, factor: _Factor) -> Callable[[nn.Module, object, Tensor], Tensor | None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor | None:
            if self._values is None or self._member_of_row is None:
                return None
            index = self._rows.index
            members = (
                self._member_of_row if index is None else self._member_of_row[index.to(self._member_of_row.device)]
            )
            if output.ndim != 3 or output.shape[0] != len(members):
                raise UnsupportedError(
                    "ESSA with an adapter on experts",
                    reason="their inputs are tokens of several members, and not rows of the batch",
                    instead="target_modules without the experts",
                )
            own = self._values[:, factor.start : factor.start + factor.rank].to(output.dtype)
            return output * own[members.to(own.device)][:, None]

        return hook


def _lora_of(name: str, module: nn.Module) -> tuple[nn.Linear, nn.Linear, float] | None:
    downs, ups = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
    if not isinstance(downs, nn.ModuleDict) or not isinstance(ups, nn.ModuleDict):
        return None
    active = [adapter for adapter in getattr(module, "active_adapters", ()) if adapter in downs]
    if not active:
        return None
    down, up = downs[active[0]], ups[active[0]]
    if len(active) > 1 or not isinstance(down, nn.Linear) or not isinstance(up, nn.Linear):
        raise UnsupportedError(
            f"ESSA with the adapter of {name}",
            reason="only one LoRA at a time, on linear layers, has singular values to evolve",
            instead="one LoRA adapter on linear layers",
        )
    if getattr(module, "use_dora", {}).get(active[0]) or getattr(module, "lora_variant", {}).get(active[0]):
        raise UnsupportedError(
            f"ESSA with the LoRA variant of {name}",
            reason="its norm would differ from row to row",
            instead="LoraConfig(use_dora=False)",
        )
    return down, up, float(getattr(module, "scaling")[active[0]])  # noqa: B009 - nn.Module does not declare it


@torch.no_grad()
def _factor(down: nn.Linear, up: nn.Linear, *, scaling: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """Replace A and B by V^T and U; returns the singular values, fp64, and the unit of their coordinates."""
    a, b = down.weight.double(), up.weight.double()
    rank = a.shape[0]
    if not bool(b.any()):
        b = torch.linalg.qr(torch.randn(b.shape, generator=generator, dtype=torch.float64).to(b.device)).Q
        values, u, v = torch.zeros(rank, dtype=torch.float64), b, torch.linalg.qr(a.t()).Q.t()
        # What an adapter of this shape has after some training: small against the layer's own weights.
        unit = rank**-0.5
    else:
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.t())
        u_small, small, v_small = torch.linalg.svd(r_b @ r_a.t())
        values, u, v = small * abs(scaling), q_b @ u_small, v_small @ q_a.t()
        values, unit = values.cpu(), float(values.mean())
    down.weight.copy_(v)
    up.weight.copy_(u / abs(scaling))
    return values, unit
