"""The keys and values of one block's call: what lets unmodified modeling code see a prefix, one chunk at a time.

A `KVCarrier` goes into a block twice: as `past_key_values`, where it says how many tokens precede the chunk and hands a
chunk's keys and values back as they are, and inside the mask, through which `lowmem.streaming.chunking.attention`
reaches it. It is there that keys and values are kept, as the kernel gets them: what is done to them between cache and
kernel (latent attention expands them, some models repeat them) is then done once per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem import host_memory
from lowmem.streaming.recompute import sum_dtype


class KeysTaken(Exception):
    """Leaves a block's forward once its keys and values are known and nothing else is wanted; not an error."""


class Workspace:
    """Memory that one block after another uses for its keys and values: fresh pages cost more than what is done there.

    A tensor that `take` returned is the caller's until the next `take` of the same name.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def take(self, name: str, shape: Sequence[int], *, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory of a shape, on the device of `like`.

        Args:
            name: What it is for.
            shape: Shape wanted.
            like: A tensor on the same device.
            dtype: Type wanted.
        """
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes or buffer.device != like.device:
            # The old one goes before the new one comes.
            self._buffers.pop(name, None)
            buffer = None
            buffer = host_memory.empty((nbytes,), dtype=torch.uint8, device=like.device)
            self._buffers[name] = buffer
        return buffer[:nbytes].view(dtype).view(tuple(shape))

    def clear(self) -> None:
        """Release everything."""
        self._buffers.clear()


class AttentionMemory:
    """Keys and values of all tokens for one attention of a block, and their gradients.

    Args:
        number: Which attention of the block.
        num_tokens: Tokens of the whole sequence.
        workspace: Where they are kept.
    """

    def __init__(self, number: int, *, num_tokens: int, workspace: Workspace) -> None:
        self._number = number
        self._num_tokens = num_tokens
        self._workspace = workspace
        self._kept: tuple[Tensor, Tensor] | None = None
        self._grads: tuple[Tensor, Tensor] | None = None
        self.own: tuple[Tensor, Tensor] | None = None
        """Keys and values of the present chunk, with their graph."""

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens, (sequences, key heads, tokens, head)."""
        assert self._kept is not None
        return self._kept

    def keep(self, start: int, key: Tensor, value: Tensor) -> None:
        """Write keys and values of the tokens from `start` on, (sequences, key heads, tokens, head)."""
        if self._kept is None:
            self._kept = (self._take("key", key, dtype=key.dtype), self._take("value", value, dtype=value.dtype))
        for whole, part in zip(self._kept, (key, value), strict=True):
            whole[:, :, start : start + part.shape[2]] = part.detach()

    def before(self, start: int) -> Prefix | None:
        """Keys and values of the tokens before `start`; None if there are none."""
        if start == 0:
            return None
        if self._kept is None:
            raise RuntimeError(f"a chunk from token {start} was run before those that precede it")
        key, value = (kept[:, :, :start] for kept in self._kept)
        return Prefix(key, value, self)

    def add_gradient(self, start: int, key: Tensor, value: Tensor) -> None:
        """Add gradients of the keys and values from token `start` on, in fp32 (fp64 for fp64)."""
        if self._grads is None:
            assert self._kept is not None
            self._grads = (self._zeros("grad_key", self._kept[0]), self._zeros("grad_value", self._kept[1]))
        for total, grad in zip(self._grads, (key, value), strict=True):
            total[:, :, start : start + grad.shape[2]] += grad

    def own_with_gradients(self, start: int) -> list[tuple[Tensor, Tensor]]:
        """The present chunk's keys and values, where they need gradients, each with that from later chunks."""
        if self._grads is None or self.own is None:
            return []
        pairs = zip(self.own, self._grads, strict=True)
        return [
            (own, grads[:, :, start : start + own.shape[2]].to(own.dtype)) for own, grads in pairs if own.requires_grad
        ]

    def _take(self, name: str, like: Tensor, *, dtype: torch.dtype) -> Tensor:
        shape = (*like.shape[:2], self._num_tokens, *like.shape[3:])
        return self._workspace.take(f"{name} {self._number}", shape, like=like, dtype=dtype)

    def _zeros(self, name: str, like: Tensor) -> Tensor:
        return self._take(name, like, dtype=sum_dtype(like.dtype)).zero_()


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values before a chunk, (sequences, key heads, tokens, head), and where their gradients go."""

    key: Tensor
    value: Tensor
    memory: AttentionMemory


class KVCarrier:
    """Stands for `past_key_values` in the calls of one block, one chunk at a time.

    Args:
        num_tokens: Tokens of the whole sequence.
        workspace: Where keys, values and their gradients are kept.
    """

    def __init__(self, *, num_tokens: int, workspace: Workspace) -> None:
        self.start = 0
        self.end = 0
        self._memories: list[AttentionMemory] = []
        self._num_tokens = num_tokens
        self._workspace = workspace
        self.num_attentions = 0
        """How many attentions the block has computed in the present chunk."""
        self._keep = False
        self._leave_at: int | None = None

    def begin(self, start: int, end: int, *, keep: bool, leave_at: int | None = None) -> None:
        """Set up for the chunk of tokens [start, end).

        Args:
            start: First token.
            end: Token after the last.
            keep: Whether its keys and values are kept for the chunks after it.
            leave_at: At which attention of the block its forward is left with `KeysTaken`; None to finish it.
        """
        self.start, self.end = start, end
        self._keep, self._leave_at, self.num_attentions = keep, leave_at, 0
        for memory in self._memories:
            memory.own = None

    def keys_values(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of all tokens, of each attention: the workspace's memory, valid until its next use."""
        return [memory.kept for memory in self._memories]

    def put(self, number: int, key: Tensor, value: Tensor) -> None:
        """Take an attention's keys and values of all tokens, as `keys_values` returned them; attentions in order."""
        memory = AttentionMemory(number, num_tokens=self._num_tokens, workspace=self._workspace)
        memory.keep(0, key, value)
        self._memories.append(memory)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int | None = None, cache_kwargs: object = None
    ) -> tuple[Tensor, Tensor]:
        """What attention calls with a chunk's keys and values, or with latents of them: returns the same."""
        del layer_idx, cache_kwargs
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the chunk, as a cache says it."""
        del layer_idx
        return self.start

    def take(self, key: Tensor, value: Tensor) -> Prefix | None:
        """What our attention calls with a chunk's own keys and values; returns those of the tokens before.

        Raises:
            KeysTaken: The forward is to be left here.
            RuntimeError: These are not the keys of the chunk's tokens.
        """
        tokens = self.end - self.start
        if key.ndim != 4 or key.shape[2] != tokens or value.shape[2] != tokens:
            raise RuntimeError(
                f"a chunk of {tokens} tokens has keys of shape {tuple(key.shape)} and values of shape "
                f"{tuple(value.shape)}, expected (sequences, key heads, {tokens}, head); use chunk_tokens=None"
            )
        number = self.num_attentions
        self.num_attentions += 1
        if number == len(self._memories):
            self._memories.append(AttentionMemory(number, num_tokens=self._num_tokens, workspace=self._workspace))
        memory = self._memories[number]
        if self._keep:
            memory.keep(self.start, key, value)
        if number == self._leave_at:
            raise KeysTaken
        memory.own = (key, value)
        return memory.before(self.start)

    def own_with_gradients(self) -> list[tuple[Tensor, Tensor]]:
        """The chunk's own keys and values that later chunks left gradients for, with these."""
        return [pair for memory in self._memories for pair in memory.own_with_gradients(self.start)]
