"""Room in a file: page-aligned stretches that are taken and given back. Pure arithmetic."""

from bisect import insort
from dataclasses import dataclass

from offload.layout import PAGE_BYTES, round_up


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class FileSlot:
    """A stretch of a file."""

    offset_bytes: int
    """First byte, on a page."""
    nbytes: int
    """Length in whole pages."""


class SlotAllocator:
    """First fit, neighbours joined: what is given back serves again before the file grows."""

    def __init__(self) -> None:
        self._free: list[FileSlot] = []
        self._end_bytes = 0
        self._taken_bytes = 0

    @property
    def end_bytes(self) -> int:
        """How long the file has to be; grows to the most that was ever needed at once, and to gaps that did not fit."""
        return self._end_bytes

    @property
    def taken_bytes(self) -> int:
        """Bytes in slots that have not been given back."""
        return self._taken_bytes

    def take(self, nbytes: int) -> FileSlot:
        """A slot of at least `nbytes`, the first in the file that is free."""
        nbytes = round_up(max(nbytes, 1), PAGE_BYTES)
        self._taken_bytes += nbytes
        for index, gap in enumerate(self._free):
            if gap.nbytes >= nbytes:
                rest = gap.nbytes - nbytes
                self._free[index : index + 1] = (
                    [FileSlot(offset_bytes=gap.offset_bytes + nbytes, nbytes=rest)] if rest else []
                )
                return FileSlot(offset_bytes=gap.offset_bytes, nbytes=nbytes)
        start = self._end_bytes
        if self._free and self._free[-1].offset_bytes + self._free[-1].nbytes == start:
            start = self._free.pop().offset_bytes
        self._end_bytes = start + nbytes
        return FileSlot(offset_bytes=start, nbytes=nbytes)

    def give_back(self, slot: FileSlot) -> None:
        """Have a slot again; each slot once."""
        self._taken_bytes -= slot.nbytes
        insort(self._free, slot)
        joined: list[FileSlot] = []
        for gap in self._free:
            last = joined[-1] if joined else None
            if last is not None and last.offset_bytes + last.nbytes == gap.offset_bytes:
                joined[-1] = FileSlot(offset_bytes=last.offset_bytes, nbytes=last.nbytes + gap.nbytes)
            else:
                joined.append(gap)
        self._free = joined


__all__ = ["FileSlot", "SlotAllocator"]
