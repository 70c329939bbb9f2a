"""SFT, then DPO, then GRPO, one adapter carried through all three, on a model that does not fit.

    python examples/two_stage.py --model Qwen/Qwen3-8B --data my-data --device 6GiB --host 8GiB
    python -m examples.small_inputs && python examples/two_stage.py --model small/model --data small

--data: a folder with sft.jsonl ({"prompt", "completion"}), preferences.jsonl ({"prompt", "chosen", "rejected"}) and
questions.jsonl ({"prompt", "answer"}). The adapter is DoRA with rank-stabilised scaling. In DPO the adapter as SFT left
it is the reference. After each stage the share of questions that are answered exactly is printed, answered greedily.
"""

import argparse
import os
from pathlib import Path

import lowmem
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer


def exact_match(completions: list[list[dict[str, str]]], answer: list[str], **columns: object) -> list[float]:
    """1 where the completion is the answer."""
    return [float(said[0]["content"].strip() == right) for said, right in zip(completions, answer, strict=True)]


IS_FIRST = os.environ.get("RANK", "0") == "0"
"""Of the processes that torchrun or accelerate started: rank 0 says what all of them do."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="local folder or hub id")
    parser.add_argument("--data", type=Path, required=True, help="folder with the three JSONL files")
    parser.add_argument("--output", type=Path, default=Path("out-two-stage"), help="folder for the adapters")
    parser.add_argument("--device", help='device memory to use (on a CPU: RAM), such as "6GiB"; measured if not given')
    parser.add_argument("--host", help='RAM for cached weights; "0" caches none; measured if not given')
    parser.add_argument("--steps", type=int, nargs=3, default=(25, 8, 15), help="of SFT, DPO and GRPO")
    parser.add_argument("--learning-rates", type=float, nargs=3, default=(3e-3, 1e-4, 5e-4))
    parser.add_argument("--batch-size", type=int, default=8, help="examples, pairs; completions are four times as many")
    parser.add_argument("--seq-len", type=int, default=64, help="of the longest example")
    parser.add_argument("--completion-tokens", type=int, default=16)
    return parser.parse_args()


def exact_share(model: PeftModel, tokenizer: PreTrainedTokenizerBase, questions: Dataset, *, num_tokens: int) -> float:
    """Share of questions whose greedy answer is the right one; all of them in one batch."""
    prompts = [
        tokenizer.apply_chat_template(row, tokenize=False, add_generation_prompt=True) for row in questions["prompt"]
    ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    model.eval()
    answers = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
    texts = tokenizer.batch_decode(answers[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [bool(text.strip() == answer) for text, answer in zip(texts, questions["answer"], strict=True)]
    return sum(right) / len(right)


def main() -> None:
    options = parse()
    lora = LoraConfig(
        r=16, lora_alpha=16, use_dora=True, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    plan = lowmem.plan(  # the stage that takes most
        options.model,
        task="grpo",
        batch_size=4 * options.batch_size,
        seq_len=options.seq_len,
        completion_tokens=options.completion_tokens,
        peft_config=lora,
        budget=lowmem.Budget(device=options.device, host=options.host),
    )
    if IS_FIRST:
        print(plan)
    model = lowmem.from_pretrained(options.model, plan=plan)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = {
        name: load_dataset("json", data_files=str(options.data / f"{name}.jsonl"), split="train")
        for name in ("sft", "preferences", "questions")
    }
    on_gpu = torch.cuda.is_available()
    stages = (
        ("sft", SFTTrainer, SFTConfig, "sft", {"max_length": options.seq_len}),
        ("dpo", DPOTrainer, DPOConfig, "preferences", {"max_length": options.seq_len}),
        ("grpo", GRPOTrainer, GRPOConfig, "questions", {"max_completion_length": options.completion_tokens}),
    )
    for (stage, trainer_class, config_class, name, settings), steps, learning_rate in zip(
        stages, options.steps, options.learning_rates, strict=True
    ):
        arguments = config_class(
            str(options.output / stage),
            max_steps=steps,
            learning_rate=learning_rate,
            per_device_train_batch_size=options.batch_size * (4 if stage == "grpo" else 1),
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            bf16=on_gpu,  # TRL's default is bf16 autocast, a hundred times slower on a CPU without bf16 instructions
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            report_to="none",
            **settings,
        )
        extra = {"reward_funcs": exact_match} if stage == "grpo" else {"peft_config": lora} if stage == "sft" else {}
        trainer = trainer_class(
            model,
            args=arguments,
            train_dataset=data[name],
            processing_class=tokenizer,
            callbacks=[lowmem.Monitor()],
            **extra,
        )
        trainer.train()
        model = trainer.model  # with the adapter, which the next stage goes on with
        if "ref" in model.peft_config:
            model.delete_adapter("ref")  # DPO's copy of what the adapter was before
        if IS_FIRST:
            model.save_pretrained(str(options.output / stage))
        share = exact_share(model, tokenizer, data["questions"], num_tokens=options.completion_tokens)
        if IS_FIRST:
            print(f"after {stage}: {share:.0%} of {len(data['questions'])} questions answered exactly", flush=True)


if __name__ == "__main__":
    main()
