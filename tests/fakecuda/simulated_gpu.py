"""A simulated GPU in a CPU-only torch. Imported before torch, which asks once whether there are CUDA hooks.

Code under test runs unchanged: device type "cuda", `torch.cuda.Stream` and `Event`, `cudaHostRegister`, autograd's
device thread, Trainer and accelerate. `install` gives `torch.cuda` what a CPU build compiles out; the rest is in
simulator/.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib.util
import os
import sys
import threading
import traceback
import types
from collections import Counter
from pathlib import Path
from typing import Any

if "torch" in sys.modules:
    raise ImportError("import tests.fakecuda.simulated_gpu before torch: it asks once whether there are CUDA hooks")

from tests.fakecuda.build import library

# Its static constructors register the hooks; torch's own libraries, which it needs, are loaded with it.
ctypes.CDLL(str(library()))

import torch  # noqa: E402

_spec = importlib.util.spec_from_file_location("_fakecuda", library())
assert _spec is not None
assert _spec.loader is not None
simulator = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(simulator)

places: Counter[tuple[str, str, str]] = Counter()
"""(kind, what, place) of waits and races, while `watch` is on. Kinds: "race"; "wait in a block", of the thread that
trains while it computes a block; "wait in a grouped product", torch's own, there; "wait", of that thread elsewhere;
"wait in the background", of a thread that moves bytes."""

_OUR_FOLDERS = ("lowmem", "offload")
_CUDA = int(torch._C._autograd.DeviceType.CUDA)
_NOT_SUPPORTED = 801
"""cudaErrorNotSupported."""


class Stream:
    """`torch.cuda.Stream` of a build without CUDA: torch's own generic stream of the device."""

    def __new__(cls, device: object = None, priority: int = 0, **_: object) -> torch.Stream:  # type: ignore[misc]
        return torch.Stream(device="cuda")


class Event:
    """`torch.cuda.Event`, likewise."""

    def __new__(  # type: ignore[misc]
        cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> torch.Event:
        return torch.Event("cuda", enable_timing=enable_timing, blocking=blocking)


class StreamContext:
    """`torch.cuda.stream(...)`."""

    def __init__(self, stream: torch.Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> torch.Stream | None:
        if self.stream is not None:
            self._before = simulator.set_stream_id(self.stream.stream_id)
        return self.stream

    def __exit__(self, *_: object) -> None:
        if self.stream is not None:
            simulator.set_stream_id(self._before)


class _DeviceContext(contextlib.ContextDecorator):
    """`torch.cuda.device(...)`: there is one device."""

    def __init__(self, device: object) -> None:
        self.idx = 0

    def __enter__(self) -> _DeviceContext:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class _Runtime:
    """`torch.cuda.cudart()`. With FAKECUDA_NO_PIN=1 the driver refuses to page-lock, as in some containers."""

    def cudaHostRegister(self, pointer: int, nbytes: int, flags: int) -> int:
        return _NOT_SUPPORTED if os.environ.get("FAKECUDA_NO_PIN") else int(simulator.host_register(pointer, nbytes))

    def cudaHostUnregister(self, pointer: int) -> int:
        return int(simulator.host_unregister(pointer))


def _stream(number: int) -> torch.Stream:
    return torch.Stream(stream_id=number, device_index=0, device_type=_CUDA)


def _memory_stats(device: object = None) -> dict[str, int]:
    return {
        "allocated_bytes.all.current": simulator.allocated_bytes(),
        "allocated_bytes.all.peak": simulator.peak_bytes(),
        "reserved_bytes.all.current": simulator.reserved_bytes(),
        "reserved_bytes.all.peak": simulator.reserved_bytes(),
    }


def _patches(limit: int) -> dict[str, Any]:
    properties = types.SimpleNamespace(
        name="Simulated GPU",
        total_memory=limit,
        major=8,
        minor=9,
        multi_processor_count=128,
        uuid="0",
        is_integrated=False,
        gcnArchName="",
        warp_size=32,
    )
    memory = {
        "memory_allocated": lambda device=None: simulator.allocated_bytes(),
        "max_memory_allocated": lambda device=None: simulator.peak_bytes(),
        "memory_reserved": lambda device=None: simulator.reserved_bytes(),
        "max_memory_reserved": lambda device=None: simulator.reserved_bytes(),
        "reset_peak_memory_stats": lambda device=None: simulator.reset_peak(),
        "memory_stats": _memory_stats,
        "mem_get_info": lambda device=None: (
            # As of the driver: what the allocator has taken is not free, used or not.
            max(0, simulator.limit_bytes() - simulator.reserved_bytes()),
            simulator.limit_bytes(),
        ),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "set_per_process_memory_fraction": lambda fraction, device=None: simulator.set_limit(int(fraction * limit)),
    }
    random = {
        "get_rng_state": lambda device="cuda": simulator.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": simulator.set_rng_state(state),
        "get_rng_state_all": lambda: [simulator.get_rng_state()],
        "set_rng_state_all": lambda states: [simulator.set_rng_state(state) for state in states],
        "manual_seed": lambda seed: simulator.manual_seed(int(seed)),
        "manual_seed_all": lambda seed: simulator.manual_seed(int(seed)),
        "initial_seed": lambda: 0,
    }
    device = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "init": lambda: None,
        "_is_compiled": lambda: True,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda function, **_: function(),
        "_sleep": _sleep,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_name": lambda device=None: properties.name,
        "get_arch_list": lambda: ["sm_89"],
        "can_device_access_peer": lambda a, b: False,
        "is_current_stream_capturing": lambda: False,
        "cudart": _Runtime,
        "device": _DeviceContext,
    }
    streams = {
        "Stream": Stream,
        "Event": Event,
        "stream": StreamContext,
        "StreamContext": StreamContext,
        "current_stream": lambda device=None: _stream(simulator.current_stream_id()),
        "default_stream": lambda device=None: _stream(0),
        "synchronize": lambda device=None: torch._C._accelerator_synchronizeDevice(0),
    }
    return memory | random | device | streams


def install(
    *,
    lag_ms: float = 3.0,
    raise_on_race: bool = False,
    strict_devices: bool = True,
    poison: bool = True,
    limit: int = 8 << 30,
) -> None:
    """Make the simulated GPU torch's CUDA device.

    Args:
        lag_ms: Copies that do not block arrive up to 1.5 times this much late.
        raise_on_race: A race is an error where it is found, instead of a line in `simulator.races()`.
        strict_devices: Operators refuse a mixture of CPU and device tensors, as CUDA's do.
        poison: Fresh and freed memory, and the destination of a late copy, is filled with 0xFF.
        limit: Bytes of device memory.
    """
    simulator.lazy_init()
    simulator.set_options(int(lag_ms * 1e6), raise_on_race, strict_devices, poison)
    simulator.set_limit(limit)
    torch._C._cuda_getDeviceCount = lambda: 1
    torch._C._cuda_getCurrentRawStream = lambda device: simulator.current_stream_id()
    torch.cuda._initialized = True
    patches = _patches(limit)
    for name, value in patches.items():
        setattr(torch.cuda, name, value)
        for module in (torch.cuda.random, torch.cuda.memory, torch.cuda.streams):
            if hasattr(module, name):
                setattr(module, name, value)
    torch.cuda.default_generators = (simulator.default_generator(),)

    def to(self: Any, *, device: torch.device, non_blocking: bool = False) -> torch.UntypedStorage:
        # torch.UntypedStorage(device="cuda") is compiled out.
        whole = torch.empty(0, dtype=torch.uint8, device=self.device).set_(self)
        return whole.to(device, non_blocking=non_blocking).untyped_storage()

    torch.storage._StorageBase.to = to  # type: ignore[method-assign,assignment]


def _sleep(cycles: int) -> None:
    """What is queued behind it is as late, at two billion cycles a second; until the test ends (plugin.py)."""
    set_lag(max(cycles / 2e6, simulator.lag_ns() / 1e6))


def set_lag(lag_ms: float) -> float:
    """Change how late copies arrive; returns what it was, in milliseconds."""
    before_ns: int = simulator.set_lag(int(lag_ms * 1e6))
    return before_ns / 1e6


def told_of(nbytes: int, pointer: int, *, writes: bool, who: str) -> None:
    """Tell the simulator that host code uses host memory, past torch: a read into it, or a write out of it."""
    simulator.host_access(pointer, nbytes, writes, who)


def _place(frames: list[traceback.FrameSummary]) -> str:
    """The innermost of our own frames, else the innermost of anybody's."""
    ours = [
        frame
        for frame in frames
        if "site-packages" not in frame.filename and any(f"/{name}/" in frame.filename for name in _OUR_FOLDERS)
    ]
    if not frames:
        return "autograd's device thread, outside Python"
    frame = (ours or frames)[-1]
    return f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno} {frame.name}"


def _in_grouped_product(frames: list[traceback.FrameSummary]) -> bool:
    """Whether torch multiplies with several experts: where it has no kernel for that, it asks where each one ends."""
    node = torch._C._current_autograd_node()
    if node is not None and "GroupedMm" in node.name():
        return True
    return bool(frames) and frames[-1].name == "grouped_mm" and "site-packages" in frames[-1].filename


def _note(kind: str, what: str) -> None:
    frames = [frame for frame in traceback.extract_stack() if "fakecuda" not in frame.filename]
    if kind == "sync":
        # What is asked before a visit is asked in the same file.
        names = {frame.name for frame in frames if frame.filename.endswith("lowmem/streaming/block.py")}
        in_block = bool(names) and "_prepare_masks" not in names
        moves_bytes = type(threading.current_thread()).__name__ == "WorkerThread"
        kind = "wait in the background" if moves_bytes else "wait in a block" if in_block else "wait"
        if kind == "wait in a block" and _in_grouped_product(frames):
            kind = "wait in a grouped product"
    places[kind, what, _place(frames)] += 1


def watch(on: bool = True) -> None:
    """Note in `places` where the host waits and where races are seen."""
    atexit.register(simulator.set_hook, None)  # no Python from C++ threads once the interpreter ends
    simulator.set_hook(_note if on else None)


def forget() -> None:
    """Forget what was observed so far."""
    simulator.clear()
    places.clear()
