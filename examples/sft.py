"""Supervised fine-tuning of a model that does not fit: LoRA through TRL's own SFTTrainer, weights streamed from disk.

    python examples/sft.py --model Qwen/Qwen3-8B --data my.jsonl --output out --device 6GiB --host 8GiB

--model: a local folder or a hub id, with .safetensors. --data: a JSONL file or a hub data set in one of TRL's formats:
{"text"}, {"messages"}, {"prompt", "completion"}; or with the columns of Alpaca: {"instruction", "input", "output"}. Run
it again with --resume to go on after an interruption, from the last checkpoint in --output or from one by its name.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

import lowmem
import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from datasets.exceptions import DatasetsError
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerState
from trl import SFTConfig, SFTTrainer

IS_FIRST = os.environ.get("RANK", "0") == "0"
"""Of the processes that torchrun or accelerate started: rank 0 says what all of them do."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="local folder or hub id")
    parser.add_argument("--data", required=True, help="JSONL file or hub data set")
    parser.add_argument("--output", default="out", help="folder for the adapter, checkpoints, trace and timeline")
    budget = parser.add_argument_group("budget", 'sizes such as "900MiB" or "2.4GiB"; measured where not given')
    budget.add_argument("--device", help="device memory to use (on a CPU: RAM)")
    budget.add_argument("--host", help='RAM for cached weights; "0" caches none')
    budget.add_argument("--disk", help="folder for what must be written")
    parser.add_argument(
        "--batch-size", type=int, default=4, help="sequences per step: they share the weights' transfer"
    )
    parser.add_argument("--seq-len", type=int, default=512, help="longer examples are cut")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after so many steps, whatever --epochs says")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA adapters on all linear layers")
    parser.add_argument("--save-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help="go on from this one; without a name, from the last one in --output",
    )
    parser.add_argument("--plan-only", action="store_true", help="print what would run where, and stop")
    return parser.parse_args()


def last_checkpoint(output: str) -> str | None:
    """The newest one that was written to its end: its state comes last."""
    found = [file.parent for file in Path(output).glob("checkpoint-*/trainer_state.json")]
    return str(max(found, key=lambda folder: int(folder.name.rpartition("-")[2]))) if found else None


def is_finished(checkpoint: str, options: argparse.Namespace) -> bool:
    """Whether a checkpoint is that of the last step: resumed there, the Trainer would take one more."""
    try:
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    except (OSError, ValueError, TypeError):
        return False  # not whole: the Trainer, asked to resume it, says what is wrong
    if options.max_steps > 0:
        return bool(state.global_step >= options.max_steps)
    return state.epoch is not None and bool(state.epoch >= options.epochs)


FORMATS = ({"text"}, {"messages"}, {"conversations"}, {"prompt", "completion"}, {"input_ids"})
"""Columns that TRL's SFTTrainer takes."""


def load_rows(data: str) -> Dataset:
    if Path(data).is_file():
        try:
            rows = load_dataset("json", data_files=data, split="train")
        except (DatasetsError, StopIteration, ValueError) as error:
            sys.exit(f"--data {data}: {what_is_wrong(data) or error.__cause__ or error}")
    elif Path(data).suffix in (".jsonl", ".json"):
        sys.exit(f"--data {data}: no such file")
    else:
        rows = load_dataset(data, split="train")
    found = set(rows.column_names)
    if {"instruction", "output"} <= found:
        return rows.map(chat_of, remove_columns=rows.column_names)
    if not any(columns <= found for columns in FORMATS):
        expected = "; ".join(" and ".join(sorted(columns)) for columns in FORMATS)
        sys.exit(
            f"--data {data}: its columns are {', '.join(sorted(found))}; expected one of: {expected}; "
            "instruction and output"
        )
    return rows


def what_is_wrong(data: str) -> str | None:
    """The first line of a JSONL file that is no row; None if all are."""
    num_rows = 0
    with Path(data).open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            num_rows += 1
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                return f"line {number} is not JSON ({error.msg}, character {error.pos + 1}): {line.strip()[:60]}"
            if not isinstance(row, dict):
                return f"line {number} is not an object with columns: {line.strip()[:60]}"
    return None if num_rows else "the file is empty; expected one JSON object on each line"


def chat_of(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """A row with Alpaca's columns as a prompt and its completion."""
    question = "\n\n".join(filter(None, [row["instruction"], row.get("input")]))
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


def how_to_merge(model: str, adapter: str) -> str:
    return f"merge it: lowmem merge {model} --adapter {adapter} --output merged"


def where_it_stopped(options: argparse.Namespace) -> str:
    last = last_checkpoint(options.output)
    if last:
        return f"stopped; {last}: run it again with --resume"
    return (
        "stopped before the first checkpoint, and nothing of the training is kept: the next run starts anew; "
        f"one is saved every {options.save_steps} steps (--save-steps)"
    )


def main() -> None:
    options = parse()
    last = None
    if options.resume:
        last = last_checkpoint(options.output) if options.resume is True else options.resume
        if not last or not Path(last).is_dir():
            where = f"in {options.output}" if options.resume is True else options.resume
            sys.exit(f"--resume: no checkpoint {where}; leave it out, or give the --output of the run to go on with")
        if is_finished(last, options):
            if IS_FIRST:
                print(f"nothing is left to train: {last} has all steps; for more, raise --epochs or --max-steps")
                print(f"adapter: {last}\n{how_to_merge(options.model, last)}")
            return
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    plan = lowmem.plan(
        options.model,
        task="sft",
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        peft_config=lora,
        budget=lowmem.Budget(device=options.device, host=options.host, disk=options.disk),
    )
    if IS_FIRST:
        print(plan)
    if not (IS_FIRST and sys.stderr.isatty()):
        disable_progress_bars()  # in a log file, plain lines
    if not plan.fits:
        sys.exit(1)  # the plan says what to change
    if options.plan_only:
        return
    rows = load_rows(options.data)
    trainer = SFTTrainer(
        model=lowmem.from_pretrained(options.model, plan=plan),
        args=SFTConfig(
            options.output,
            per_device_train_batch_size=options.batch_size,
            max_length=options.seq_len,
            num_train_epochs=options.epochs,
            max_steps=options.max_steps,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            save_steps=options.save_steps,
            logging_steps=1,
            # TRL's default is bf16 autocast, a hundred times slower on a CPU that has no bf16 instructions.
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=not sys.stderr.isatty(),
            seed=options.seed,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=lora,
        callbacks=[lowmem.Monitor()],
    )
    try:
        trainer.train(resume_from_checkpoint=last)
    except KeyboardInterrupt:
        sys.exit(where_it_stopped(options) if IS_FIRST else 1)
    trainer.save_model(options.output)
    trainer.save_state()  # the loss curve, in trainer_state.json
    if IS_FIRST:
        print(f"adapter: {options.output}\n{how_to_merge(options.model, options.output)}")


if __name__ == "__main__":
    # TRL 1.16 still uses transformers' old names of an option.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped outside of training; nothing is lost that was saved")
