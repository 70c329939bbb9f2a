"""Which rates a plan rests on: what was measured on this machine for a model of this shape, else what is assumed.

`lowmem bench` keeps what it measures in the platform's cache folder, one file for each shape, device and type.
What is kept there is a hint: a file that cannot be read, or was written by another version, is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from platformdirs import user_cache_path
from torch import Tensor, nn

from lowmem.planning.job import kind_of
from lowmem.planning.read_model import read_shapes
from lowmem.planning.shapes import ModelShapes
from lowmem.planning.step_time import Rates, ShapeRates, Trained, assumed_rates
from offload import DiskRate, Folder, probe_compute, probe_disk

if TYPE_CHECKING:
    from lowmem.models.checkpoint import Described
    from lowmem.planning.plan import Plan

_VERSION: Final = 7

_COPY_BYTES: Final = 32 << 20


_NUM_TURNS, _MOST_REPEATS = 3, 9
"""Turns of what is timed, and the most times in each."""

_TURN_S = 0.08
"""What is shorter is timed more often, until this much is spent: one call of milliseconds is off by a third."""

_ENOUGH_S = 1.0
"""What took this much is not run again."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Stopwatch:
    """Times calls on a device."""

    device: torch.device
    clock: Clock

    def usual_s(self, run: Callable[[], object]) -> float:
        """The median of some runs, after one that warms up: a step is the sum of many, not of the shortest ones."""
        return self.usual_in_turn([run])[0]

    def usual_in_turn(
        self, runs: Sequence[Callable[[], object]], *, before: Sequence[Callable[[], object] | None] = ()
    ) -> list[float]:
        """The same of each of several in turn, three times over: what slows a machine for a while slows none alone.

        Args:
            runs: What is timed.
            before: What comes before each time of each of them, untimed; empty for nothing.
        """
        took_s: list[list[float]] = [[] for _ in runs]
        for turn in range(_NUM_TURNS):
            for run, first, seen in zip(runs, before or [None] * len(runs), took_s, strict=True):
                if sum(seen) >= _ENOUGH_S:
                    continue
                if not turn or seen[-1] < _TURN_S:
                    # Caches and the heap are the previous one's, which matters to what is short.
                    first_s = self._once_s(run)
                    if first_s >= _ENOUGH_S:
                        seen.append(first_s)
                        continue
                times_s: list[float] = []
                while not times_s or (len(times_s) < _MOST_REPEATS and sum(times_s) < _TURN_S):
                    if first is not None:
                        first()
                    times_s.append(self._once_s(run))
                seen += times_s
        return [statistics.median(seen) for seen in took_s]

    def _once_s(self, run: Callable[[], object]) -> float:
        self._wait()
        start_s = self.clock()
        run()
        self._wait()
        return self.clock() - start_s

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


_PACE_SIZE: Final = 1024


class Pace:
    """How fast a machine is from time to time: a matrix product that is always the same.

    Other programs, other guests of the same host, and heat make a machine slower for seconds or minutes. What is
    measured then is true of those minutes.

    Args:
        watch: Times it.
    """

    def __init__(self, watch: Stopwatch) -> None:
        # Its own generator: a measurement must not change the random numbers of the run.
        generator = torch.Generator(watch.device).manual_seed(0)
        self._factor = torch.rand(_PACE_SIZE, _PACE_SIZE, device=watch.device, generator=generator)
        self._watch = watch
        self.looks_s: list[float] = []
        """What it took, each time that it was looked at."""
        self.look()

    def look(self) -> float:
        """Time it now, in half a second on a processor; returns seconds."""
        with torch.no_grad():
            # The better of two: what lasts for a quarter of a second is not its pace.
            twice_s = [self._watch.usual_s(lambda: self._factor @ self._factor) for _ in range(2)]
        self.looks_s.append(min(twice_s))
        return self.looks_s[-1]

    @property
    def looks_ms(self) -> list[float]:
        """The same in milliseconds, for records."""
        return [round(1e3 * look_s, 3) for look_s in self.looks_s]

    @property
    def seen(self) -> SeenPace:
        """What to keep of it."""
        return SeenPace(fastest_ms=1e3 * min(self.looks_s), slowest_ms=1e3 * max(self.looks_s))

    @property
    def slowest_over_fastest(self) -> float:
        """1 where nothing changed."""
        return max(self.looks_s) / min(self.looks_s)


UNSTEADY: Final = 1.15
"""Slowest over fastest look of one measurement from which on what was measured is not to be trusted."""

SLOW: Final = 1.3
"""The same of the fastest look and the fastest ever: more, for heat alone makes a tenth from one hour to another."""


@dataclass(frozen=True, kw_only=True)
class SeenPace:
    """How fast the machine was while rates were measured, in milliseconds of `Pace`'s product."""

    fastest_ms: float
    slowest_ms: float

    def slower(self, fastest_ever_ms: float | None) -> float:
        """How many times as slow as it can be it was for a while."""
        return self.slowest_ms / min(self.fastest_ms, fastest_ever_ms or self.fastest_ms)

    def is_disturbed(self, fastest_ever_ms: float | None) -> bool:
        """Whether rates that were measured then are off by more than they usually are."""
        is_slow = fastest_ever_ms is not None and self.fastest_ms > SLOW * fastest_ever_ms
        return is_slow or self.slowest_ms > UNSTEADY * self.fastest_ms


def _pace_file(device: torch.device) -> Path:
    # The product is always in fp32: its time is one for all types of models.
    name = hashlib.sha256(repr((_PACE_SIZE, "float32", *_where(device))).encode()).hexdigest()[:24]
    return user_cache_path("lowmem") / "rates" / f"pace-{name}.json"


def fastest_ever_ms(device: torch.device) -> float | None:
    """What `Pace`'s product took when it was fastest on this machine, with as many threads; None if never timed."""
    try:
        found = float(json.loads(_pace_file(device).read_text())["fastest_ms"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found > 0 else None


def keep_pace(seen: SeenPace, device: torch.device) -> float | None:
    """Keep the fastest look if there was no faster one; returns the fastest of those before, None if there is none."""
    before_ms = fastest_ever_ms(device)
    if before_ms is None or seen.fastest_ms < before_ms:
        _put(_pace_file(device), {"fastest_ms": seen.fastest_ms})
    return before_ms


def _put(file: Path, content: object) -> bool:
    """Write a file of the cache as a whole; False where it cannot be written."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with Folder.open(file.parent) as folder:
            folder.put(file.name, json.dumps(content).encode())
        return True
    return False


@dataclass(frozen=True, kw_only=True)
class KeptRates:
    """What was measured for one shape of a model on this machine."""

    rates: Rates
    """Of disk, copies and products; `shape` is None."""
    shapes: dict[str, ShapeRates]
    """Of the model's own blocks, by what trains in them."""
    pace: SeenPace | None = None
    """Of the machine meanwhile; None where that was not looked at."""
    caveat: str = ""
    """What plans say of them: that the machine was disturbed."""

    def for_(self, trains: Trained) -> Rates:
        """The rates of a job."""
        # What was measured with another adapter is nearer than what is assumed; every weight is another matter.
        near: tuple[Trained, ...] = (trains, *(() if trains == "full" else ("lora", "dora")))
        found = next((self.shapes[kind] for kind in near if kind in self.shapes), None)
        return replace(self.rates, shape=found, caveat=self.caveat)


def rates_for(opened: Described, shapes: ModelShapes, rates: Rates | str | None, *, autocast: bool = True) -> Rates:
    """The rates given, measured now ("measure"), or kept from an earlier measurement, else assumed (None).

    Raises:
        ValueError: Anything else, or "measure" where no weight is here to be read.
    """
    if isinstance(rates, Rates):
        return rates
    if rates is None:
        return known_rates(shapes, opened.device, autocast=autocast)
    if rates != "measure":
        raise ValueError(f'rates={rates!r}: expected None, "measure" or what lowmem.machines.rates.rates_for returned')
    source = getattr(opened, "source", None)
    if source is None:
        raise ValueError('rates="measure": the weights are not here, so their disk cannot be measured; leave it out')
    return measure_rates(probe_disk(source.files), device=opened.device, dtype=opened.dtype)


def known_rates(shapes: ModelShapes, device: torch.device, *, autocast: bool) -> Rates:
    """The rates that are kept for a shape, those with autocast and without it standing in for each other, else assumed.

    Disk, copies and products are the same in both, and what a block takes is off by less than a fifth, where what is
    assumed may be off by five times; the plan says so (`Rates.caveat`).
    """
    kept = read_kept(shapes, device, autocast=autocast)
    if kept is not None:
        return kept.for_(what_trains(shapes))
    other = read_kept(shapes, device, autocast=not autocast)
    if other is None:
        return assumed_rates(kind_of(device))
    found = other.for_(what_trains(shapes))
    if found.shape is None:
        return found
    words = "with autocast, which this job has not" if not autocast else "without autocast, which this job has"
    option = "" if autocast else " --no-autocast"
    stands_in = f"blocks were measured {words}; run lowmem bench MODEL{option}"
    return replace(found, caveat="; ".join(filter(None, (found.caveat, stands_in))))


def rates_again(made: Plan, shapes: ModelShapes, *, device: torch.device, autocast: bool) -> Rates:
    """The rates to plan a loaded model's real job with: those that are kept for it as it is.

    Rates that were given, or are another machine's, stay as they are: only what was looked up is looked up again.

    Args:
        made: What it was loaded with, or planned again for last.
        shapes: The model with what really trains.
        device: Compute device.
        autocast: Whether it trains under autocast.
    """
    looked_up = known_rates(shapes, device, autocast=made.job.autocast)
    # The shape's own depend on what trains, which the plan before may not have known.
    if _general(looked_up) != _general(made.rates):
        return made.rates
    return known_rates(shapes, device, autocast=autocast)


def _general(rates: Rates) -> Rates:
    return replace(rates, shape=None, caveat="")


def measure_rates(disk: DiskRate, *, device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure copies and products, in less than a second: copies and multiplies on the device.

    Args:
        disk: What was measured of the checkpoint's disk.
        device: Compute device.
        dtype: Compute dtype.
    """
    return Rates(
        disk_bytes_per_s=disk.read_bytes_per_s,
        disk_num_threads=disk.num_threads,
        disk_request_bytes=disk.request_bytes,
        copy_bytes_per_s=probe_copy(device),
        compute_flops_per_s=probe_compute(dtype, device),
        measured=("disk", "copy", "compute"),
    )


def probe_copy(device: torch.device) -> float:
    """Bytes per second of pinned copies to a GPU, or of widening bf16 to fp32 on a CPU (bytes written)."""
    is_cuda = device.type == "cuda"
    source = torch.zeros(_COPY_BYTES // 2, dtype=torch.bfloat16, pin_memory=is_cuda)
    target = torch.empty(source.numel(), dtype=source.dtype if is_cuda else torch.float32, device=device)
    watch = Stopwatch(device, time.perf_counter)
    return target.nbytes / watch.usual_s(lambda: target.copy_(source, non_blocking=is_cuda))


_UPDATE_PARAMS: Final = 1 << 24
"""More than fits a cache."""


def probe_update(watch: Stopwatch) -> float:
    """Seconds for each parameter of what a step does to it: its gradient is gathered, clipped, and AdamW runs."""
    param, arrived, optimizer = _updated(watch.device)

    def update() -> None:
        assert param.grad is not None
        param.grad.copy_(arrived)
        nn.utils.clip_grad_norm_([param], 1.0)
        optimizer.step()

    return watch.usual_s(update) / _UPDATE_PARAMS


def _updated(device: torch.device) -> tuple[nn.Parameter, Tensor, torch.optim.Optimizer]:
    param = nn.Parameter(torch.zeros(_UPDATE_PARAMS, device=device))
    param.grad = torch.ones_like(param)
    return param, torch.ones_like(param), torch.optim.AdamW([param], lr=1e-3, fused=True)


def probe_update_beside(clock: Clock) -> float:
    """Seconds of AdamW by one core of the host, with the weight's copy and checksums of what is written."""
    host, num_threads = torch.device("cpu"), torch.get_num_threads()
    param, copied, optimizer = _updated(host)
    optimizer.step()
    written = [param.detach().numpy(), *(optimizer.state[param][name].numpy() for name in ("exp_avg", "exp_avg_sq"))]

    def update() -> None:
        optimizer.step()
        copied.copy_(param.detach())
        for values in written:
            zlib.crc32(values)

    try:
        torch.set_num_threads(1)
        return Stopwatch(host, clock).usual_s(update) / _UPDATE_PARAMS
    finally:
        torch.set_num_threads(num_threads)


def rates_as_loaded(opened: Described) -> Rates:
    """The rates that are kept for a model in which nothing trains yet, else assumed."""
    return rates_for(opened, read_shapes(opened), None)


def what_trains(shapes: ModelShapes) -> Trained:
    """What is differentiated in a model's blocks, as far as it changes how long that takes."""
    if shapes.trains_every_weight:
        return "full"
    if any(linear.is_dora for block in shapes.blocks for linear in block.linears):
        return "dora"
    is_of_experts = any(block.experts is not None and block.experts.adapted_bytes for block in shapes.blocks)
    return "lora of experts" if is_of_experts else "lora"


def kept_file(shapes: ModelShapes, device: torch.device, *, autocast: bool = True) -> Path:
    """Where the rates of a shape are kept: the same for models of the same widths and stored types."""
    bare = sorted({_widths(block) for block in shapes.blocks})
    products = "autocast" if autocast or shapes.compute_dtype == "float32" else "as they are"
    what = (bare, shapes.vocab_size, shapes.hidden_size, shapes.compute_dtype, shapes.stored_dtypes, products)
    name = hashlib.sha256(repr((_VERSION, what, _where(device))).encode()).hexdigest()[:24]
    return user_cache_path("lowmem") / "rates" / f"{name}.json"


def _where(device: torch.device) -> tuple[object, ...]:
    """What measurements of one machine have in common: its name, what computes, with how many threads, by what."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return platform.node(), card, torch.get_num_threads(), torch.__version__


def _widths(block: Any) -> tuple[Any, ...]:
    linears = tuple((linear.part.value, linear.in_features, linear.out_features) for linear in block.linears)
    return block.hidden_size, block.query_size, block.key_size, block.value_size, block.num_params, linears


def read_kept(shapes: ModelShapes, device: torch.device, *, autocast: bool = True) -> KeptRates | None:
    """What was kept for a shape on this machine, or None."""
    try:
        found = json.loads(kept_file(shapes, device, autocast=autocast).read_text())
        # What is said of them follows from what else is kept.
        names = {field.name for field in fields(Rates)} - {"shape", "caveat"}
        general = {name: found["rates"][name] for name in names}
        # Files of the first versions have none.
        pace = SeenPace(**found["pace"]) if found.get("pace") else None
        return KeptRates(
            rates=Rates(**_tuples(general)),
            shapes={kind: ShapeRates(**_tuples(values)) for kind, values in found["shapes"].items()},
            pace=pace,
            caveat=_caveat(pace, fastest_ever_ms(device)),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _caveat(pace: SeenPace | None, ever_ms: float | None) -> str:
    if pace is None or not pace.is_disturbed(ever_ms):
        return ""
    return f"measured while the machine was up to {pace.slower(ever_ms):.1f}x slower; run lowmem bench again"


def is_steadier(earlier: KeptRates | None, pace: SeenPace | None, ever_ms: float | None) -> bool:
    """Whether earlier rates are to stay: what was measured now was disturbed, and they were less so."""
    if earlier is None or earlier.pace is None or pace is None or not pace.is_disturbed(ever_ms):
        return False
    return earlier.pace.slower(ever_ms) < pace.slower(ever_ms)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def keep(kept: KeptRates, shapes: ModelShapes, device: torch.device, *, autocast: bool = True) -> Path | None:
    """Keep what was measured; returns the file, or None where the cache cannot be written.

    What could not be timed this time, of a model with these widths and other limits, stays as it was. Where the machine
    was disturbed, and less so when what is there was measured, all of that stays (`is_steadier`); of what is new only
    the rate in the budget's folder is kept then, if there was none.
    """
    file = kept_file(shapes, device, autocast=autocast)
    earlier = read_kept(shapes, device, autocast=autocast)
    rates, found, pace = kept.rates, kept.shapes, kept.pace
    if earlier is not None:
        moved = (rates.scratch_bytes_per_s, earlier.rates.scratch_bytes_per_s)
        if is_steadier(earlier, pace, fastest_ever_ms(device)):
            rates, found, pace = earlier.rates, earlier.shapes, earlier.pace
            moved = moved[::-1]
        else:
            found = earlier.shapes | found
        rates = replace(rates, scratch_bytes_per_s=moved[0] or moved[1])
    content: dict[str, object] = {"rates": asdict(rates), "shapes": {k: asdict(v) for k, v in found.items()}}
    return file if _put(file, content | ({} if pace is None else {"pace": asdict(pace)})) else None
