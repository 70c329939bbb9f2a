"""A machine to plan for, which need not be this one: a graphics card by its name, RAM and disk.

Numbers of cards are their makers': memory, dense tensor throughput in bf16 (fp16 where a card has no bf16) with sums in
fp32, and the PCI Express link. What a step reaches of them is a guess until `lowmem bench` has measured it, and plans
say so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Final

from lowmem.errors import UnsupportedError
from lowmem.planning.job import DeviceKind
from lowmem.planning.step_time import Rates, assumed_rates
from offload import Budget, format_bytes, parse_bytes

_GIB = 1 << 30


_SUSTAINED = 0.6
"""Part of a card's throughput that the products of a training step reach; 0.5 to 0.7 is usual for large products."""


_LANE_GBPS = {3: 0.80, 4: 1.60, 5: 3.15}
"""Gigabytes per second and lane of pinned copies, by generation: some four fifths of the wire."""


_SYSTEM_BYTES = 2 * _GIB
"""RAM that the system, Python and its libraries keep."""


_CONTEXT_BYTES = 3 * _GIB // 4
"""Device memory that CUDA's context and libraries keep."""


_MARGIN = 0.05
"""Part of a tier that is left to rounding and fragments."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A graphics card, by its maker's numbers."""

    name: str
    """As it is asked for."""
    vram_gib: float
    """Memory in GiB."""
    tflops: float
    """Dense 16-bit tensor operations with sums in fp32, in 10**12 per second."""
    pcie: int
    """Generation of PCI Express."""
    lanes: int = 16
    """Lanes."""
    has_bf16: bool = True
    """Whether it computes in bf16 itself."""

    @property
    def pcie_gbps(self) -> float:
        """Gigabytes per second that copies to it reach."""
        return _LANE_GBPS[self.pcie] * self.lanes


def _cards(pcie: int, *rows: tuple[str, float, float], lanes: int = 16, has_bf16: bool = True) -> tuple[Card, ...]:
    return tuple(
        Card(name=name, vram_gib=vram, tflops=tflops, pcie=pcie, lanes=lanes, has_bf16=has_bf16)
        for name, vram, tflops in rows
    )


CARDS: Final = (
    *_cards(3, ("RTX 2060", 6, 25.8), ("RTX 2080 Ti", 11, 53.8), ("T4", 16, 65), has_bf16=False),
    *_cards(3, ("V100 16GB", 16, 112), ("V100 32GB", 32, 112), has_bf16=False),
    *_cards(4, ("RTX 3060", 12, 25.5), ("RTX 3060 Ti", 8, 32.4), ("RTX 3070", 8, 40.6), ("RTX 3080", 10, 59.5)),
    *_cards(4, ("RTX 3080 Ti", 12, 68), ("RTX 3090", 24, 71), ("RTX 3090 Ti", 24, 80)),
    *_cards(4, ("RTX 4060", 8, 30.2), ("RTX 4060 Ti 8GB", 8, 44.1), ("RTX 4060 Ti 16GB", 16, 44.1), lanes=8),
    *_cards(4, ("RTX 4070", 12, 58.3), ("RTX 4070 Super", 12, 70.9), ("RTX 4070 Ti Super", 16, 88.2)),
    *_cards(4, ("RTX 4080", 16, 97.5), ("RTX 4080 Super", 16, 104.4), ("RTX 4090", 24, 165.2)),
    *_cards(5, ("RTX 5060 Ti 16GB", 16, 47.4), lanes=8),
    *_cards(5, ("RTX 5070", 12, 61.7), ("RTX 5070 Ti", 16, 87.9), ("RTX 5080", 16, 112.6), ("RTX 5090", 32, 209.5)),
    *_cards(4, ("RTX A4000", 16, 76.7), ("RTX A5000", 24, 111.1), ("RTX A6000", 48, 154.8)),
    *_cards(4, ("RTX 6000 Ada", 48, 364.2), ("L4", 24, 121), ("L40S", 48, 362), ("A10", 24, 125)),
    *_cards(4, ("A100 40GB", 40, 312), ("A100 80GB", 80, 312)),
    *_cards(5, ("RTX PRO 6000 Blackwell", 96, 503.8), ("H100 PCIe", 80, 756), ("H100 SXM", 80, 989)),
    *_cards(5, ("H200", 141, 989)),
)
"""By generation. Gaming cards of the RTX series sum in fp32 at half the rate of their fp16 sums; this is that half."""


def find_card(name: str) -> Card:
    """A card by its name; case, spaces and the maker's name do not matter.

    Raises:
        UnsupportedError: It is not in the table, or several are called so.
    """
    if not isinstance(name, str):
        raise TypeError(f'gpu={name!r}: expected the name of a card, "RTX 4090" for instance')
    wanted = _plain(name)
    found = [card for card in CARDS if _plain(card.name) == wanted]
    found = found or [card for card in CARDS if _plain(card.name).startswith(wanted)]
    if len(found) == 1:
        return found[0]
    near = [card.name for card in found] or get_close_matches(name, [card.name for card in CARDS], n=3, cutoff=0.5)
    raise UnsupportedError(
        f"gpu={name!r}",
        reason="several cards are called so" if found else "it is not in the table of cards",
        instead=f"one of {', '.join(near or [card.name for card in CARDS])}"
        + ("" if found else ", or any name with its numbers: vram, tflops and pcie_gbps"),
    )


def _plain(name: str) -> str:
    words = name.lower().replace("geforce", "").replace("nvidia", "").replace("tesla", "")
    return "".join(letter for letter in words if letter.isalnum())


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine to plan for: `lowmem.plan(model, machine=lowmem.Machine(gpu="RTX 4090", ram="64GiB", disk_gbps=7))`.

    Nothing of it need be here: no device is looked at, and none is made.

    Args:
        gpu: The card's name, one of `lowmem.machines.cards.CARDS` or any with its three numbers; None to compute on the
            processor.
        ram: RAM of the whole machine, "64GiB" for instance.
        disk_gbps: Gigabytes (10**9 bytes) per second that the drive reads with several requests in flight.
        vram: The card's memory, instead of the table's.
        tflops: Its dense 16-bit throughput in 10**12 operations per second, instead of the table's; of a processor,
            what its products reach.
        pcie_gbps: Gigabytes per second of copies to it, instead of the table's.
        gpus: How many such cards it has, each with a process of its own (docs/processes.md).
        nodes: How many such machines there are.
        network_gbps: Gigabytes per second between them; 1.25 is 10 Gbit/s.

    Raises:
        UnsupportedError: The card is not known, and a number of it is missing.
        ValueError: A size or a rate is none.
    """

    gpu: str | None = None
    ram: int | str = "32GiB"
    disk_gbps: float = 3.0
    vram: int | str | None = None
    tflops: float | None = None
    pcie_gbps: float | None = None
    gpus: int = 1
    nodes: int = 1
    network_gbps: float = 1.25

    def __post_init__(self) -> None:
        for name in ("disk_gbps", "tflops", "pcie_gbps", "network_gbps"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
                raise ValueError(f"Machine.{name}={value!r}: expected a number above 0")
        for name in ("ram", "vram"):
            value = getattr(self, name)
            if value is not None and parse_bytes(value, field=f"Machine.{name}") < _GIB // 4:
                raise ValueError(f'Machine.{name}={value!r}: expected a size with its unit, "24GiB" for instance')
        for name in ("gpus", "nodes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Machine.{name}={value!r}: expected a whole number of at least 1")
        if self.gpu is None and self.gpus > 1:
            raise ValueError(f"Machine.gpus={self.gpus}: say which card, gpu= (--gpu), of which there are so many")
        if self.gpu is None and (self.vram is not None or self.pcie_gbps is not None):
            raise ValueError("Machine: vram and pcie_gbps belong to a card; give gpu= too, or leave them out")
        # Fails now where the card is not known.
        _ = self.card

    @property
    def card(self) -> Card | None:
        """The card with what was given in place of the table's numbers; None for a processor."""
        if self.gpu is None:
            return None
        is_complete = None not in (self.vram, self.tflops, self.pcie_gbps)
        if is_complete and _plain(self.gpu) not in {_plain(card.name) for card in CARDS}:
            card = Card(name=self.gpu, vram_gib=0, tflops=0, pcie=4)
        else:
            card = find_card(self.gpu)
        vram_gib = card.vram_gib if self.vram is None else parse_bytes(self.vram) / _GIB
        return replace(card, vram_gib=vram_gib, tflops=self.tflops or card.tflops)

    @property
    def device(self) -> DeviceKind:
        """What computes."""
        return "cpu" if self.gpu is None else "cuda"

    @property
    def rates(self) -> Rates:
        """What its numbers promise: none of it measured."""
        card, assumed = self.card, assumed_rates(self.device)
        copied, computed = assumed.copy_bytes_per_s, assumed.compute_flops_per_s
        if card is not None:
            copied, computed = (self.pcie_gbps or card.pcie_gbps) * 1e9, card.tflops * 1e12 * _SUSTAINED
        elif self.tflops is not None:
            computed = self.tflops * 1e12
        return Rates(disk_bytes_per_s=self.disk_gbps * 1e9, copy_bytes_per_s=copied, compute_flops_per_s=computed)

    def budget(self, given: Budget | None = None) -> Budget:
        """What a run may use of it.

        Args:
            given: Sizes and a folder that take precedence; sizes that it leaves open are the machine's, less what
                system, context and rounding take.
        """
        given = given or Budget()
        card = self.card
        ram_bytes = max(0, int((parse_bytes(self.ram) - _SYSTEM_BYTES) * (1 - _MARGIN)))
        host_bytes: int | None = given.host_bytes
        if card is None:
            own_bytes = max(0, ram_bytes - (host_bytes or 0))
            device_bytes = own_bytes if given.device_bytes is None else given.device_bytes
            host_bytes = max(0, ram_bytes - device_bytes) if host_bytes is None else host_bytes
        else:
            own_bytes = max(0, int((card.vram_gib * _GIB - _CONTEXT_BYTES) * (1 - _MARGIN)))
            device_bytes = own_bytes if given.device_bytes is None else given.device_bytes
            host_bytes = ram_bytes if host_bytes is None else host_bytes
        return Budget(device=device_bytes, host=host_bytes, disk=given.disk)

    def __str__(self) -> str:
        card, words = self.card, []
        if card is not None:
            link = self.pcie_gbps or card.pcie_gbps
            count = f"{self.gpus} x " if self.gpus > 1 else ""
            words.append(
                f"{count}{card.name}, {card.vram_gib:g} GiB, {card.tflops:g} TFLOP/s, {link:.3g} GB/s of copies"
            )
        words.append(f"{format_bytes(parse_bytes(self.ram))} of RAM, disk {self.disk_gbps:g} GB/s")
        if self.nodes > 1:
            words.append(f"{self.nodes} such machines with {self.network_gbps:g} GB/s between them")
        return ", ".join(words)
