"""A packed mixture of experts of 30 billion weights, whole process inside a limit: training, and bytes per token.

    python -m benchmarks.packed_experts --root /nvme/checkpoints [--layers 48] [--limit 4GiB] [--keep]

The shape is Qwen3-30B-A3B's: 48 blocks of 128 experts, of which a token goes to 8. The checkpoint is in bitsandbytes'
layout (NF4, nested, one weight per tensor and expert), 17 GB of random numbers, and is deleted afterwards. What `lowmem
bench` measures of it is kept under the root, and plans are made with it: `planned` is held against what happened.
"""

import argparse
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.checkpoints import write_tokenizer
from benchmarks.harness import Value, emit, emit_skip, last_json, run_module
from benchmarks.memory_limit import LimitUnavailable
from lowmem.machines.bench import bench_lines
from offload.budget import parse_bytes

BENCHMARK = "packed_experts"
HIDDEN, EXPERT, NUM_EXPERTS, NUM_PER_TOKEN = 2048, 768, 128, 8
NUM_HEADS, NUM_KV_HEADS, HEAD, VOCAB = 32, 4, 128, 151_936
_BLOCK, _NESTED = 64, 256
_POOL_BYTES = 1 << 26

Entry = tuple[str, str, tuple[int, ...], bytes]
"""Name, type in safetensors, shape, content."""


class Pool:
    """Random bytes, given out from another place each time."""

    def __init__(self) -> None:
        from bitsandbytes.functional import quantize_4bit

        generator = torch.Generator().manual_seed(0)
        # Codes of normal numbers: those of equal chance have a mean, of which all tokens share more with each block.
        numbers = torch.randn(_POOL_BYTES // 8, generator=generator)
        codes = quantize_4bit(numbers, blocksize=_BLOCK, quant_type="nf4")[0].flatten().numpy().tobytes()
        self._bytes = codes * (_POOL_BYTES // len(codes))
        # bf16 numbers of 0.0078 to 0.031, both signs: exponents 120 and 121.
        small = torch.randn(_POOL_BYTES // 2, generator=generator).mul_(0.02).bfloat16()
        self._small = small.view(torch.uint8).numpy().tobytes()
        self._next = 0

    def take(self, nbytes: int, *, small: bool = False) -> bytes:
        """Some bytes: any, or those of small bf16 numbers."""
        source, parts = (self._small if small else self._bytes), []
        while nbytes:
            start = self._next % (_POOL_BYTES // 2)
            part = source[start : start + min(nbytes, _POOL_BYTES // 2)]
            parts.append(part)
            nbytes -= len(part)
            self._next += len(part) + 2 * 104_729
        return b"".join(parts)


def packed(
    name: str, shape: tuple[int, int], pool: Pool, tables: tuple[bytes, bytes], *, scale: float = 1.0
) -> Iterator[Entry]:
    """A weight in NF4 with nested absmaxes, of about 0.02 times the scale."""
    num = shape[0] * shape[1]
    blocks = num // _BLOCK
    state = {
        "quant_type": "nf4",
        "blocksize": _BLOCK,
        "dtype": "bfloat16",
        "shape": list(shape),
        "nested_blocksize": _NESTED,
        "nested_dtype": "float32",
        "nested_offset": 0.05 * scale,
    }
    described = json.dumps(state).encode()
    nested = -(-blocks // _NESTED)
    yield name, "U8", (num // 2, 1), pool.take(num // 2)
    yield f"{name}.absmax", "U8", (blocks,), pool.take(blocks)
    yield f"{name}.nested_absmax", "F32", (nested,), struct.pack(f"<{nested}f", *[0.02 * scale] * nested)
    yield f"{name}.nested_quant_map", "F32", (256,), tables[1]
    yield f"{name}.quant_map", "F32", (16,), tables[0]
    yield f"{name}.quant_state.bitsandbytes__nf4", "U8", (len(described),), described


def layer(number: int, pool: Pool, tables: tuple[bytes, bytes]) -> Iterator[Entry]:
    """The tensors of a block, in the order of their names."""
    prefix = f"model.layers.{number}"
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    yield f"{prefix}.input_layernorm.weight", "BF16", (HIDDEN,), ones
    for expert in range(NUM_EXPERTS):
        for name, shape in (("down", (HIDDEN, EXPERT)), ("gate", (EXPERT, HIDDEN)), ("up", (EXPERT, HIDDEN))):
            yield from packed(f"{prefix}.mlp.experts.{expert}.{name}_proj.weight", shape, pool, tables)
    gate = NUM_EXPERTS * HIDDEN * 2
    yield f"{prefix}.mlp.gate.weight", "BF16", (NUM_EXPERTS, HIDDEN), pool.take(gate, small=True)
    yield f"{prefix}.post_attention_layernorm.weight", "BF16", (HIDDEN,), ones
    for name in ("k_norm", "q_norm"):
        yield f"{prefix}.self_attn.{name}.weight", "BF16", (HEAD,), ones[: 2 * HEAD]
    queries, keys = NUM_HEADS * HEAD, NUM_KV_HEADS * HEAD
    for name, shape in (
        ("k", (keys, HIDDEN)),
        ("o", (HIDDEN, queries)),
        ("q", (queries, HIDDEN)),
        ("v", (keys, HIDDEN)),
    ):
        # What attention of no meaning adds is much the same for all tokens, which would all go to the same experts
        # after some blocks if it were as large as what is their own.
        scale = 0.1 if name == "o" else 1.0
        yield from packed(f"{prefix}.self_attn.{name}_proj.weight", shape, pool, tables, scale=scale)


def outer(pool: Pool) -> Iterator[Entry]:
    """What stands outside the blocks, in bf16."""
    nbytes = VOCAB * HIDDEN * 2
    yield "lm_head.weight", "BF16", (VOCAB, HIDDEN), pool.take(nbytes, small=True)
    # Of one or two, not small: tokens must differ by more than blocks add.
    embeddings = bytearray(pool.take(nbytes, small=True))
    torch.frombuffer(embeddings, dtype=torch.bfloat16).mul_(50)
    yield "model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN), bytes(embeddings)
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    yield "model.norm.weight", "BF16", (HIDDEN,), ones


def write_shard(file: Path, entries: list[Entry]) -> list[str]:
    """Write one file; returns the names in it."""
    header, end = {}, 0
    for name, kind, shape, content in entries:
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + len(content)]}
        end += len(content)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(raw)) + raw)
        for *_, content in entries:
            opened.write(content)
    return list(header)


def write_checkpoint(folder: Path, num_layers: int) -> None:
    """Write the checkpoint, a shard for each block."""
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    tables = tuple(
        table.float().cpu().numpy().tobytes() for table in (get_4bit_type("nf4", device="cpu"), create_dynamic_map())
    )
    pool = Pool()
    weight_map: dict[str, str] = {}
    for number in range(num_layers + 1):
        file = f"model-{number + 1:05d}-of-{num_layers + 1:05d}.safetensors"
        entries = list(outer(pool) if number == num_layers else layer(number, pool, (tables[0], tables[1])))
        weight_map |= dict.fromkeys(write_shard(folder / file, entries), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": 6144, "moe_intermediate_size": EXPERT,
        "num_hidden_layers": num_layers, "num_attention_heads": NUM_HEADS, "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD, "num_experts": NUM_EXPERTS, "num_experts_per_tok": NUM_PER_TOKEN, "norm_topk_prob": True,
        "vocab_size": VOCAB, "max_position_embeddings": 40960, "tie_word_embeddings": False, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "bos_token_id": 1, "eos_token_id": 2,
        "quantization_config": {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)


def run_case(task: str, folder: Path, arguments: argparse.Namespace) -> bool:
    """Run one task inside the limit and print its result."""
    words = [task, "--folder", str(folder), "--device-budget", arguments.device_budget]
    words += ["--seq-len", str(arguments.seq_len), "--num-steps", str(arguments.num_steps)]
    try:
        outcome = run_module(
            "benchmarks.packed_experts_job", words, limit_bytes=parse_bytes(arguments.limit), echo_errors=True
        )
    except LimitUnavailable as error:
        emit_skip(BENCHMARK, task, str(error))
        return False
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    memory: dict[str, Value] = {
        "limit_bytes": parse_bytes(arguments.limit),
        "peak_group_bytes": outcome.peak_bytes,
        "peak_rss_bytes": outcome.peak_rss_bytes,
        "num_oom_kills": outcome.num_oom_kills,
    }
    sizes: dict[str, Value] = {"num_layers": arguments.layers, "checkpoint_bytes": stored, "seq_len": arguments.seq_len}
    if outcome.returncode != 0:
        failed = f"killed at {arguments.limit}" if outcome.num_oom_kills else f"exit status {outcome.returncode}"
        emit(BENCHMARK, task, completed=False, failed=failed, memory=memory, sizes=sizes)
        return False
    report = last_json(outcome.output)
    emit(BENCHMARK, task, completed=True, memory=memory, sizes=sizes, **report)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--limit", default="4GiB")
    parser.add_argument("--device-budget", default="3000MiB")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--num-steps", type=int, default=2)
    parser.add_argument("--task", choices=("train", "generate"), action="append", help="both if not given")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint, and use one that is there")
    arguments = parser.parse_args()
    folder = arguments.root / f"packed-experts-{arguments.layers}"
    try:
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True)
            write_checkpoint(folder, arguments.layers)
        # Rates of this folder on this machine, apart from what its user has measured.
        os.environ["XDG_CACHE_HOME"] = str(arguments.root / "rates")
        list(bench_lines(folder, device="cpu"))
        ok = [run_case(task, folder, arguments) for task in arguments.task or ("train", "generate")]
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if not all(ok):
        sys.exit("a task failed or was skipped")


if __name__ == "__main__":
    main()
