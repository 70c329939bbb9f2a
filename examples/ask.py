"""Ask a model that does not fit, with and without an adapter: streamed generation, all questions in one batch.

    python examples/ask.py --model Qwen/Qwen3-8B --adapter out --device 6GiB "Why is the sky blue?"

Weights come from disk once per token for all questions together. To serve a model, merge it and use an engine for that.
"""

import argparse
import json
from collections.abc import Sequence

import lowmem
import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--model", required=True, help="local folder or hub id")
    parser.add_argument("--adapter", help="folder of a trained adapter")
    parser.add_argument("--device", help='device memory to use, "6GiB" for instance (on a CPU: RAM)')
    parser.add_argument("--host", help='RAM for cached weights; "0" caches none')
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--json", help="write the answers to this file too")
    return parser.parse_args()


def answers(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], *, num_tokens: int
) -> list[str]:
    """The most likely answer to each question, of at most so many tokens."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    with lowmem.TokenBar(model):
        output = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)  # type: ignore[operator]
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def main() -> None:
    options = parse()
    budget = lowmem.Budget(device=options.device, host=options.host)
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    model = lowmem.from_pretrained(options.model, budget=budget)
    found = {"model": answers(model, tokenizer, options.questions, num_tokens=options.tokens)}
    if options.adapter:
        adapted = PeftModel.from_pretrained(model, options.adapter)
        found["adapter"] = answers(adapted, tokenizer, options.questions, num_tokens=options.tokens)
    for number, question in enumerate(options.questions):
        print(f"> {question}")
        for name, texts in found.items():
            print(f"{name + ':':9}{texts[number]}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"questions": options.questions, **found}, file, indent=1)


if __name__ == "__main__":
    main()
