"""Many runs in one pair of processes: python -m torch.distributed.run ... -m tests.lowmem.processes.ranks_job FOLDER.

FOLDER has the models and `cases.json`, a list of what to run; each rank writes `NAME.rankR.pt` for each case: what the
steps logged, the adapter, and what else the case asks for. Importing takes longer than all of the runs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

import lowmem
from lowmem.streaming.runtime import is_streamed, runtime_of
from tests.lowmem.tiny_trainers import loaders, make, records
from tests.lowmem.tiny_training import texts
from tests.zoo.streamed import streamed as all_streamed


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One case in this process, alone or among others."""
    resident, streamed = loaders(case["task"])
    open_model = all_streamed if case.get("tight") else streamed if case.get("streamed", True) else resident
    model = open_model(folder / case["model"])
    if "budget" in case:
        model = lowmem.from_pretrained(folder / case["model"], budget=lowmem.Budget(**case["budget"]), device="cpu")
    options = dict(case.get("options", {}))
    if "num_evaluated" in case:
        options |= {"eval_dataset": texts(case["num_evaluated"]), "eval_strategy": "steps", "eval_steps": 2}
    output = folder / case.get("output", case["name"])
    trainer = make(case["task"], model, output, adapter=case.get("adapter"), **options)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trainer.train(resume_from_checkpoint=case.get("resume"))
    found: dict[str, Any] = {
        "records": records(trainer),
        "adapter": adapter_of(trainer),
        "evaluated": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "is_wrapped": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "files": sorted(file.name for file in output.rglob("*") if file.is_file()),
    }
    if is_streamed(trainer.model):
        runtime = runtime_of(trainer.model)
        found["read_bytes"], found["plan"] = runtime.scheduler.counters.bytes_read, str(runtime.plan)
    if case.get("generates"):
        inputs = torch.arange(12).view(2, 6) + int(os.environ.get("RANK", "0"))
        trainer.model.eval()
        found["generated"] = trainer.model.generate(inputs, max_new_tokens=5 + inputs[0, 0].item(), do_sample=False)
    return found


def adapter_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What trains, by name."""
    return {name: param.detach().clone() for name, param in trainer.model.named_parameters() if param.requires_grad}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for case in json.loads((folder / "cases.json").read_text()):
        torch.save(run(case, folder), folder / f"{case['name']}.rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
