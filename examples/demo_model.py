"""What the demo trains on, made on the spot: a Llama of random weights, a tokenizer trained on the data, and the data.

The blocks are random and stay frozen. They are a mild perturbation of the residual stream (scaled by width and depth),
so adapters have something to steer: the loss falls within a few steps, as it does on a trained model.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

Message = dict[str, str]
Row = dict[str, list[Message]]

SEED = 0
_LAYERS_PER_SHARD = 4
_VOCAB = 1024
_SPECIAL = ("<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_OPPOSITES = (
    "hot cold, big small, fast slow, up down, light dark, open closed, early late, wet dry, full empty, near far"
)
_COLOURS = "sky blue, grass green, snow white, coal black, sun yellow, tomato red, carrot orange, plum purple"
_SOUNDS = "dog barks, cat meows, cow moos, duck quacks, lion roars, bee buzzes, snake hisses, wolf howls"
_HOMES = "bird nest, bee hive, spider web, rabbit burrow, bear cave, horse stable, fish water, fox den"
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven")


@dataclass(frozen=True, kw_only=True)
class DemoShape:
    """Sizes of the demo's model."""

    hidden: int = 1024
    num_layers: int = 16
    mlp: int = 2816
    num_heads: int = 16
    num_kv_heads: int = 4
    head_std: float = 0.02
    """Of the head's weights: large enough for confident answers, which takes more the narrower a model is."""


def make_rows(num_rows: int, *, seed: int = SEED) -> list[Row]:
    """Questions and answers in TRL's conversational prompt-completion format."""
    pick = random.Random(seed)
    pairs = [*_question_answer_pairs()]
    return [_row(*pick.choice(pairs)) for _ in range(num_rows)]


def make_tokenizer(rows: Sequence[Row], *, vocab: int = _VOCAB) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the rows, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[*_SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (message["content"] for row in rows for part in row.values() for message in part)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def write_rows(file: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(folder: Path, tokenizer: PreTrainedTokenizerFast, *, shape: DemoShape) -> int:
    """Write config, tokenizer and bf16 safetensors shards; the bytes of the shards.

    Memory: one shard at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=shape.hidden,
        num_hidden_layers=shape.num_layers,
        intermediate_size=shape.mlp,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.save_pretrained(str(folder))
    return _write_shards(folder, shape, vocab=len(tokenizer))


def _write_shards(folder: Path, shape: DemoShape, *, vocab: int) -> int:
    generator = torch.Generator().manual_seed(SEED)
    layers = range(shape.num_layers)
    groups = [layers[i : i + _LAYERS_PER_SHARD] for i in range(0, shape.num_layers, _LAYERS_PER_SHARD)]
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, group in enumerate(groups, start=1):
        tensors = {
            name: tensor for layer in group for name, tensor in _layer_tensors(layer, shape, generator=generator)
        }
        if number == 1:
            tensors["model.embed_tokens.weight"] = _normal((vocab, shape.hidden), std=1.0, generator=generator)
        if number == len(groups):
            tensors["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16)
            tensors["lm_head.weight"] = _normal((vocab, shape.hidden), std=shape.head_std, generator=generator)
        file = folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return total_bytes


def _layer_tensors(layer: int, shape: DemoShape, *, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    prefix = f"model.layers.{layer}"
    kv = shape.hidden // shape.num_heads * shape.num_kv_heads
    sizes = {
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "mlp.gate_proj": (shape.mlp, shape.hidden),
        "mlp.up_proj": (shape.mlp, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.mlp),
    }
    for name, size in sizes.items():
        std = size[1] ** -0.5
        if name.endswith(("o_proj", "down_proj")):
            std *= (2 * shape.num_layers) ** -0.5  # what is added to the residual stream
        yield f"{prefix}.{name}.weight", _normal(size, std=std, generator=generator)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{name}.weight", torch.ones(shape.hidden, dtype=torch.bfloat16)


def _normal(size: tuple[int, int], *, std: float, generator: torch.Generator) -> torch.Tensor:
    return torch.empty(size).normal_(0, std, generator=generator).bfloat16()


def _question_answer_pairs() -> Iterator[tuple[str, str]]:
    for first, second in _pairs(_OPPOSITES):
        yield f"What is the opposite of {first}?", f"The opposite of {first} is {second}."
        yield f"What is the opposite of {second}?", f"The opposite of {second} is {first}."
    for thing, colour in _pairs(_COLOURS):
        yield f"What colour is the {thing}?", f"The {thing} is {colour}."
    for animal, sound in _pairs(_SOUNDS):
        yield f"What sound does a {animal} make?", f"A {animal} {sound}."
    for animal, home in _pairs(_HOMES):
        yield f"Where does a {animal} live?", f"The home of a {animal} is the {home}."
    for number, following in pairwise(_NUMBERS):
        yield f"Which number comes after {number}?", f"After {number} comes {following}."


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for pair in text.split(", "):
        first, second = pair.split()
        yield first, second


def _row(question: str, answer: str) -> Row:
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }
