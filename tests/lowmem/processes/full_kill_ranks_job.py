"""`kill_ranks_job` with every weight trained: the same arguments."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import lowmem
from lowmem.monitoring.resume_checks import newest_complete
from tests.lowmem.full_training import sft_trainer
from tests.lowmem.processes import kill_ranks_job


def train(folder: Path, output: Path, say: int) -> None:
    """As `kill_ranks_job.train`."""
    torch.set_num_threads(1)
    # The first to get there saves: both must have seen the same checkpoint before.
    checkpoint = newest_complete(output, is_adapter=False)
    model = lowmem.from_pretrained(folder, tuning="full", device="cpu")
    done = sft_trainer(
        model,
        output,
        optimizer=lowmem.optim.AdamW(model, lr=3e-3, weight_decay=0.1),
        max_steps=kill_ranks_job.NUM_STEPS,
        save_strategy="steps",
        save_steps=1,
        per_device_train_batch_size=2,
    )
    done.add_callback(kill_ranks_job._Say(say))
    done.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    done.save_model(str(output / "final"))


if __name__ == "__main__":
    kill_ranks_job.train = train
    # Nothing of this goes there.
    (Path(sys.argv[2]) / "scratch").mkdir()
    kill_ranks_job.main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
