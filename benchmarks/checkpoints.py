"""Synthetic Llamas and mixtures of experts, written tensor by tensor: any size in a few hundred MiB of memory.

    python -m benchmarks.checkpoints 1.1b --root /nvme/checkpoints [--dtype float32]

Values are normal with standard deviation 0.02 (norms are one), from a fixed seed; 32 million of them are tiled, since
neither memory nor time depends on them.
"""

import argparse
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

SEED = 0
STD = 0.02
_POOL_NUMEL = 1 << 25
_SHARD_BYTES = 1 << 30
_STORED_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_HEADER_ALIGNMENT_BYTES = 8
# A prime, so that no two tensors of a checkpoint start at the same place of the pool.
_STRIDE = 104_729


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """Sizes of a Llama: those of its config, with an untied head."""

    hidden: int
    num_layers: int
    mlp: int
    num_heads: int
    num_kv_heads: int
    vocab: int = 32_000
    max_positions: int = 4096

    def layer_tensors(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of one layer's tensors, as transformers names them."""
        prefix = f"model.layers.{layer}"
        kv = self.hidden // self.num_heads * self.num_kv_heads
        for name, rows in (("q", self.hidden), ("k", kv), ("v", kv), ("o", self.hidden)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, self.hidden)
        for name in ("gate", "up"):
            yield f"{prefix}.mlp.{name}_proj.weight", (self.mlp, self.hidden)
        yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.mlp)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (self.hidden,)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """All tensors, in the order in which they are stored."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.num_layers):
            yield from self.layer_tensors(layer)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def config(self) -> dict[str, object]:
        """What config.json says of the architecture."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.num_layers,
            "intermediate_size": self.mlp,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        }

    @property
    def num_parameters(self) -> int:
        return sum(_numel(shape) for _, shape in self.tensors())

    @property
    def num_block_parameters(self) -> int:
        return self.num_layers * sum(_numel(shape) for _, shape in self.layer_tensors(0))


@dataclass(frozen=True, kw_only=True)
class ExpertsShape(LlamaShape):
    """Sizes of a Qwen3 mixture of experts, each of them `mlp` wide."""

    num_experts: int
    num_chosen: int
    """Experts that a token goes to."""

    def layer_tensors(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        prefix = f"model.layers.{layer}"
        for name, shape in super().layer_tensors(layer):
            if ".mlp." not in name:
                yield name, shape
        for name in ("q_norm", "k_norm"):
            yield f"{prefix}.self_attn.{name}.weight", (self.hidden // self.num_heads,)
        yield f"{prefix}.mlp.gate.weight", (self.num_experts, self.hidden)
        for expert in range(self.num_experts):
            for name in ("gate", "up"):
                yield f"{prefix}.mlp.experts.{expert}.{name}_proj.weight", (self.mlp, self.hidden)
            yield f"{prefix}.mlp.experts.{expert}.down_proj.weight", (self.hidden, self.mlp)

    def config(self) -> dict[str, object]:
        return super().config() | {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "head_dim": self.hidden // self.num_heads,
            "moe_intermediate_size": self.mlp,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_chosen,
        }


SHAPES: dict[str, LlamaShape] = {
    "tiny": LlamaShape(hidden=64, num_layers=3, mlp=176, num_heads=4, num_kv_heads=2, vocab=512),
    "budgets": LlamaShape(
        hidden=256, num_layers=4, mlp=704, num_heads=8, num_kv_heads=4, vocab=2_000, max_positions=8192
    ),
    "plan-medium": LlamaShape(
        hidden=512, num_layers=8, mlp=1408, num_heads=8, num_kv_heads=2, vocab=8_000, max_positions=8192
    ),
    "plan-wide": LlamaShape(
        hidden=1024, num_layers=6, mlp=2816, num_heads=16, num_kv_heads=4, vocab=16_000, max_positions=8192
    ),
    "long-32k": LlamaShape(hidden=512, num_layers=8, mlp=1408, num_heads=8, num_kv_heads=2, max_positions=1 << 17),
    "long-128k": LlamaShape(
        hidden=512, num_layers=8, mlp=1408, num_heads=8, num_kv_heads=2, vocab=128_000, max_positions=1 << 17
    ),
    "long-narrow": LlamaShape(hidden=256, num_layers=2, mlp=704, num_heads=4, num_kv_heads=2, max_positions=1 << 20),
    "350m": LlamaShape(hidden=1024, num_layers=22, mlp=2816, num_heads=16, num_kv_heads=16),
    "1.1b": LlamaShape(hidden=2048, num_layers=22, mlp=5632, num_heads=32, num_kv_heads=4),
    "6.7b": LlamaShape(hidden=4096, num_layers=32, mlp=11008, num_heads=32, num_kv_heads=32),
}


def ensure_checkpoint(name: str, *, root: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The folder of a checkpoint, written now unless an earlier run finished it.

    Args:
        name: One of `SHAPES`.
        root: Folder for checkpoints; made if missing.
        dtype: Stored type of all tensors.

    Raises:
        KeyError: No such shape.
        OSError: The disk is full, or cannot be written.
    """
    shape = SHAPES[name]
    folder = root / f"llama-{name}-{str(dtype).removeprefix('torch.')}"
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(root).free
    needed_bytes = shape.num_parameters * dtype.itemsize
    if free_bytes < needed_bytes:
        raise OSError(
            f"{root}: checkpoint {name} needs {needed_bytes} bytes, {free_bytes} are free; give another --root"
        )
    # Renamed when complete, so a folder of that name is never half a checkpoint.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
    try:
        write_config(unfinished, shape, dtype=dtype)
        write_tokenizer(unfinished)
        write_shards(unfinished, shape, dtype=dtype)
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def write_config(folder: Path, shape: LlamaShape, *, dtype: torch.dtype) -> None:
    """Write config.json as transformers would."""
    config = shape.config() | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer without merges: enough for trainers that insist on one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(str(folder))


def write_shards(folder: Path, shape: LlamaShape, *, dtype: torch.dtype, shard_bytes: int = _SHARD_BYTES) -> None:
    """Write the weights as safetensors shards with an index; layers may lie in two shards."""
    pool = torch.empty(_POOL_NUMEL).normal_(0, STD, generator=torch.Generator().manual_seed(SEED)).to(dtype)
    shards = list(_group(shape, dtype=dtype, shard_bytes=shard_bytes))
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(shards, start=1):
        file = folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_shard(file, tensors, pool=pool, first_position=len(weight_map))
        weight_map |= {name: file.name for name, _ in tensors}
    total_bytes = shape.num_parameters * dtype.itemsize
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_shard(
    file: Path, tensors: list[tuple[str, tuple[int, ...]]], *, pool: torch.Tensor, first_position: int = 0
) -> None:
    """Write one safetensors file; vectors are ones, matrices tile `pool` from a place that differs per tensor.

    The file is on the disk, and out of the page cache, when this returns: what reads it next measures the disk.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + _numel(shape) * pool.itemsize
        header[name] = {"dtype": _STORED_NAMES[pool.dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT_BYTES)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for position, (_, shape) in enumerate(tensors, start=first_position):
            if len(shape) == 1:
                out.write(_bytes_of(torch.ones(shape, dtype=pool.dtype)))
            else:
                _write_tiled(out, pool, numel=_numel(shape), start=position * _STRIDE % pool.numel())
        out.flush()
        os.fsync(out.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write_tiled(out: BinaryIO, pool: torch.Tensor, *, numel: int, start: int) -> None:
    while numel:
        piece = pool[start : start + numel]
        out.write(_bytes_of(piece))
        numel -= piece.numel()
        start = 0


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


def _group(shape: LlamaShape, *, dtype: torch.dtype, shard_bytes: int) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    shard: list[tuple[str, tuple[int, ...]]] = []
    filled_bytes = 0
    for name, sizes in shape.tensors():
        nbytes = _numel(sizes) * dtype.itemsize
        if shard and filled_bytes + nbytes > shard_bytes:
            yield shard
            shard, filled_bytes = [], 0
        shard.append((name, sizes))
        filled_bytes += nbytes
    yield shard


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()) / "lowmem-checkpoints")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    print(ensure_checkpoint(arguments.shape, root=arguments.root, dtype=getattr(torch, arguments.dtype)))


if __name__ == "__main__":
    main()
