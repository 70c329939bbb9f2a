"""What a GPU's allocator holds at most in a few steps, simulated, is within what the plan says, and 3% more."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

import lowmem
from lowmem.loading import prepare_device
from lowmem.streaming.runtime import runtime_of
from tests.zoo.architectures import build

pytestmark = pytest.mark.gpu
ROOM = 1.03


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job that is planned and run."""

    arch: str = "llama"
    tuning: str = "adapter"
    batch_size: int = 32
    seq_len: int = 16
    """Short: without a fused kernel, as in the simulator, attention holds scores that a GPU does not."""
    device: str = "64MiB"
    """The budget; "least" for the smallest that works."""
    disk: bool = False
    dtype: str = "float32"
    masters: str | None = None
    state_dtype: str | None = None
    optimizer: str | None = None
    chunk_tokens: int | None = None
    micro_batch: int | None = None
    dora: bool = False
    vocab: int = 32
    """With many words the head takes the most."""

    def __str__(self) -> str:
        changed = {name: value for name, value in vars(self).items() if value != getattr(Job, name)}
        return "-".join(f"{name}={value}" for name, value in changed.items()) or "default"


QUICK = [
    Job(),
    Job(dtype="bfloat16", device="least", disk=True),
    Job(tuning="full"),
    Job(tuning="full", masters="bf16"),
    Job(tuning="full", masters="bf16", vocab=32768),
]
SLOW = [
    Job(device="least"),
    Job(tuning="full", device="least", disk=True),
    Job(batch_size=128, device="least"),
    Job(batch_size=128, micro_batch=16),
    Job(batch_size=16, seq_len=32),
    Job(batch_size=16, seq_len=32, chunk_tokens=8),
    Job(batch_size=16, seq_len=32, chunk_tokens=8, device="least", disk=True),
    Job(batch_size=128, dtype="bfloat16"),
    Job(batch_size=128, dtype="bfloat16", micro_batch=32, device="least"),
    Job(arch="qwen3"),
    Job(arch="qwen3", device="least", dtype="bfloat16"),
    Job(arch="gemma3_text"),
    Job(arch="gemma3_text", device="least"),
    Job(dora=True),
    Job(dora=True, device="least", batch_size=64),
    Job(tuning="full", batch_size=128),
    Job(tuning="full", batch_size=128, micro_batch=16, device="least"),
    Job(tuning="full", arch="qwen3", device="least"),
    Job(tuning="full", arch="gemma3_text", disk=True),
    Job(tuning="full", masters="bf16", device="least", disk=True),
    Job(tuning="full", masters="bf16", state_dtype="8bit"),
    Job(tuning="full", state_dtype="bf16", device="least"),
    Job(tuning="full", optimizer="galore"),
    Job(tuning="full", optimizer="galore", batch_size=8, device="least"),
    Job(vocab=8192),
    Job(vocab=8192, dtype="bfloat16"),
    Job(tuning="full", vocab=8192),
    Job(tuning="full", masters="bf16", vocab=32768, device="least"),
]
JOBS = [*QUICK, *(pytest.param(job, marks=pytest.mark.slow) for job in SLOW)]
assert len(JOBS) >= 24


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("peaks")


def checkpoint(arch: str, vocab: int, root: Path) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 640, "head_dim": 64, "vocab_size": vocab}
    sizes |= {"max_position_embeddings": 512, "num_hidden_layers": 4}
    folder = root / f"{arch}-{vocab}"
    return folder if folder.exists() else Path(build(arch, folder, changes=sizes, shard_bytes=4 << 20))


def planned(job: Job, folder: Path, scratch: Path) -> lowmem.Plan:
    adapter = LoraConfig(r=8, target_modules="all-linear", use_dora=job.dora, task_type="CAUSAL_LM")
    options: dict[str, Any] = {"batch_size": job.batch_size, "seq_len": job.seq_len, "tuning": job.tuning}
    options |= {"chunk_tokens": job.chunk_tokens, "micro_batch": job.micro_batch, "device": "cuda"}
    options |= {"peft_config": adapter} if job.tuning == "adapter" else {"masters": job.masters, "optimizer": made(job)}
    options |= {"dtype": job.dtype} if job.tuning == "adapter" else {}
    room: dict[str, Any] = {"host": "24MiB" if job.disk else "256MiB", "disk": scratch if job.disk else None}
    plan = lowmem.plan(folder, budget=lowmem.Budget(device="256MiB", **room), **options)
    if job.device == "least":
        plan = lowmem.plan(folder, budget=lowmem.Budget(device=plan.smallest_device_bytes, **room), **options)
    assert plan.fits, plan
    return plan


def made(job: Job) -> Any:
    """The optimizer of every weight, without its model."""
    if job.optimizer == "galore":
        return partial(lowmem.optim.GaLore, rank=32, projector="svd", update_proj_gap=2)
    return partial(lowmem.optim.AdamW, writer="stochastic", state_dtype=job.state_dtype)


def run(job: Job, plan: lowmem.Plan, folder: Path) -> None:
    model: PreTrainedModel = lowmem.from_pretrained(folder, plan=plan, tuning=job.tuning).train()  # type: ignore[arg-type]
    # As TRL's trainers do, for which it is planned: no logits of whole batches.
    add_fused_lm_head(model)
    optimizer: torch.optim.Optimizer
    if job.tuning == "full":
        optimizer = made(job)(model, lr=1e-4)
        trained: Any = model
    else:
        adapter = LoraConfig(r=8, target_modules="all-linear", use_dora=job.dora, task_type="CAUSAL_LM")
        trained = get_peft_model(model, adapter).train()
        optimizer = torch.optim.AdamW([param for param in trained.parameters() if param.requires_grad], fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        ids = torch.randint(3, 32, (job.batch_size, job.seq_len), generator=generator).cuda()
        trained(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    runtime_of(model).close()


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_the_allocators_peak_is_within_the_plan(job: Job, root: Path, tmp_path: Path) -> None:
    folder = checkpoint(job.arch, job.vocab, root)
    plan = planned(job, folder, tmp_path)
    # cuBLAS' workspaces are the process's.
    prepare_device(torch.device("cuda"), None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(job, plan, folder)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= ROOM * plan.device_bytes, f"{peak / plan.device_bytes:.3f} of the plan's {plan.device_bytes} bytes"
