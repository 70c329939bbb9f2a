"""The keys and values of one block's call, in the place of a cache: what makes unmodified modeling code see a prefix.

transformers' attention passes its keys and values through `past_key_values.update` and attends to what that returns. A
`KVCarrier` keeps those of the whole sequence and returns a chunk's own; the attention of `lowmem.streaming.attention`
takes the prefix from the carrier, so that the two are never joined.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class KeysTaken(Exception):  # noqa: N818 - leaves a block's forward early, and is not an error
    """Raised through a block's forward once its keys and values are known and nothing else is wanted."""


class Workspace:
    """Memory that one block after another uses for its keys and values: fresh pages cost more than what is done there.

    A tensor that `take` returned is the caller's until the next `take` of the same name.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def take(self, name: str, shape: Sequence[int], *, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory of a shape, on the device of `like`.

        Args:
            name: What it is for.
            shape: Shape wanted.
            like: A tensor on the same device.
            dtype: Type wanted.
        """
        size = torch.Size(shape).numel()
        nbytes = size * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes or buffer.device != like.device:
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = torch.empty(nbytes, dtype=torch.uint8, device=like.device)
        return buffer[:nbytes].view(dtype).view(tuple(shape))

    def clear(self) -> None:
        """Release everything."""
        self._buffers.clear()


class KVCarrier:
    """Stands for `past_key_values` in the calls of one block, one chunk at a time.

    Args:
        num_tokens: Tokens of the whole sequence.
        workspace: Where keys, values and their gradients are kept.
    """

    def __init__(self, *, num_tokens: int, workspace: Workspace) -> None:
        self.start = 0
        self.end = 0
        self.key: Tensor | None = None
        """The chunk's own keys, (sequences, key heads, tokens, head), as `update` got them; None before."""

        self.value: Tensor | None = None
        self._num_tokens = num_tokens
        self._workspace = workspace
        self._kept: tuple[Tensor, Tensor] | None = None
        self._grads: tuple[Tensor, Tensor] | None = None
        self._keep = False
        self._leave = False

    def begin(self, start: int, end: int, *, keep: bool, leave: bool = False) -> None:
        """Set up for the chunk of tokens [start, end).

        Args:
            start: First token.
            end: Token after the last.
            keep: Whether its keys and values are written into the carrier.
            leave: Whether `update` then leaves the block's forward with `KeysTaken`.
        """
        self.start, self.end = start, end
        self.key = self.value = None
        self._keep, self._leave = keep, leave

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int | None = None, cache_kwargs: object = None
    ) -> tuple[Tensor, Tensor]:
        """What attention calls with a chunk's keys and values; returns them.

        Raises:
            KeysTaken: The forward is to be left here.
            RuntimeError: A block calls it twice, or with other shapes than (sequences, key heads, tokens, head).
        """
        del layer_idx, cache_kwargs
        tokens = self.end - self.start
        if self.key is not None or key_states.shape[2] != tokens or value_states.shape[2] != tokens:
            raise RuntimeError(
                f"a block in chunks of {tokens} tokens gave keys of shape {tuple(key_states.shape)} and values of shape "
                f"{tuple(value_states.shape)}{' a second time' if self.key is not None else ''}; expected "
                "(sequences, key heads, tokens, head) once; load the model with chunk_tokens=None"
            )
        self.key, self.value = key_states, value_states
        if self._keep:
            kept_key, kept_value = self._take_kept(key_states, value_states)
            kept_key[:, :, self.start : self.end] = key_states.detach()
            kept_value[:, :, self.start : self.end] = value_states.detach()
        if self._leave:
            raise KeysTaken
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the chunk, as a cache says it."""
        del layer_idx
        return self.start

    @property
    def prefix(self) -> "Prefix | None":
        """Keys and values of the tokens before the chunk; None if there are none."""
        if self.start == 0:
            return None
        if self._kept is None:
            raise RuntimeError(f"a chunk from token {self.start} was run before those that precede it")
        key, value = (kept[:, :, : self.start] for kept in self._kept)
        return Prefix(key, value, self)

    def expect_gradients(self) -> None:
        """Get ready to sum gradients of kept keys and values; they are zero until something is added."""
        self._grads = None

    def add_gradient(self, start: int, key: Tensor, value: Tensor) -> None:
        """Add gradients of the keys and values from token `start` on, in fp32 (fp64 for fp64)."""
        if self._grads is None:
            assert self._kept is not None
            self._grads = (self._zeros("grad_key", self._kept[0]), self._zeros("grad_value", self._kept[1]))
        for total, grad in zip(self._grads, (key, value), strict=True):
            total[:, :, start : start + grad.shape[2]] += grad

    def chunk_gradients(self) -> tuple[Tensor, Tensor] | None:
        """Gradients of the chunk's own keys and values through later chunks; None if there are none."""
        if self._grads is None:
            return None
        key, value = (grads[:, :, self.start : self.end] for grads in self._grads)
        return key, value

    def _take_kept(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self._kept is None:
            self._kept = (self._take("key", key), self._take("value", value))
        return self._kept

    def _take(self, name: str, like: Tensor) -> Tensor:
        shape = (*like.shape[:2], self._num_tokens, *like.shape[3:])
        return self._workspace.take(name, shape, like=like, dtype=like.dtype)

    def _zeros(self, name: str, like: Tensor) -> Tensor:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return self._workspace.take(name, like.shape, like=like, dtype=dtype).zero_()


class Prefix:
    """Keys and values before a chunk, and where their gradients go."""

    def __init__(self, key: Tensor, value: Tensor, carrier: KVCarrier) -> None:
        self.key, self.value = key, value
        self._carrier = carrier

    def add_gradient(self, start: int, key: Tensor, value: Tensor) -> None:
        """Add the gradient of the keys and values from token `start` on."""
        self._carrier.add_gradient(start, key, value)
