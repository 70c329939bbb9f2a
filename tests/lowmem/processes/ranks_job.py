"""Many runs in one pair of processes: python -m torch.distributed.run ... -m tests.lowmem.processes.ranks_job FOLDER.

FOLDER has the models and `cases.json`, a list of what to run; each rank writes `NAME.rankR.pt` for each case: what the
steps logged, the adapter, and what else the case asks for. Importing takes longer than all of the runs.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback
from trl import GRPOTrainer

import lowmem
from lowmem.streaming.runtime import is_streamed, runtime_of
from offload import BlockServer, BudgetError, OffloadError, lay_out
from offload.sharing.server import PATIENCE_S
from tests.lowmem.tiny_trainers import loaders, make, records, rows_for
from tests.lowmem.tiny_training import NUM_WORDS, texts
from tests.offload.kernel_counts import mapped_bytes, storage_bytes
from tests.zoo.streamed import streamed as all_streamed

T = TypeVar("T")


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One case in this process, alone or among others."""
    if "opens" in case:
        rank = int(os.environ["RANK"])
        return {"refused": _refused(folder / case["opens"][rank], **case.get("settings", [{}] * (rank + 1))[rank])}
    if "smallest" in case:
        return _smallest(folder / case["model"], tuning=case["smallest"])
    task, dies = case["task"], case.get("dies", {})
    _die(dies, "before", folder)
    resident, streamed = loaders(task)
    open_model = all_streamed if case.get("tight") else streamed if case.get("streamed", True) else resident
    model = open_model(folder / case["model"])
    _die(dies, "after", folder)
    options, output = dict(case.get("options", {})), folder / case.get("output", case["name"])
    if "num_evaluated" in case:
        options |= {"eval_dataset": texts(case["num_evaluated"]), "eval_strategy": "steps", "eval_steps": 2}
    if "num_rows" in case:
        options["train_dataset"] = rows_for(task, case["num_rows"])
    reads = StorageReads()
    options["callbacks"] = [reads, _Dies(dies, folder)]
    if case.get("same_for_any_ranks") and task == "kto":
        options["train_dataset"] = _alternating(options["train_dataset"])
    trainer = make(task, model, output, adapter=case.get("adapter"), **options)
    if case.get("same_for_any_ranks") and task in ("grpo", "rloo"):
        _give_completions(trainer)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trainer.train(resume_from_checkpoint=case.get("resume"))
    found: dict[str, Any] = {
        "records": records(trainer),
        "adapter": adapter_of(trainer),
        "evaluated": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "is_wrapped": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "files": sorted(file.name for file in output.rglob("*") if file.is_file()),
        "storage_bytes": reads.nbytes,
    }
    if is_streamed(trainer.model):
        runtime = runtime_of(trainer.model)
        found["read_bytes"], found["plan"] = runtime.scheduler.counters.bytes_read, str(runtime.plan)
        found["block_bytes"] = [lay_out(streamed.spec).buffer_bytes for streamed in runtime.blocks]
        found["mapped"] = _together(lambda: mapped_bytes("lowmem-blocks"))
    if case.get("generates"):
        inputs = torch.arange(12).view(2, 6) + int(os.environ.get("RANK", "0"))
        trainer.model.eval()
        found["generated"] = trainer.model.generate(inputs, max_new_tokens=5 + inputs[0, 0].item(), do_sample=False)
    return found


def _be_patient(patient: bool) -> None:
    """Where reads are counted, have ranks wait for each other longer than a busy machine keeps one from running.

    They are in step there; elsewhere one that does less than the others is soon not waited for.
    """
    BlockServer.__init__.__kwdefaults__["patience_s"] = (60.0, 120.0) if patient else PATIENCE_S


def _die(dies: dict[str, Any], when: str, folder: Path) -> None:
    """End this process without a word, if it is to be it and now."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if dies.get("when") == when and dies["rank"] == int(os.environ["RANK"]) and attempt == dies.get("attempt", attempt):
        (folder / "killed.txt").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)


class _Dies(TrainerCallback):
    """Ends this process in the third step, if it is to be it."""

    def __init__(self, dies: dict[str, Any], folder: Path) -> None:
        self._dies, self._folder = dies, folder

    def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.global_step == 2:  # type: ignore[attr-defined]
            _die(self._dies, "training", self._folder)


def _refused(folder: Path, **settings: Any) -> str:
    """What opening a folder raises."""
    try:
        lowmem.from_pretrained(folder, budget=lowmem.Budget(device="64MiB", host="0"), device="cpu", **settings)
    except (OSError, ValueError, OffloadError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _smallest(folder: Path, *, tuning: Any) -> dict[str, Any]:
    """The smallest budget that a refusal states, and what opening says with one byte less, and with that."""
    found: dict[str, Any] = {"needed": 1024, "said": []}
    for less in (0, 1, 0):
        budget = lowmem.Budget(device=found["needed"] - less, host="0" if tuning == "adapter" else "64MiB")
        try:
            lowmem.from_pretrained(folder, budget=budget, tuning=tuning, device="cpu")
            found["said"].append("")
        except BudgetError as error:
            found["needed"] = error.needed_bytes
            found["said"].append(str(error))
    return found


class StorageReads(TrainerCallback):
    """What the kernel brought this process from storage, from the end of the first step to that of the last."""

    def __init__(self) -> None:
        self._before: int | None = None
        self.nbytes = 0

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        now = storage_bytes()
        self._before = now if self._before is None else self._before
        self.nbytes = now - self._before


def _together(measure: Callable[[], T]) -> T:
    """Measure while no rank has gone on or is still on its way."""
    several = torch.distributed.is_initialized()
    if several:
        torch.distributed.barrier()
    found = measure()
    if several:
        torch.distributed.barrier()
    return found


def _give_completions(trainer: Trainer) -> None:
    """Have completions that go by a sequence's place in the batch of all ranks, in the place of samples."""
    calls, rank = itertools.count(), trainer.accelerator.process_index

    def completions(prompt_ids: list[list[int]], *others: object) -> object:
        call, found = next(calls), []
        for index in range(len(prompt_ids)):
            chance = random.Random(1000 * call + rank * len(prompt_ids) + index)
            found.append([chance.randrange(NUM_WORDS) for _ in range(chance.randint(2, 6))])
        return (found, None) if isinstance(trainer, GRPOTrainer) else found

    trainer._generate_single_turn = completions  # type: ignore[attr-defined]


def _alternating(rows: Dataset) -> Dataset:
    """Judged completions, two in turn for eight rows: whoever goes round in two, four or eight of them has the same.

    TRL's KTOTrainer pairs each prompt with the completion before it within a process's batch, for its baseline.
    """
    completions = list(rows["completion"])
    return rows.map(
        lambda row, index: {"completion": completions[index // 8 * 8 + index % 2], "label": index % 3 == 0},
        with_indices=True,
    )


def adapter_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What trains, by name."""
    return {name: param.detach().clone() for name, param in trainer.model.named_parameters() if param.requires_grad}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for case in json.loads((folder / "cases.json").read_text()):
        _be_patient(case.get("tight", False))
        torch.save(run(case, folder), folder / f"{case['name']}.rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
