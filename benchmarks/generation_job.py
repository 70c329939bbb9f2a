"""One model that generates at several batch sizes, measured: what benchmarks.generation runs in child processes.

Prints one JSON object at the end. Between generations it reads the checkpoint's own files plainly, for what the disk
delivers at that time.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteriaList

import lowmem
from benchmarks.memory_limit import peak_rss_bytes
from benchmarks.raw_disk import Setting, best_setting, read_raw
from benchmarks.sft_job import disk_read_bytes

Mode = Literal["streamed", "resident"]
_RAW_BYTES = 2 << 30
_CALIBRATION_BYTES = 256 << 20
# After its last token the scheduler still fills its ring; it must be done before the disk is measured alone.
_SETTLE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class GenerationJob:
    """What to generate and how."""

    folder: Path
    """The checkpoint."""
    mode: Mode = "streamed"
    batch_sizes: str = "1,8,32"
    """Numbers of sequences, separated by commas."""
    num_prompt_tokens: int = 16
    num_new_tokens: int = 12
    device_budget: str = "1100MiB"
    """For "streamed": a size, or "smallest" for the least that works, which streams everything."""
    seed: int = 0

    def arguments(self) -> list[str]:
        """The command line that makes this job again."""
        return [str(word) for name, value in asdict(self).items() for word in (f"--{name.replace('_', '-')}", value)]

    @property
    def batches(self) -> list[int]:
        """Numbers of sequences."""
        return [int(size) for size in self.batch_sizes.split(",")]


def run(job: GenerationJob) -> dict[str, object]:
    """Load, generate at each batch size, and report."""
    model, plan = load(job)
    files = sorted(job.folder.glob("*.safetensors"))
    setting = best_setting(files, max_bytes=_CALIBRATION_BYTES) if job.mode == "streamed" else None
    raw_bytes_per_s = [raw_rate(files, setting)]
    generations: list[dict[str, object]] = []
    for batch_size in job.batches:
        generations.append(generate(model, job, batch_size=batch_size))
        time.sleep(_SETTLE_S if setting else 0)
        raw_bytes_per_s.append(raw_rate(files, setting))
    return {
        "generations": generations,
        "raw_bytes_per_s": [rate for rate in raw_bytes_per_s if rate is not None],
        "raw_setting": None if setting is None else vars(setting),
        "peak_rss_bytes": peak_rss_bytes(os.getpid()),
        "plan": None if plan is None else plan.to_dict(),
    }


def load(job: GenerationJob) -> tuple[PreTrainedModel, lowmem.Plan | None]:
    """The model, with the plan of a streamed one, made for the largest batch."""
    if job.mode == "resident":
        return AutoModelForCausalLM.from_pretrained(job.folder, dtype=torch.float32), None
    plan = make_plan(job, device_budget=job.device_budget)
    return lowmem.from_pretrained(str(job.folder), plan=plan), plan


def make_plan(job: GenerationJob, *, device_budget: str | int) -> lowmem.Plan:
    """The plan in a budget, or in the smallest one."""
    if device_budget == "smallest":
        device_budget = make_plan(job, device_budget="0").smallest_device_bytes
    return lowmem.plan(
        str(job.folder),
        task="generate",
        batch_size=max(job.batches),
        seq_len=job.num_prompt_tokens + job.num_new_tokens,
        completion_tokens=job.num_new_tokens,
        budget=lowmem.Budget(device=device_budget, host="0"),
    )


def raw_rate(files: list[Path], setting: Setting | None) -> float | None:
    """Bytes per second of plain reads; None where nothing is streamed."""
    return None if setting is None else read_raw(files, setting, max_bytes=_RAW_BYTES).bytes_per_s


def generate(model: PreTrainedModel, job: GenerationJob, *, batch_size: int) -> dict[str, object]:
    """Generate greedily from random prompts, no sequence ending early."""
    generator = torch.Generator().manual_seed(job.seed)
    prompts = torch.randint(3, model.config.vocab_size, (batch_size, job.num_prompt_tokens), generator=generator)
    marks: list[tuple[float, int | None]] = []

    def note(ids: torch.Tensor, scores: torch.Tensor) -> bool:
        marks.append((time.perf_counter(), disk_read_bytes()))
        return False

    # Called by `generate` after every token.
    criteria = StoppingCriteriaList([note])
    start_s = time.perf_counter()
    answer = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=job.num_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=criteria,
    )
    times_s, read = zip(*marks, strict=True)
    token_s = [after - before for before, after in pairwise(times_s)]
    read_bytes = [after - before for before, after in pairwise(read) if after is not None]
    return {
        "batch_size": batch_size,
        "prompt_s": times_s[0] - start_s,
        "token_s": token_s,
        # Whole passes, not single ones: reads run ahead from one into the next.
        "read_bytes_per_token": statistics.fmean(read_bytes),
        "tokens": answer[:, job.num_prompt_tokens :].tolist(),
    }


def parse(arguments: list[str] | None = None) -> GenerationJob:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--mode", choices=get_args(Mode), default=GenerationJob.mode)
    for name in ("num-prompt-tokens", "num-new-tokens", "seed"):
        parser.add_argument(f"--{name}", type=int, default=getattr(GenerationJob, name.replace("-", "_")))
    for name in ("batch-sizes", "device-budget"):
        parser.add_argument(f"--{name}", default=getattr(GenerationJob, name.replace("-", "_")))
    return GenerationJob(**vars(parser.parse_args(arguments)))


def main() -> None:
    print(json.dumps(run(parse())), flush=True)


if __name__ == "__main__":
    main()
