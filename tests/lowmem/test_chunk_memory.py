"""The bytes that a block in chunks holds, as predicted and as measured."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.planning.block_memory import MicroBatch, block_recompute_bytes, chunk_bytes, joined_bytes
from lowmem.planning.shapes import BlockShape, LinearShape, Part
from lowmem.streaming.chunking.attention import enable_chunks
from lowmem.streaming.chunking.chunks import ChunkedCall, backward_chunks, forward_chunks
from lowmem.streaming.recompute import Sought
from tests.lowmem.chunked_blocks import CPU, raw_forward, record_arguments

HIDDEN, EXPANDED, HEAD = 128, 352, 32


class LivingBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that still live, and the most there ever were."""

    def __init__(self, *, apart_from: list[Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in apart_from}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def llama_block_shape() -> BlockShape:
    attention_in = [(HIDDEN, HIDDEN), (HIDDEN, HIDDEN // 2), (HIDDEN, HIDDEN // 2)]
    return BlockShape(
        buffer_bytes=1,
        num_params=1,
        num_active_params=1,
        workspace_bytes=0,
        hidden_size=HIDDEN,
        query_size=HIDDEN,
        key_size=HIDDEN // 2,
        value_size=HIDDEN // 2,
        num_heads=HIDDEN // HEAD,
        linears=(
            *(LinearShape(part=Part.ATTENTION_IN, in_features=i, out_features=o) for i, o in attention_in),
            LinearShape(part=Part.ATTENTION_OUT, in_features=HIDDEN, out_features=HIDDEN),
            LinearShape(part=Part.MLP_IN, in_features=HIDDEN, out_features=EXPANDED),
            LinearShape(part=Part.MLP_IN, in_features=HIDDEN, out_features=EXPANDED),
            LinearShape(part=Part.MLP_OUT, in_features=EXPANDED, out_features=HIDDEN),
        ),
    )


def llama_block_call(tokens: int) -> tuple[nn.Module, ChunkedCall, list[Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=EXPANDED,
        num_hidden_layers=1,
        num_attention_heads=HIDDEN // HEAD,
        num_key_value_heads=HIDDEN // HEAD // 2,
        vocab_size=32,
    )
    model = LlamaForCausalLM(config)
    enable_chunks(model)
    ((block, (args, kwargs)),) = record_arguments(model, {"input_ids": torch.zeros(1, tokens, dtype=torch.long)})
    block.requires_grad_(False)
    return block, ChunkedCall(raw_forward(block), args, kwargs), [*kwargs["position_embeddings"]]


@pytest.mark.parametrize(("tokens", "chunk_tokens"), [(512, 64), (1024, 64), (512, 256)])
def test_backward_holds_what_was_predicted(tokens: int, chunk_tokens: int) -> None:
    block, call, tables = llama_block_call(tokens)

    def run(arguments: tuple[tuple[object, ...], dict[str, object]]) -> object:
        return raw_forward(block)(block, *arguments[0], **arguments[1])

    record = forward_chunks(run, call, chunk_tokens=chunk_tokens, device=CPU).record
    grad = torch.randn_like(call.hidden)
    known = [call.hidden, grad, *block.parameters(), *tables]
    with LivingBytes(apart_from=known) as living:
        backward_chunks(
            run,
            call,
            Sought(inputs=[call.hidden], wanted=[True], params=[], grads=[grad], into=grad),
            record=record,
            device=CPU,
        )
    batch = MicroBatch(num_sequences=1, seq_len=tokens, dtype="float32")
    predicted = chunk_bytes(llama_block_shape(), batch, chunk_tokens).total
    assert 0.6 * predicted < living.peak <= predicted


def test_a_longer_sequence_costs_its_keys_and_values_only() -> None:
    block = llama_block_shape()
    short, long = (
        chunk_bytes(block, MicroBatch(num_sequences=2, seq_len=length, dtype="float32"), 512)
        for length in (8192, 16384)
    )
    assert long.activations == short.activations
    assert long.total - short.total == 2 * 8192 * HIDDEN * (4 + 4)


def test_one_chunk_holds_what_the_whole_block_does_and_its_keys_and_values() -> None:
    block, batch = llama_block_shape(), MicroBatch(num_sequences=2, seq_len=100, dtype="bfloat16")
    assert chunk_bytes(block, batch, 1000).activations == block_recompute_bytes(block, batch)


def test_chunks_of_no_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="chunk_tokens is 0; expected at least 1"):
        chunk_bytes(llama_block_shape(), MicroBatch(num_sequences=1, seq_len=8, dtype="float32"), 0)


def test_chunks_on_a_gpu_hold_keys_and_values_joined_and_a_gradient_for_each_head() -> None:
    # A Llama of 8B's blocks, 128k tokens: in benchmarks/results, 18.7 GiB of which 12.9 are no block's.
    block = replace(llama_block_shape(), query_size=4096, key_size=1024, value_size=1024)
    tokens, grouped = 1 << 17, MicroBatch(num_sequences=1, seq_len=1 << 17, dtype="bfloat16", device="cuda")
    cpu = replace(grouped, device="cpu")
    more = chunk_bytes(block, grouped, 4096).attention - chunk_bytes(block, cpu, 4096).attention
    states, heads = 2 * tokens * 2048, 2 * tokens * 8192
    assert more == pytest.approx(2 * states + heads, rel=0.02)
    # One head for each key: nothing is added up.
    alone = replace(block, key_size=4096, value_size=4096)
    assert joined_bytes(alone, grouped) == (heads, 2 * heads)
    masked = joined_bytes(block, replace(grouped, has_mask=True))
    assert masked == (states + heads, states + 3 * heads)
    assert joined_bytes(block, cpu) == (0, 0)
