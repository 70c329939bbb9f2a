"""A machine to plan for, which need not be this one: a graphics card by its name, RAM and disk.

Numbers of cards are their makers': memory, dense tensor throughput in bf16 (fp16 where a card has no bf16) with sums in
fp32, and the PCI Express link. What a step reaches of them is a guess until `lowmem bench` has measured it, and plans
say so.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Final

import torch

from lowmem.errors import UnsupportedError
from lowmem.experts.visiting import expected_share
from lowmem.machines.rates import what_trains
from lowmem.planning.job import DeviceKind
from lowmem.planning.plan import BEYOND, THIS_MACHINE
from lowmem.planning.search import Memory
from lowmem.planning.shapes import BlockShape, ModelShapes, itemsize
from lowmem.planning.step_time import UPDATE_BESIDE_S_PER_PARAM, Rates, ShapeRates, Trained, assumed_rates
from offload import Budget, format_bytes, format_number, installed_ram_bytes, parse_bytes

_GIB = 1 << 30


_SUSTAINED = 0.7
"""Part of a card's throughput that the products of a training step reach: 700 of an H200's 989 TFLOP/s were seen."""


_MEMORY_SUSTAINED = 0.85
"""Part of its memory's throughput that element-wise operators reach."""


_GBPS_PER_TFLOPS = 6.0
"""Memory's gigabytes per second for each TFLOP/s, of a card of which nobody said it: 5 to 13 are usual."""


_ATTENTION_SHARES = 0.5, 0.13
"""Part of its throughput that attention reaches without gradients, and recomputed and differentiated, with the same
operations counted once: 385 to 560 and 110 to 142 TFLOP/s on an H200.
"""


_PASSES: dict[Trained, tuple[int, int]] = {
    "nothing": (4, 12),
    "lora": (9, 23),
    "lora of experts": (9, 23),
    "dora": (12, 31),
}
"""How often element-wise operators go over what a block's products take and give, in a forward and in a backward that
recomputes it: LoRA by the profile of a step on an H200, DoRA by what it took more there.
"""


_HEAD_PASSES = 30, 15
"""The same of logits in fp32."""


_LAUNCH_S = 1e-3, 4e-3
"""What a block's operators take to be launched, in a forward and in a backward: 2 and 6 ms from the H200's host."""


_CALLS = 1, 8, 32, 128, 512, 2048, 8192
"""Tokens of the calls that times are given for."""


_UPDATE_BYTES, _DROPOUT_BYTES = 40, 12
"""What AdamW in fp32, its gradient's norm included, and dropping a value in fp32 read and write."""


_VALUES_BYTES_PER_S = 1.0e11
"""Values of two bytes that a card makes of packed weights: 61 million in 1.2 ms on an H200."""


_LANE_GBPS = {3: 0.80, 4: 1.60, 5: 3.15}
"""Gigabytes per second and lane of pinned copies, by generation: some four fifths of the wire."""


_SYSTEM_BYTES = 2 * _GIB
"""RAM that the system, Python and its libraries keep."""


_CONTEXT_BYTES = 3 * _GIB // 4
"""Device memory that CUDA's context and libraries keep."""


_FEWEST_BYTES = 1 << 20
"""Of memory: fewer are a number whose unit was left out."""


_MOST_PER_S = 1e6
"""Of any rate of a machine, in the unit in which it is given: more is a slip of the finger."""


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
    memory_gbps: float
    """Gigabytes (10**9 bytes) per second of its memory."""
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

    def shape_rates(self, shapes: ModelShapes) -> ShapeRates:
        """What a model's mean block and its head take, by operations and bytes: in half types, under autocast."""
        trains = what_trains(shapes)
        flops_per_s, bytes_per_s = self.tflops * 1e12, self.memory_gbps * 1e9 * _MEMORY_SUSTAINED
        blocks, compute = shapes.blocks, itemsize(shapes.compute_dtype)
        active = statistics.fmean(block.num_active_params for block in blocks)
        moved = compute * statistics.fmean(map(_values_per_token, blocks))
        # Products are made three times in a backward of which weights get no gradient: again, and for their inputs.
        times_s: list[tuple[float, ...]] = []
        for products, passes, launch_s in zip((1, 2), _PASSES[trains], _LAUNCH_S, strict=True):
            product_s = 2.0 * active * products / (flops_per_s * _SUSTAINED)
            token_s = product_s + passes * moved / bytes_per_s
            weights_s = {num: products * compute * _weights_read(shapes, num) / bytes_per_s for num in _CALLS}
            times_s.append(tuple(max(launch_s, weights_s[num], token_s * num) for num in _CALLS))
        logits_s = shapes.vocab_size * itemsize("float32") / bytes_per_s
        head_s = 2.0 * shapes.num_head_params / (flops_per_s * _SUSTAINED)
        return ShapeRates(
            trains=trains,
            call_tokens=_CALLS,
            forward_calls_s=times_s[0],
            backward_calls_s=times_s[1],
            chunk_forward_s=0.0,
            chunk_backward_s=0.0,
            visit_forward_s=0.0,
            visit_backward_s=0.0,
            attention_flops_per_s=flops_per_s * _ATTENTION_SHARES[0],
            attention_backward_flops_per_s=flops_per_s * _ATTENTION_SHARES[1],
            head_token_s=head_s + _HEAD_PASSES[0] * logits_s,
            head_backward_token_s=2 * head_s + _HEAD_PASSES[1] * logits_s,
            unpack_s=statistics.fmean(block.packed_values_bytes for block in blocks) / _VALUES_BYTES_PER_S,
            update_s_per_param=_UPDATE_BYTES / bytes_per_s,
            update_beside_s_per_param=UPDATE_BESIDE_S_PER_PARAM,
            # PEFT's DoRA multiplies what was dropped by the weight once more.
            dropout_s=_DROPOUT_BYTES / bytes_per_s + 2.0 * shapes.outputs_per_dora_input / (flops_per_s * _SUSTAINED),
        )


def _values_per_token(block: BlockShape) -> int:
    """What a block's products take and give."""
    values = sum(linear.in_features + linear.out_features for linear in block.linears)
    if block.experts is not None:
        experts = block.experts
        values += experts.num_per_token * (2 * block.hidden_size + experts.expanded_size + experts.product_size)
    return values


def _weights_read(shapes: ModelShapes, num_tokens: int) -> float:
    """Weights of the mean block that so many tokens are multiplied with."""
    total = 0.0
    for block in shapes.blocks:
        total += block.num_active_params
        if block.experts is not None:
            # Each token has its own few of them.
            experts = block.experts
            share = expected_share(num_tokens, num_experts=experts.num_experts, num_per_token=experts.num_per_token)
            each = block.hidden_size * (experts.expanded_size + experts.product_size)
            total += each * (share * experts.num_experts - experts.num_per_token)
    return total / len(shapes.blocks)


Row = tuple[str, float, float, float]
"""Name, memory in GiB, TFLOP/s, memory's GB/s."""


def _cards(pcie: int, *rows: Row, lanes: int = 16, has_bf16: bool = True) -> tuple[Card, ...]:
    return tuple(
        Card(name=name, vram_gib=vram, tflops=tflops, memory_gbps=gbps, pcie=pcie, lanes=lanes, has_bf16=has_bf16)
        for name, vram, tflops, gbps in rows
    )


CARDS: Final = (
    *_cards(3, ("RTX 2060", 6, 25.8, 336), ("RTX 2080 Ti", 11, 53.8, 616), ("T4", 16, 65, 320), has_bf16=False),
    *_cards(3, ("V100 16GB", 16, 112, 900), ("V100 32GB", 32, 112, 900), has_bf16=False),
    *_cards(
        4,
        ("RTX 3060", 12, 25.5, 360),
        ("RTX 3060 Ti", 8, 32.4, 448),
        ("RTX 3070", 8, 40.6, 448),
        ("RTX 3080", 10, 59.5, 760),
    ),
    *_cards(4, ("RTX 3080 Ti", 12, 68, 912), ("RTX 3090", 24, 71, 936), ("RTX 3090 Ti", 24, 80, 1008)),
    *_cards(
        4, ("RTX 4060", 8, 30.2, 272), ("RTX 4060 Ti 8GB", 8, 44.1, 288), ("RTX 4060 Ti 16GB", 16, 44.1, 288), lanes=8
    ),
    *_cards(4, ("RTX 4070", 12, 58.3, 504), ("RTX 4070 Super", 12, 70.9, 504), ("RTX 4070 Ti Super", 16, 88.2, 672)),
    *_cards(4, ("RTX 4080", 16, 97.5, 717), ("RTX 4080 Super", 16, 104.4, 736), ("RTX 4090", 24, 165.2, 1008)),
    *_cards(5, ("RTX 5060 Ti 16GB", 16, 47.4, 448), lanes=8),
    *_cards(
        5,
        ("RTX 5070", 12, 61.7, 672),
        ("RTX 5070 Ti", 16, 87.9, 896),
        ("RTX 5080", 16, 112.6, 960),
        ("RTX 5090", 32, 209.5, 1792),
    ),
    *_cards(4, ("RTX A4000", 16, 76.7, 448), ("RTX A5000", 24, 111.1, 768), ("RTX A6000", 48, 154.8, 768)),
    *_cards(4, ("RTX 6000 Ada", 48, 364.2, 960), ("L4", 24, 121, 300), ("L40S", 48, 362, 864), ("A10", 24, 125, 600)),
    *_cards(4, ("A100 40GB", 40, 312, 1555), ("A100 80GB", 80, 312, 2039)),
    *_cards(5, ("RTX PRO 6000 Blackwell", 96, 503.8, 1792), ("H100 PCIe", 80, 756, 2000), ("H100 SXM", 80, 989, 3350)),
    *_cards(5, ("H200", 141, 989, 4800)),
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
    if not wanted:
        raise UnsupportedError(
            f"gpu={name!r}",
            reason="it names no card",
            instead='a name, "RTX 4090" for instance, or none to compute on the processor',
        )
    found = [card for card in CARDS if _plain(card.name) == wanted]
    found = found or [card for card in CARDS if _plain(card.name).startswith(wanted)]
    if len(found) == 1:
        return found[0]
    near = [card.name for card in found] or get_close_matches(name, [card.name for card in CARDS], n=3, cutoff=0.5)
    raise UnsupportedError(
        f"gpu={name!r}",
        reason="several cards are called so" if found else "it is not in the table of cards",
        instead=f"one of {', '.join(near or [card.name for card in CARDS])}"
        + ("" if found else ", or any name with its numbers: vram=, tflops= and pcie_gbps="),
    )


def _refuse_too_little(name: str, size: int | str, *, kept_bytes: int, by: str) -> None:
    """Refuse a size of which nothing would be left.

    Raises:
        ValueError: It is none, its unit was left out, or `kept_bytes` of it are taken.
    """
    nbytes = parse_bytes(size, field=f"Machine.{name}")
    if isinstance(size, str) and size.strip().isdecimal() and 0 < nbytes < _FEWEST_BYTES:
        raise ValueError(f'Machine.{name}={size!r}: expected a size with its unit, "{nbytes}GiB" for instance')
    if nbytes <= kept_bytes:
        raise ValueError(
            f"Machine.{name}={size!r}: {by} keep {format_bytes(kept_bytes)} of it, and nothing would be left; give more"
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
        memory_gbps: Gigabytes per second of its memory, instead of the table's; of a card that is not there, a guess by
            its throughput if not given.
        gpus: How many such cards it has, each with a process of its own (docs/processes.md).
        nodes: How many such machines there are.
        network_gbps: Gigabytes per second between them; 1.25 is 10 Gbit/s.

    Raises:
        UnsupportedError: The card is not known, and a number of it is missing.
        ValueError: A size or a rate is none, or nothing would be left of it.
    """

    gpu: str | None = None
    ram: int | str = "32GiB"
    disk_gbps: float = 3.0
    vram: int | str | None = None
    tflops: float | None = None
    pcie_gbps: float | None = None
    memory_gbps: float | None = None
    gpus: int = 1
    nodes: int = 1
    network_gbps: float = 1.25

    def __post_init__(self) -> None:
        for name in ("disk_gbps", "tflops", "pcie_gbps", "memory_gbps", "network_gbps"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
                raise ValueError(f"Machine.{name}={value!r}: expected a number above 0")
            if value is not None and value > _MOST_PER_S:
                raise ValueError(f"Machine.{name}={value!r}: expected at most {_MOST_PER_S:,.0f}, which no machine has")
        _refuse_too_little("ram", self.ram, kept_bytes=_SYSTEM_BYTES, by="the system, Python and its libraries")
        if self.vram is not None:
            _refuse_too_little("vram", self.vram, kept_bytes=_CONTEXT_BYTES, by="CUDA's context and libraries")
        for name in ("gpus", "nodes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"Machine.{name}={value!r}: expected a whole number of at least 1")
        for name in ("gpus", "nodes"):
            if self.gpu is None and getattr(self, name) > 1:
                raise ValueError(f"Machine.{name}={getattr(self, name)}: say which card each has; give gpu= too")
        for name in ("vram", "pcie_gbps", "memory_gbps"):
            if self.gpu is None and getattr(self, name) is not None:
                raise ValueError(
                    f"Machine.{name}={getattr(self, name)!r} belongs to a card; give gpu= too, or leave it out"
                )
        # Fails now where the card is not known.
        _ = self.card

    @property
    def card(self) -> Card | None:
        """The card with what was given in place of the table's numbers; None for a processor."""
        if self.gpu is None:
            return None
        is_complete = None not in (self.vram, self.tflops, self.pcie_gbps)
        if is_complete and _plain(self.gpu) not in {_plain(card.name) for card in CARDS}:
            gbps = _GBPS_PER_TFLOPS * (self.tflops or 0.0)
            card = Card(name=self.gpu, vram_gib=0, tflops=0, memory_gbps=gbps, pcie=4)
        else:
            card = find_card(self.gpu)
        vram_gib = card.vram_gib if self.vram is None else parse_bytes(self.vram) / _GIB
        found = replace(card, vram_gib=vram_gib, tflops=self.tflops or card.tflops)
        return replace(found, memory_gbps=self.memory_gbps or card.memory_gbps)

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

    def rates_for(self, shapes: ModelShapes) -> Rates:
        """The same with what a model's blocks and head take on its card, where an adapter trains or nothing does."""
        card = self.card
        if card is None or shapes.trains_every_weight:
            return self.rates
        return replace(self.rates, shape=card.shape_rates(shapes))

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
                f"{count}{card.name}, {card.vram_gib:g} GiB, {card.tflops:g} TFLOP/s, "
                f"{format_number(link)} GB/s of copies"
            )
        words.append(f"{format_bytes(parse_bytes(self.ram))} of RAM, disk {self.disk_gbps:g} GB/s")
        if self.nodes > 1:
            words.append(f"{self.nodes} such machines with {self.network_gbps:g} GB/s between them")
        return ", ".join(words)


def memory_of(machine: Machine, given: Budget | None) -> Memory:
    """What a machine leaves to one of its processes: budgets beyond it are not recommended.

    Args:
        machine: The machine.
        given: The budget as it was asked for.
    """
    whole, asked = machine.budget(), given or Budget()
    if machine.card is None:
        return _of_one_ram(whole.device_bytes or 0, asked, machine.budget(given))
    host_bytes = (whole.host_bytes or 0) // machine.gpus
    return Memory(device_bytes=whole.device_bytes or 0, host_bytes=host_bytes)


def _of_one_ram(ram_bytes: int, asked: Budget, bounds: Budget) -> Memory:
    """Both budgets are a processor's RAM. A host budget that nobody asked for gives way to the device's."""
    device_bytes = max(0, ram_bytes - (asked.host_bytes or 0))
    host_bytes = max(0, ram_bytes - (bounds.device_bytes or 0))
    return Memory(device_bytes=device_bytes, host_bytes=host_bytes, host_gives_way=asked.host_bytes is None)


def refuse_beyond(machine: Machine, budget: Budget | None) -> None:
    """Refuse a budget of which a machine has not as much: it bounds what of it may be used.

    Raises:
        ValueError: Names the size, and what the machine has.
    """
    given, card, ram_bytes = budget or Budget(), machine.card, parse_bytes(machine.ram)
    of_card = ram_bytes if card is None else int(card.vram_gib * _GIB)
    has = f"{format_bytes(ram_bytes)} of RAM"
    for name, size, nbytes, most, what in (
        ("device", given.device, given.device_bytes, of_card, has if card is None else f"{format_bytes(of_card)}"),
        ("host", given.host, given.host_bytes, ram_bytes, has),
    ):
        if nbytes is not None and nbytes > most:
            whose = card.name if card is not None and name == "device" else "machine"
            raise ValueError(f"Budget.{name}={size!r} is more than the {whose} has, {what}; give less, or leave it out")
    if card is None and (given.device_bytes or 0) + (given.host_bytes or 0) > ram_bytes:
        raise ValueError(
            f"Budget.device={given.device!r} and Budget.host={given.host!r} are together more than the machine has, "
            f"{has}, of which both are on a processor; give less"
        )


def described(
    machine: Machine | None, given: Budget | None, bounds: Budget, *, device: torch.device, num_sharing: int = 1
) -> tuple[str, Memory | None]:
    """What is planned for in words, and what memory advice keeps to.

    Budgets beyond this machine are those of another that nobody described: the words say so, and there is no bound.

    Args:
        machine: The one that was described; None for this one.
        given: The budget as it was asked for.
        bounds: It with both sizes, those of one process.
        device: Where it computes.
        num_sharing: Processes of a run on this machine, each with a part of its RAM.
    """
    if machine is not None:
        return str(machine), memory_of(machine, given)
    on_cpu, asked = device.type == "cpu", given or Budget()
    device_bytes, host_bytes = bounds.device_bytes or 0, bounds.host_bytes or 0
    ram_bytes = installed_ram_bytes()
    own_bytes = ram_bytes // num_sharing
    card_bytes = own_bytes if on_cpu else torch.cuda.mem_get_info(device)[1]
    if (device_bytes if on_cpu else 0) + host_bytes > own_bytes or device_bytes > card_bytes:
        card = "" if on_cpu else f"{format_bytes(card_bytes)} on its card and "
        return f"{BEYOND}{card}{format_bytes(ram_bytes)} of RAM", None
    usable_bytes = max(0, int((ram_bytes - _SYSTEM_BYTES) * (1 - _MARGIN))) // num_sharing
    # What was measured is what there is now.
    if on_cpu:
        is_open = asked.device_bytes is None or asked.host_bytes is None
        whole = device_bytes + host_bytes if is_open else max(usable_bytes, device_bytes + host_bytes)
        return THIS_MACHINE, _of_one_ram(whole, asked, bounds)
    if asked.device_bytes is None:
        card_bytes = device_bytes
    host_bytes = host_bytes if asked.host_bytes is None else max(usable_bytes, host_bytes)
    return THIS_MACHINE, Memory(device_bytes=card_bytes, host_bytes=host_bytes)
