"""Preference tuning of a model that does not fit: LoRA through TRL's own DPOTrainer, weights streamed from disk.

    python examples/dpo.py --model Qwen/Qwen3-8B --data trl-lib/ultrafeedback_binarized --device 6GiB --host 8GiB
    python -m examples.small_inputs                         # a small model and data, offline; then for instance:
    python examples/dpo.py --model small/model --data small/preferences.jsonl --learning-rate 1e-3 --max-steps 15

--data: a JSONL file or a hub data set with {"prompt", "chosen", "rejected"}. The reference is the model without its
adapter; it is computed in the same visits of the blocks as the policy. --adapter goes on with one that was trained
before (examples/sft.py, say), which is then the reference.
"""

import argparse
import os
import sys
from pathlib import Path

import lowmem
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

IS_FIRST = os.environ.get("RANK", "0") == "0"
"""Of the processes that torchrun or accelerate started: rank 0 says what all of them do."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="local folder or hub id")
    parser.add_argument("--data", required=True, help="JSONL file or hub data set")
    parser.add_argument("--output", default="out-dpo", help="folder for the adapter, checkpoints, trace and timeline")
    parser.add_argument("--adapter", help="folder of a LoRA adapter to go on with")
    budget = parser.add_argument_group("budget", 'sizes such as "900MiB" or "2.4GiB"; measured where not given')
    budget.add_argument("--device", help="device memory to use (on a CPU: RAM)")
    budget.add_argument("--host", help='RAM for cached weights; "0" caches none')
    parser.add_argument("--batch-size", type=int, default=8, help="pairs per step: they share the weights' transfer")
    parser.add_argument("--seq-len", type=int, default=512, help="longer pairs are cut")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps, whatever --epochs says")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--beta", type=float, default=0.1, help="how strongly to stay near the reference")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA adapters on all linear layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plan-only", action="store_true", help="print what would run where, and stop")
    return parser.parse_args()


def load_rows(data: str) -> Dataset:
    if Path(data).is_file():
        return load_dataset("json", data_files=data, split="train")
    return load_dataset(data, split="train")


def main() -> None:
    options = parse()
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    plan = lowmem.plan(
        options.model,
        task="dpo",
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        peft_config=lora,
        budget=lowmem.Budget(device=options.device, host=options.host),
    )
    if IS_FIRST:
        print(plan)
    if not plan.fits:
        sys.exit(1)  # the plan says what to change
    if options.plan_only:
        return
    model = lowmem.from_pretrained(options.model, plan=plan)
    if options.adapter:
        model = PeftModel.from_pretrained(model, options.adapter, is_trainable=True)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            options.output,
            beta=options.beta,
            per_device_train_batch_size=options.batch_size,
            max_length=options.seq_len,
            num_train_epochs=options.epochs,
            max_steps=options.max_steps,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            logging_steps=1,
            # TRL's default is bf16 autocast, a hundred times slower on a CPU that has no bf16 instructions.
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            seed=options.seed,
        ),
        train_dataset=load_rows(options.data),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=None if options.adapter else lora,
        callbacks=[lowmem.Monitor()],
    )
    trainer.train()
    trainer.save_model(options.output)
    trainer.save_state()
    if not IS_FIRST:
        return
    steps = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    for name in ("loss", "rewards/accuracies", "rewards/margins"):
        print(f"{name}: {steps[0][name]:.3f} -> {steps[-1][name]:.3f}")
    print(f"adapter: {options.output}")


if __name__ == "__main__":
    main()
