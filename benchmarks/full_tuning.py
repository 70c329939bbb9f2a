"""Training every weight: inside an enforced limit with state on disk, beside training in memory, and the update alone.

    python -m benchmarks.full_tuning memory --root /nvme/checkpoints --disk /nvme/state
    python -m benchmarks.full_tuning memory --masters bf16 --state-dtype 8bit --limit 2GiB --device-budget 1200MiB ...
    python -m benchmarks.full_tuning step   --root /nvme/checkpoints --disk /nvme/state
    python -m benchmarks.full_tuning update

`memory`: the 1.1B checkpoint, AdamW with masters and moments in fp32 on disk, the whole process inside 3 GiB, and its
step against the physical limit at the mean of rates measured before and after. `step`: a 350M shape, state on the
host and on disk and plain transformers and TRL with torch's fused AdamW, one step each in turn. `update`: AdamW on the
host tier's buffers against torch's fused kernel on one flat tensor.
"""

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.full_job import GALORE_RANK, FullJob
from benchmarks.harness import Value, emit, emit_skip, last_json, run_module, sample
from benchmarks.lockstep import LockstepJob
from benchmarks.memory_limit import LimitUnavailable
from benchmarks.raw_disk import best_setting, read_raw, write_raw
from lowmem.full.flat import ParamUpdate, Segment, lay_out_unit
from lowmem.full.tier import MemoryTier, PrivateState
from lowmem.optim.rule import Hyper
from lowmem.optim.state import STATE_DTYPES
from offload.budget import parse_bytes

BENCHMARK = "full_tuning"
NUM_WARMUP = 1
_NUM_PRODUCTS = 50


def memory(arguments: argparse.Namespace) -> None:
    """AdamW inside an enforced limit, against the physical limit."""
    shape = SHAPES[arguments.shape]
    folder = ensure_checkpoint(arguments.shape, root=arguments.root)
    job = FullJob(
        folder=folder,
        mode="disk",
        disk=arguments.disk,
        seq_len=arguments.seq_len,
        num_steps=arguments.steps,
        device_budget=arguments.device_budget,
        optimizer=arguments.optimizer,
        max_grad_norm=0.0 if arguments.update_in_backward else 1.0,
        masters=arguments.masters,
        state_dtype=arguments.state_dtype,
        update_in_backward=arguments.update_in_backward,
    )
    sizes: dict[str, int] = {"seq_len": arguments.seq_len, "hidden": shape.hidden, "mlp": shape.mlp}
    dtype = torch.bfloat16 if arguments.masters == "bf16" else torch.float32
    before = _rates(folder, arguments.disk, dtype=dtype, **sizes)
    case = f"{arguments.shape}-{arguments.optimizer}-{arguments.limit}"
    case += f"-{arguments.masters}-masters" if arguments.masters != "fp32" else ""
    case += f"-{arguments.state_dtype}-moments" if arguments.state_dtype else ""
    case += "-in-backward" if arguments.update_in_backward else ""
    try:
        outcome = run_module(
            "benchmarks.full_job", job.arguments(), limit_bytes=parse_bytes(arguments.limit), echo_errors=True
        )
    except LimitUnavailable as error:
        emit_skip(BENCHMARK, case, str(error))
        return
    after = _rates(folder, arguments.disk, dtype=dtype, **sizes)
    held: dict[str, Value] = {
        "limit_bytes": parse_bytes(arguments.limit),
        "peak_group_bytes": outcome.peak_bytes,
        "peak_rss_bytes": outcome.peak_rss_bytes,
        "num_oom_kills": outcome.num_oom_kills,
    }
    if outcome.returncode != 0:
        emit(BENCHMARK, case, completed=False, failed=f"exit status {outcome.returncode}", memory=held)
        sys.exit(1)
    report = last_json(outcome.output)
    steps = sample(report["step_s"], num_warmup=min(NUM_WARMUP, arguments.steps - 1))  # type: ignore[arg-type]
    rates = {name: (before[name] + after[name]) / 2 for name in before}
    rank = GALORE_RANK if arguments.optimizer == "GaLore" else 0
    moved = moved_bytes(masters=arguments.masters, state_dtype=arguments.state_dtype, rank=rank)
    limit = physical_limit(shape.num_parameters, num_tokens=arguments.seq_len, rates=rates, rank=rank, moved=moved)
    emit(
        BENCHMARK,
        case,
        completed=True,
        num_parameters=shape.num_parameters,
        seq_len=arguments.seq_len,
        memory=held,
        step_s=steps.to_dict(),
        rates_before=before,
        rates_after=after,
        limit_s=limit,
        limit_over_step=limit["step"] / steps.median,
        model_over_step=limit["model"] / steps.median,
        logs=report["logs"],
        lanes_s=report["lanes_s"],
        held=report["memory"],
        plan=report["plan"],
    )


def moved_bytes(*, masters: str = "fp32", state_dtype: str | None = None, rank: int = 0) -> tuple[float, float]:
    """Bytes of each parameter that a step at least reads from disk and writes there.

    In fp32: 16 and 14, and 16 and 8 where the state is in RAM. A weight is read twice and written once, both moments
    once each.

    Args:
        masters: Type of the weights.
        state_dtype: How moments are stored; as the weights, if not given.
        rank: Of an optimizer that projects, with its state in RAM; else 0.
    """
    weight_less = 2 if masters == "bf16" else 0
    if rank:
        return 16 - 2 * weight_less, 8 - weight_less
    # 8 bits and a 256th of an fp32 scale, twice.
    moments_less = {"fp32": 0.0, "bf16": 4.0, "8bit": 6 - 2 * 4 / 256}[state_dtype or masters]
    return 16 - 2 * weight_less - moments_less, 14 - weight_less - moments_less


def physical_limit(
    num_parameters: int, *, num_tokens: int, rates: dict[str, float], moved: tuple[float, float], rank: int = 0
) -> dict[str, float]:
    """Least seconds of a step: recomputation included, state on one disk whose reads and writes add up.

    Args:
        num_parameters: P.
        num_tokens: T, of one step.
        rates: flops_per_s, read_bytes_per_s, write_bytes_per_s.
        moved: Of `moved_bytes`.
        rank: r of an optimizer that projects, with state in RAM: each element of a gradient goes into r products, and
            each of a weight comes from r.
    """
    model = 8.0 * num_parameters * num_tokens / rates["flops_per_s"]
    projection = 4.0 * num_parameters * rank / rates["flops_per_s"]
    disk = num_parameters * (moved[0] / rates["read_bytes_per_s"] + moved[1] / rates["write_bytes_per_s"])
    step = max(model + projection, disk)
    return {"model": model, "projection": projection, "disk": disk, "step": step}


def _rates(folder: Path, disk: Path, *, seq_len: int, hidden: int, mlp: int, dtype: torch.dtype) -> dict[str, float]:
    files = sorted(folder.glob("*.safetensors"))
    setting = best_setting(files, max_bytes=256 << 20)
    return {
        "flops_per_s": _flops(seq_len, hidden, mlp, dtype),
        "read_bytes_per_s": read_raw(files, setting, max_bytes=1 << 30).bytes_per_s,
        "write_bytes_per_s": write_raw(disk, setting, nbytes=1 << 30).bytes_per_s,
    }


def _flops(num_tokens: int, hidden: int, mlp: int, dtype: torch.dtype) -> float:
    """Of the product that a block does most of: its MLP's."""
    left, right = torch.randn(num_tokens, hidden).to(dtype), torch.randn(mlp, hidden).to(dtype)
    into = torch.empty(num_tokens, mlp, dtype=dtype)
    seconds = _median_s(lambda: torch.mm(left, right.T, out=into), num_repeats=_NUM_PRODUCTS)
    return 2.0 * num_tokens * hidden * mlp / seconds


def _median_s(work: Callable[[], object], *, num_repeats: int) -> float:
    times = []
    for _ in range(num_repeats + 2):
        start_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times[2:])


def step(arguments: argparse.Namespace) -> None:
    """State on the host and on disk beside plain training in memory, one step each in turn."""
    shape = arguments.shape if arguments.shape != "1.1b" else "350m"
    folder = ensure_checkpoint(shape, root=arguments.root)
    jobs = {
        mode: FullJob(
            folder=folder,
            mode=mode,
            disk=arguments.disk if mode == "disk" else None,
            seq_len=arguments.seq_len if arguments.seq_len != 512 else 256,
            accumulation=arguments.accumulation,
            num_steps=arguments.steps,
            device_budget=arguments.device_budget,
        )
        for mode in ("plain", "host", "disk")
        if arguments.mode in (None, mode)
    }
    step_s: dict[str, list[float]] = {mode: [] for mode in jobs}
    with contextlib.ExitStack() as stack:
        children = {
            mode: stack.enter_context(LockstepJob(job, module="benchmarks.full_job")) for mode, job in jobs.items()
        }
        for _ in range(arguments.steps):
            for mode, child in children.items():
                step_s[mode].append(child.step())
        reports = {mode: child.finish() for mode, child in children.items()}
    samples = {mode: sample(values, num_warmup=NUM_WARMUP) for mode, values in step_s.items()}
    case = f"{shape}-{next(iter(jobs.values())).seq_len}tokens-accumulation{arguments.accumulation}"
    for mode, found in samples.items():
        emit(
            BENCHMARK,
            f"{case}-{mode}",
            step_s=found.to_dict(),
            logs=reports[mode]["logs"],
            peak_rss_bytes=reports[mode]["peak_rss_bytes"],
            lanes_s=reports[mode].get("lanes_s"),
            device_budget=arguments.device_budget if mode == "disk" else None,
        )
    if "plain" in samples:
        ratios: dict[str, Value] = {
            f"{mode}_over_plain": found.median / samples["plain"].median
            for mode, found in samples.items()
            if mode != "plain"
        }
        emit(BENCHMARK, f"{case}-ratio", num_parameters=SHAPES[shape].num_parameters, **ratios)


def update(arguments: argparse.Namespace) -> None:
    """The host tier's update of every block against torch's fused kernel on one flat tensor."""
    shape = SHAPES["350m" if arguments.shape == "1.1b" else arguments.shape]
    layouts = [
        lay_out_unit(f"block {layer}", [(name, torch.Size(size)) for name, size in shape.layer_tensors(layer)])
        for layer in range(shape.num_layers)
    ]
    numel = sum(layout.numel for layout in layouts)
    tier = MemoryTier(layouts, live={}, memory=PrivateState(layouts))
    hyper = Hyper(lr=1e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, clock=9)
    flat = [torch.zeros(numel).uniform_(-1, 1) for _ in range(4)]
    flat[3].abs_()

    def fill(_: int, weight: torch.Tensor) -> None:
        weight.uniform_(-1, 1)

    tier.fill(len(layouts), fill)

    def one_flat() -> None:
        torch._fused_adamw_(
            [flat[0]], [flat[1]], [flat[2]], [flat[3]], [], [torch.tensor(9.0)], lr=1e-5, beta1=0.9, beta2=0.999,
            weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    def tiered(scales: tuple[float, ...]) -> None:
        change = ParamUpdate(hyper=hyper, step=10, scales=scales)
        for index, layout in enumerate(layouts):
            tier.update(index, [Segment(start=0, stop=layout.numel, update=change)], None)

    seconds: dict[str, list[float]] = {"one flat tensor": [], "host tier": [], "host tier, clipped": []}
    works: tuple[Callable[[], None], ...] = (one_flat, lambda: tiered(()), lambda: tiered((0.5,)))
    for _ in range(arguments.steps + 1):
        # In turn: what changes on the machine changes all of them alike.
        for name, work in zip(seconds, works, strict=True):
            start_s = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start_s)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    emit(
        BENCHMARK,
        "update",
        numel=numel,
        params_per_s={name: numel / median for name, median in medians.items()},
        over_one_flat={name: median / medians["one flat tensor"] for name, median in medians.items()},
    )


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "step", "update"))
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "lowmem-checkpoints")
    parser.add_argument("--disk", type=Path, default=Path(tempfile.gettempdir()) / "lowmem-full-state")
    parser.add_argument("--shape", choices=SHAPES, default="1.1b", help="350m where not `memory`")
    parser.add_argument("--seq-len", type=int, default=512, help="256 for `step`")
    parser.add_argument("--steps", type=int, default=4, help=f"the first {NUM_WARMUP} of them for warm-up")
    parser.add_argument("--accumulation", type=int, default=2, help="of `step`")
    parser.add_argument("--limit", default="3GiB", help="of `memory`")
    parser.add_argument("--device-budget", default="2100MiB", help="for state on disk")
    parser.add_argument("--optimizer", default="AdamW", help="of `memory`: AdamW or GaLore")
    parser.add_argument("--masters", choices=("fp32", "bf16"), default="fp32", help="of `memory`: the weights' type")
    parser.add_argument("--state-dtype", choices=STATE_DTYPES, help="of `memory`: how AdamW's moments are stored")
    parser.add_argument(
        "--update-in-backward", action="store_true", help="of `memory`: no clipping, no gradients on disk"
    )
    parser.add_argument("--mode", choices=("plain", "host", "disk"), help="of `step`: this one alone")
    arguments = parser.parse_args()
    arguments.disk.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=arguments.disk))
    arguments.disk = folder
    try:
        {"memory": memory, "step": step, "update": update}[arguments.what](arguments)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
