"""Every weight trained by groups of ranks: python -m tests.lowmem.processes.full_ranks_job FOLDER.

FOLDER has the models and `groups.json`: how many ranks, on how many machines (which this one stands for), and what they
run. Each rank writes `NAME.rankR.pt` for each case. All are forked from this process, which has imported everything and
started nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

import lowmem
import lowmem.api  # what opening and training import lazily: once, not in each rank
import lowmem.generation.hooks
from lowmem.streaming.runtime import runtime_of
from tests.lowmem.full_training import batches, sft_trainer, weights
from tests.lowmem.processes.forked_ranks import fork_ranks
from tests.lowmem.tiny_trainers import records


def open_model(folder: Path, case: dict[str, Any]) -> Any:
    """The model of a case: with what is measured, or with state in the tier that it names."""
    model = folder / case["model"]
    if "budget" in case:
        budget = lowmem.Budget(**case["budget"])
        return lowmem.from_pretrained(model, tuning="full", budget=budget, device="cpu")
    return lowmem.from_pretrained(model, tuning="full", device="cpu")


def train(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """TRL's SFTTrainer, with its own optimizer or ours."""
    model = open_model(folder, case)
    output = folder / case.get("output", case["name"])
    optimizer = lowmem.optim.AdamW(model, **case["optimizer"]) if "optimizer" in case else None
    trainer = sft_trainer(model, output, optimizer=optimizer, **case["options"])
    trainer.train(resume_from_checkpoint=case.get("resume"))
    runtime = runtime_of(model)
    return {
        "records": records(trainer),
        "weights": weights(model),
        "is_wrapped": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "plan": str(runtime.plan),
        "files": sorted(file.name for file in output.rglob("*") if file.is_file()),
        "memory": runtime.full.tier.memory(),
    }


def by_hand(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A loop of one's own without DDP around the blocks: gradients, and what may be done to them and to weights."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    model = open_model(folder, case)
    params = dict(model.named_parameters())
    inside = {name: param for name, param in params.items() if ".layers." in name}
    found: dict[str, Any] = {}
    optimizer = torch.optim.SGD(inside.values(), lr=0.1)
    for number, ids in enumerate(batches(2)):
        own = ids.chunk(size)[rank] if size > 1 else ids
        model(input_ids=own, labels=own).loss.backward()
        found[f"gradients {number}"] = {name: param.grad.clone() for name, param in inside.items()}
    found["norm"] = torch.nn.utils.clip_grad_norm_(inside.values(), 0.01)
    optimizer.step()
    found["after a step"] = weights(model)
    optimizer.zero_grad(set_to_none=False)
    found["cleared"] = max(float(param.grad.abs().max()) for param in inside.values())
    with torch.no_grad():
        for param in inside.values():
            param.mul_(0.5)
    found["halved"] = weights(model)
    model.load_state_dict({name: value + 1 for name, value in found["after a step"].items()})
    found["set"] = weights(model)
    if size > 1:
        first = next(iter(inside.values()))
        found["refused"] = [
            _refusal(lambda: first.grad.add_(1)),
            _refusal(lambda: setattr(first, "grad", torch.ones_like(first))),
            _refusal(lambda: lowmem.optim.GaLore(model, lr=1e-3)),
            _refusal(lambda: lowmem.optim.AdamW(model, lr=1e-3, state_dtype="8bit")),
        ]
    return found


def blocks_alone(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A loop of one's own that trains the blocks: three steps of two batches, clipped; without DDP, on any device."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    budget = lowmem.Budget(device="64MiB", host="128MiB")
    job: dict[str, Any] = {"tuning": "full", "seq_len": 12, "batch_size": 2, "micro_batch": 2, "device": case["device"]}
    plan = lowmem.plan(folder / case["model"], budget=budget, **job)
    plan = replace(plan, choice=replace(plan.choice, update_share=case.get("share", 0.0)))
    model = lowmem.from_pretrained(folder / case["model"], tuning="full", plan=plan).train()
    inside = [param for name, param in model.named_parameters() if ".layers." in name]
    optimizer = lowmem.optim.AdamW(inside, **case["optimizer"])
    found: dict[str, Any] = {"norms": []}
    for number, ids in enumerate(batches(6)):
        own = (ids.chunk(size)[rank] if size > 1 else ids).to(model.device)
        (model(input_ids=own, labels=own).loss / 2).backward()
        if number % 2:
            found["norms"].append(float(torch.nn.utils.clip_grad_norm_(inside, 0.3)))
            optimizer.step()
            optimizer.zero_grad()
    return {**found, "weights": {name: value.cpu() for name, value in weights(model).items()}}


def own_weights_in_the_loss(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A loss that has a block's weight itself, in which ranks differ too."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    model = open_model(folder, case)
    weight = model.model.layers[0].mlp.up_proj.weight
    factors = [1.0, 3.0][rank : rank + 1] if size > 1 else [1.0, 3.0]
    loss = sum((factor * weight).square().sum() for factor in factors) / len(factors)
    loss.backward()
    return {"gradient": weight.grad.clone()}


KINDS: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "train": train,
    "by hand": by_hand,
    "own weights": own_weights_in_the_loss,
    "blocks": blocks_alone,
}


def _refusal(run: Callable[[], object]) -> str:
    try:
        run()
    except lowmem.UnsupportedError as error:
        return str(error)
    return "it was not refused"


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One case in this process, alone or among others."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return KINDS[case.get("kind", "train")](case, folder)


def run_rank(group: dict[str, Any], folder: Path, rank: int, port: int) -> None:
    """All cases of a group, in a process of its own."""
    size, nodes = group["ranks"], group.get("nodes", 1)
    local = size // nodes
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank % local), "LOCAL_WORLD_SIZE": str(local), "GROUP_RANK": str(rank // local)}
    torch.set_num_threads(1)
    for case in group["cases"]:
        torch.save(run(case, folder), folder / f"{case['name']}.rank{rank}.pt")


def main() -> None:
    folder = Path(sys.argv[1])
    for group in json.loads((folder / "groups.json").read_text()):
        fork_ranks(group["ranks"], partial(run_rank, group, folder))
    print("finished", flush=True)


if __name__ == "__main__":
    main()
