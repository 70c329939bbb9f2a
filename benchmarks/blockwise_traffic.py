"""What a blockwise optimizer writes of gradients, with weights on disk: bytes and visits per step, and the weights.

    python -m benchmarks.blockwise_traffic FOLDER --state DIR [--optimizer BAdam] [--num-steps 3] [--switch-every 1]

FOLDER is a checkpoint (`python -m benchmarks.checkpoints 1.1b`). The digests of equal weights are equal, so that two
commits can be compared. A step visits each of L blocks once forward, and
backward those from the last one down to the lowest that is trained, L - lowest of them; both are counted beside that
number. Prints one JSON line; exits with 1 where a count is another one.
"""

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

import lowmem
from lowmem.streaming.runtime import runtime_of
from offload import Span


def trained_blocks(model: PreTrainedModel) -> list[int]:
    """Numbers of the blocks whose weights take a gradient in the coming step."""
    runtime = runtime_of(model)
    return [index for index in range(runtime.num_blocks) if runtime.trained_weights(index)]


def computed_visits(num_blocks: int, trained: Sequence[int], *, embedding: bool) -> dict[str, int]:
    """Visits of one step by phase: below the lowest block that is trained, none needs a gradient or a backward.

    Args:
        num_blocks: Of the model.
        trained: Numbers of those that are trained.
        embedding: Whether the embedding below all of them is trained too.
    """
    lowest = 0 if embedding else min(trained, default=num_blocks)
    return {"no_grad": lowest, "forward": num_blocks - lowest, "backward": num_blocks - lowest}


def counted_visits(spans: Iterable[Span]) -> dict[str, int]:
    """Visits by phase, of what a trace holds."""
    phases = Counter(span.name.partition(" ")[0] for span in spans if span.lane == "compute")
    return {phase: phases[phase] for phase in ("no_grad", "forward", "backward")}


def run(
    folder: Path,
    state: Path,
    *,
    optimizer: str,
    num_steps: int,
    num_tokens: int,
    budget: int | str,
    switch_every: int | None,
    switch_mode: str,
) -> dict[str, object]:
    """Train some steps on random tokens.

    Args:
        folder: The checkpoint.
        state: Folder for masters, moments and gradients.
        optimizer: Name in `lowmem.optim`.
        num_steps: How many.
        num_tokens: Of the one sequence of each step.
        budget: Of the device, as in `lowmem.Budget`.
        switch_every: Steps per block, of BAdam; its own default if None.
        switch_mode: In which order, of BAdam.
    """
    plan = lowmem.plan(
        folder,
        seq_len=num_tokens,
        tuning="full",
        budget=lowmem.Budget(device=budget, host="0", disk=state),
        device="cpu",
    )
    assert plan.choice.state_tier == "disk", plan
    model = lowmem.from_pretrained(folder, tuning="full", plan=plan, device="cpu")
    runtime = runtime_of(model)
    options = {} if switch_every is None else {"switch_block_every": switch_every, "switch_mode": switch_mode}
    trained = getattr(lowmem.optim, optimizer)(model, lr=1e-4, seed=0, **options)
    if optimizer != "AdamW":
        # Its own lies beside the weights anyway.
        lowmem.full.state_on_disk(trained)
    steps: list[dict[str, object]] = []
    for number in range(num_steps):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(model.config.vocab_size, (1, num_tokens), generator=generator)
        blocks = trained_blocks(model)
        computed = computed_visits(
            runtime.num_blocks, blocks, embedding=model.get_input_embeddings().weight.requires_grad
        )
        begun, begun_ns = time.monotonic(), time.perf_counter_ns()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        trained.step()
        trained.zero_grad()
        spans = runtime.trace.spans(begun_ns)
        writes = [span for span in spans if "write" in span.lane and span.name.endswith("gradient")]
        steps.append(
            {
                "loss": loss.item(),
                "gradient_bytes_written": sum(span.nbytes for span in writes),
                "trained_blocks": blocks,
                "visits": counted_visits(spans),
                "computed_visits": computed,
                "seconds": round(time.monotonic() - begun, 1),
            }
        )
    lanes = {span.lane for span in runtime.trace.spans()}
    digest = hashlib.sha256()
    for name, param in sorted(model.named_parameters()):
        digest.update(name.encode() + param.detach().clone().contiguous().view(-1).numpy().tobytes())
    runtime.close()
    return {"optimizer": optimizer, "steps": steps, "weights": digest.hexdigest(), "lanes": sorted(lanes)}


def main() -> None:
    """Print the JSON line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blockwise_traffic", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--optimizer", choices=("BAdam", "LISA", "AdamW"), default="BAdam")
    parser.add_argument("--num-steps", type=int, default=3)
    parser.add_argument("--num-tokens", type=int, default=16)
    parser.add_argument("--budget", default="2100MiB")
    parser.add_argument("--switch-every", type=int)
    parser.add_argument("--switch-mode", choices=("random", "ascending", "descending"), default="random")
    given = parser.parse_args()
    torch.manual_seed(0)
    found = run(**vars(given))
    print(json.dumps(found))
    steps = found["steps"]
    assert isinstance(steps, list)
    if any(step["visits"] != step["computed_visits"] for step in steps):
        sys.exit(1)


if __name__ == "__main__":
    main()
