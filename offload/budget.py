"""How much of each tier a run may use."""

import os
from dataclasses import dataclass
from pathlib import Path

from offload.units import parse_bytes


@dataclass(frozen=True, kw_only=True, init=False)
class Budget:
    """Bytes that a run may use of the compute device and of host RAM, and where it may write on disk.

    Sizes are bytes as an int or text such as ``"900MiB"``, ``"2.4GiB"``, ``"0"``. What is not given is measured when it
    is needed (`offload.device.measured`).

    Args:
        device: Bounds everything that the compute device holds: the ring, resident blocks and whatever else the caller
            puts there.
        host: Bounds stored bytes cached in RAM, and offloaded state. ``"0"`` caches nothing; staging buffers come on
            top.
        disk: A folder for what must be written. It need not exist yet.

    Raises:
        ValueError: A size is negative or not a size, or `disk` is not a folder.
    """

    device: int | str | None
    """As it was given."""
    host: int | str | None
    """As it was given."""
    disk: Path | None
    """Folder for what must be written, with ``~`` expanded."""

    def __init__(
        self,
        *,
        device: int | str | None = None,
        host: int | str | None = None,
        disk: str | os.PathLike[str] | None = None,
    ) -> None:
        for field, size in (("device", device), ("host", host)):
            if size is not None:
                parse_bytes(size, field=f"Budget.{field}")
        # Frozen: fields can be set only past the class's own __setattr__.
        object.__setattr__(self, "device", device)
        object.__setattr__(self, "host", host)
        object.__setattr__(self, "disk", None if disk is None else _folder(disk))

    @property
    def device_bytes(self) -> int | None:
        """Bytes of device memory, or None where they are to be measured."""
        return None if self.device is None else parse_bytes(self.device)

    @property
    def host_bytes(self) -> int | None:
        """Bytes of host RAM, or None where they are to be measured."""
        return None if self.host is None else parse_bytes(self.host)


def _folder(disk: str | os.PathLike[str]) -> Path:
    if not os.fspath(disk):
        raise ValueError("Budget.disk: expected a folder, got an empty path")
    folder = Path(disk).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Budget.disk: {folder} is a file; give a folder")
    return folder
