"""Staging buffers: flat page-aligned host memory that files are read into and tensors are viewed from."""

from __future__ import annotations

import mmap
import warnings
import weakref

import torch
from torch import Tensor

from offload.blocks import ALIGNMENT_BYTES, PAGE_BYTES, TensorSpec, round_up
from offload.budget import format_bytes
from offload.errors import Closed, ClosedAfterwards


class StagingBuffer(ClosedAfterwards):
    """Host memory of an exact size, page-aligned, in huge pages if the system has them, pinned if asked and possible.

    It is its own mapping rather than torch's: torch rounds pinned allocations up to powers of two and keeps them. The
    memory is given back when the buffer is closed and no view of it is left.

    Args:
        nbytes: Size. Memory is committed as it is first written.
        pin: Register it with CUDA, so that copies to the device run at full speed and beside computation. Where that is
            not possible the buffer stays pageable.
        in_children: Whether children made by fork see its contents. False for memory that reads or copies use in the
            background: a child would share its pages with them, and what such a transfer writes must be this process's
            own page (open(2), O_DIRECT).

    Raises:
        ValueError: `nbytes` is negative.
        OSError: The address space is exhausted.
    """

    def __init__(self, nbytes: int, *, pin: bool = False, in_children: bool = True) -> None:
        if nbytes < 0:
            raise ValueError(f"nbytes must be 0 or more, got {nbytes}")
        # Anonymous and private: zeros, not backed by any file. A mapping of no bytes does not exist.
        memory = mmap.mmap(-1, max(round_up(nbytes, PAGE_BYTES), PAGE_BYTES), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _advise(memory, "MADV_HUGEPAGE")
        if not in_children:
            _advise(memory, "MADV_DONTFORK")
        self.nbytes = nbytes
        """Size."""
        # The tensor owns the mapping from here on: it is unmapped with the last view.
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self._memory: mmap.mmap | None = memory
        self._tensor: Tensor | None = whole[:nbytes]
        self._pinned = pin and register_host_memory(whole)
        self._finalizer = weakref.finalize(self, unregister_host_memory, whole) if self._pinned else None

    @property
    def tensor(self) -> Tensor:
        """The memory as a uint8 tensor of shape (nbytes,); its first byte is page-aligned.

        Raises:
            Closed: The buffer was closed.
        """
        if self._tensor is None:
            raise Closed("the staging buffer was closed; make a new one")
        return self._tensor

    def give_back(self, start: int, stop: int) -> None:
        """Give the memory of some bytes back to the system, where it can; what they read as afterwards is unspecified.

        Args:
            start: First byte, the beginning of a page.
            stop: One past the last.

        Raises:
            ValueError: `start` is within a page.
            Closed: The buffer was closed.
        """
        if self._memory is None:
            raise Closed("the staging buffer was closed; make a new one")
        if start % PAGE_BYTES:
            raise ValueError(f"start must be a multiple of {PAGE_BYTES}, got {start}")
        if hasattr(mmap, "MADV_DONTNEED") and not self._pinned and stop > start:
            self._memory.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def close(self) -> None:
        """Unpin it and let go of it. No transfer may be running. Views keep the memory until they go. Twice is fine."""
        self._tensor = self._memory = None
        self._pinned = False
        if self._finalizer is not None:
            self._finalizer()


def view_tensor(buffer: Tensor, offset: int, *, spec: TensorSpec) -> Tensor:
    """The stored tensor that begins at a byte of a buffer.

    Args:
        buffer: Tensor of shape (n,), uint8, on any device.
        offset: Position of the tensor's first byte in `buffer` (`BlockLayout.tensor_offsets`).
        spec: Type and shape of the tensor.

    Returns:
        Tensor of `spec.shape` in `spec.dtype` on the buffer's device: a view of the buffer where it is aligned, to its
        element size on a CPU and to `ALIGNMENT_BYTES` elsewhere, else a copy. Files whose headers have odd lengths hold
        such tensors.

    Raises:
        ValueError: The tensor does not lie within the buffer.
    """
    end = offset + spec.nbytes
    if offset < 0 or end > buffer.numel():
        raise ValueError(
            f"{spec.name}: expected bytes {offset} to {end} within the buffer, which has {buffer.numel()} bytes"
        )
    stored = buffer[offset:end]
    alignment = spec.dtype.itemsize if buffer.device.type == "cpu" else ALIGNMENT_BYTES
    if stored.storage_offset() % spec.dtype.itemsize or stored.data_ptr() % alignment:
        stored = stored.clone()
    return stored.view(spec.dtype).view(spec.shape)


def _advise(memory: mmap.mmap, advice: str) -> None:
    if not hasattr(mmap, advice):
        return
    try:
        memory.madvise(getattr(mmap, advice))
    except OSError:
        # A kernel built without huge pages refuses; small pages work as well, only slower on first touch.
        return


def register_host_memory(memory: Tensor) -> bool:
    """Page-lock memory for copies to and from a GPU; says once per size class and process where that is refused.

    Args:
        memory: Host memory that nobody has registered.

    Returns:
        Whether the driver took it. `unregister_host_memory` undoes it.
    """
    if not torch.cuda.is_available():
        return False
    status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)  # type: ignore[no-untyped-call]
    if int(status) != 0:
        _clear_cuda_error()
        # Of the same text and place, Python shows one.
        warnings.warn(
            f"the driver did not page-lock {format_bytes(memory.numel())} of host memory (CUDA error {int(status)}): "
            "copies to and from the GPU are slower, and none runs beside computation. `lowmem doctor` tries it again; "
            "containers need --ulimit memlock=-1, WSL2 a larger memory= in .wslconfig",
            stacklevel=3,
        )
        return False
    return True


def unregister_host_memory(memory: Tensor) -> None:
    """Undo `register_host_memory`; nothing may be copying it. Never raises: it runs in finalizers too."""
    status = torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]
    if int(status) != 0:
        _clear_cuda_error()


def _clear_cuda_error() -> None:
    """Let CUDA report what it refused here, not at the next unrelated kernel launch."""
    try:
        torch.ones(1, device="cuda")
    except RuntimeError:
        # This is the report. Should the device itself have failed, its next use says so again.
        return
