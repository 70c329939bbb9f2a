"""What a blockwise optimizer writes of gradients, with weights on disk: bytes and visits per step, and the weights.

    python -m benchmarks.blockwise_traffic FOLDER --state DIR [--optimizer BAdam] [--num-steps 3]

FOLDER is a checkpoint (`python -m benchmarks.checkpoints 1.1b`). Runs whichever lowmem is on the path, so that two
commits can be compared: the digests of equal weights are equal. Prints one JSON line.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import torch

import lowmem
from lowmem.streaming.runtime import runtime_of


def run(
    folder: Path, state: Path, *, optimizer: str, num_steps: int, num_tokens: int, budget: str
) -> dict[str, object]:
    """Train some steps on random tokens.

    Args:
        folder: The checkpoint.
        state: Folder for masters, moments and gradients.
        optimizer: Name in `lowmem.optim`.
        num_steps: How many.
        num_tokens: Of the one sequence of each step.
        budget: Of the device, as in `lowmem.Budget`.
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
    trained = getattr(lowmem.optim, optimizer)(model, lr=1e-4, seed=0)
    steps: list[dict[str, float]] = []
    for number in range(num_steps):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(model.config.vocab_size, (1, num_tokens), generator=generator)
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
    given = parser.parse_args()
    torch.manual_seed(0)
    print(json.dumps(run(**vars(given))))


if __name__ == "__main__":
    main()
