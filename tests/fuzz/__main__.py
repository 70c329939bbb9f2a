"""Run fuzzers: python -m tests.fuzz checkpoints adapters ... --num 1000 --seed 7 --jobs 2."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

# Before anything of Hugging Face is imported: no hub, and no threads, because workers are forked.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="critical",
    MPLBACKEND="Agg",
    # Its own allocator takes a gigabyte at once, as much as a case may.
    ARROW_DEFAULT_MEMORY_POOL="system",
)

import torch

from tests.fuzz.targets import QUICK, TARGETS
from tests.fuzz.workers import Report, Target, in_child, run_cases


def _quiet() -> None:
    """Other libraries' progress and warnings say nothing here; an error is what counts."""
    from transformers.utils import logging as theirs

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    theirs.disable_progress_bar()
    torch.set_num_threads(1)


def fuzz(
    name: str, target: Target, seeds: range | list[int], *, jobs: int, folder: Path, minutes: float | None
) -> Report:
    """Run one fuzzer and say how it goes."""
    prepared = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir=folder))
    base = prepared / "base"
    base.mkdir()
    begun = time.monotonic()
    in_child(partial(target.prepare, base))
    report, said = Report(name), begun
    until = None if minutes is None else begun + 60 * minutes
    try:
        for result in run_cases(target, seeds, prepared=base, jobs=jobs, until=until):
            report.add(result)
            report.seconds = time.monotonic() - begun
            if time.monotonic() - said > 60:
                said = time.monotonic()
                print(report.text(with_traces=False), flush=True)
    finally:
        shutil.rmtree(prepared, ignore_errors=True)
    return report


def main() -> int:
    """Exit code 1 where there are faults."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="+", choices=[*TARGETS, "all"])
    parser.add_argument("--num", type=int, default=1000, help="cases of each fuzzer")
    parser.add_argument("--quick", action="store_true", help="a few seconds of each instead")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; each case has the next one")
    parser.add_argument("--only", type=int, nargs="+", help="run the cases of these seeds alone")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--minutes", type=float, help="begin no case after so many minutes of each fuzzer")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where damaged copies lie")
    parser.add_argument("--report", type=Path, help="folder for one JSON file of each fuzzer, with all faults")
    given = parser.parse_args()
    _quiet()
    names = list(TARGETS) if "all" in given.targets else given.targets
    num_faults = 0
    for name in names:
        target, num = QUICK[name] if given.quick else (TARGETS[name], given.num)
        seeds = given.only or range(given.seed, given.seed + num)
        report = fuzz(name, target, seeds, jobs=given.jobs, folder=given.folder, minutes=given.minutes)
        print(report.text(), flush=True)
        if given.report is not None:
            given.report.mkdir(parents=True, exist_ok=True)
            report.save(given.report / f"{name}.json")
        num_faults += len(report.faults)
    return int(num_faults > 0)


if __name__ == "__main__":
    sys.exit(main())
