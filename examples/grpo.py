"""Reinforcement learning on a model that does not fit: LoRA through TRL's own GRPOTrainer, weights streamed from disk.

    python examples/grpo.py --model Qwen/Qwen3-8B --data my-questions.jsonl --device 6GiB --host 8GiB
    python -m examples.small_inputs                         # a small model and data, offline; then for instance:
    python examples/sft.py --model small/model --data small/sft.jsonl --output sft --max-steps 25 --learning-rate 5e-3
    python examples/grpo.py --model small/model --data small/questions.jsonl --adapter sft --learning-rate 1e-3

--data: a JSONL file or a hub data set with {"prompt", "answer"}. Each generated token is one pass over the streamed
weights for the whole batch, so make the batch large and completions no longer than they have to be.
"""

import argparse
import os
import statistics
import sys
from pathlib import Path

import lowmem
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


def exact_match(completions: list[list[dict[str, str]]], answer: list[str], **columns: object) -> list[float]:
    """1 where the completion is the answer."""
    return [float(said[0]["content"].strip() == right) for said, right in zip(completions, answer, strict=True)]


def is_a_sentence(completions: list[list[dict[str, str]]], **columns: object) -> list[float]:
    """0.1 where the completion has the form of one sentence, right or wrong."""
    texts = [said[0]["content"].strip() for said in completions]
    return [0.1 * (text[:1].isupper() and text.endswith(".") and text.count(".") == 1) for text in texts]


IS_FIRST = os.environ.get("RANK", "0") == "0"
"""Of the processes that torchrun or accelerate started: rank 0 says what all of them do."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="local folder or hub id")
    parser.add_argument("--data", required=True, help="JSONL file or hub data set")
    parser.add_argument("--output", default="out-grpo", help="folder for the adapter, checkpoints, trace and timeline")
    parser.add_argument("--adapter", help="folder of a LoRA adapter to go on with")
    budget = parser.add_argument_group("budget", 'sizes such as "900MiB" or "2.4GiB"; measured where not given')
    budget.add_argument("--device", help="device memory to use (on a CPU: RAM)")
    budget.add_argument("--host", help='RAM for cached weights; "0" caches none')
    parser.add_argument("--batch-size", type=int, default=64, help="completions per step")
    parser.add_argument("--num-generations", type=int, default=8, help="completions per prompt")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of the longest prompt, for the plan")
    parser.add_argument("--completion-tokens", type=int, default=24)
    parser.add_argument("--max-steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--beta", type=float, default=0.0, help="how strongly to stay near the model without adapter")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA adapters on all linear layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plan-only", action="store_true", help="print what would run where, and stop")
    return parser.parse_args()


def load_rows(data: str) -> Dataset:
    return load_dataset("json", data_files=data, split="train") if Path(data).is_file() else load_dataset(data)["train"]


def main() -> None:
    options = parse()
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    plan = lowmem.plan(
        options.model,
        task="grpo",
        batch_size=options.batch_size,
        seq_len=options.prompt_tokens + options.completion_tokens,
        completion_tokens=options.completion_tokens,
        use_reference=options.beta > 0,
        peft_config=lora,
        budget=lowmem.Budget(device=options.device, host=options.host),
    )
    if IS_FIRST:
        print(plan)
    if not plan.fits or options.plan_only:
        sys.exit(int(not plan.fits))  # the plan says what to change
    model = lowmem.from_pretrained(options.model, plan=plan)
    if options.adapter:
        model = PeftModel.from_pretrained(model, options.adapter, is_trainable=True)
    on_gpu = torch.cuda.is_available()
    arguments = GRPOConfig(
        options.output,
        beta=options.beta,
        per_device_train_batch_size=options.batch_size,
        num_generations=options.num_generations,
        max_completion_length=options.completion_tokens,
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        bf16=on_gpu,  # TRL's default is bf16 autocast, a hundred times slower on a CPU without bf16 instructions
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        report_to="none",
        seed=options.seed,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[exact_match, is_a_sentence],
        args=arguments,
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
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    few = max(1, len(rewards) // 5)
    print(f"mean reward: {statistics.fmean(rewards[:few]):.3f} -> {statistics.fmean(rewards[-few:]):.3f}")
    print(f"adapter: {options.output}")


if __name__ == "__main__":
    main()
