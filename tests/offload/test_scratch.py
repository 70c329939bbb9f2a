"""Scratch space: slots used again, content exact, nothing left in the folder whatever ends the process."""

import errno
import gc
import os
import random
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload.buffers import StagingBuffer
from offload.errors import Closed, TierFull, WriteError
from offload.files import scratch as scratch_module
from offload.files.scratch import FileSlot, Scratch, SlotAllocator
from offload.trace import Trace
from tests.offload.small_disk import fill, small_disk

PAGE = 4096
ROOT = Path(__file__).resolve().parents[2]


def random_pages(num_pages: int) -> Tensor:
    return StagingBuffer(num_pages * PAGE).tensor.copy_(torch.randint(0, 256, (num_pages * PAGE,)).byte())


# ---- slots


def test_slots_never_overlap_and_the_file_does_not_grow_without_need() -> None:
    rng = random.Random(0)
    slots = SlotAllocator()
    taken: list[FileSlot] = []
    for _ in range(2000):
        if taken and (rng.random() < 0.5 or len(taken) > 20):
            slots.give_back(taken.pop(rng.randrange(len(taken))))
        else:
            nbytes = rng.randrange(0, 20 * PAGE)
            slot = slots.take(nbytes)
            assert slot.nbytes >= nbytes
            assert slot.nbytes % PAGE == slot.offset_bytes % PAGE == 0
            taken.append(slot)
        ordered = sorted(taken)
        for before, after in pairwise(ordered):
            assert before.offset_bytes + before.nbytes <= after.offset_bytes
        assert slots.end_bytes >= max((slot.offset_bytes + slot.nbytes for slot in taken), default=0)
    assert slots.end_bytes < 3 * 21 * 20 * PAGE


def test_the_same_slots_serve_one_step_after_another() -> None:
    slots = SlotAllocator()
    for _ in range(5):
        step = [slots.take(10_000) for _ in range(8)]
        assert slots.end_bytes == 8 * 3 * PAGE
        for slot in reversed(step):
            slots.give_back(slot)
    # What was in many slots serves as one as well.
    assert slots.take(8 * 3 * PAGE).offset_bytes == 0


# ---- the file


def test_what_was_written_comes_back_and_is_counted_and_traced(tmp_path: Path) -> None:
    trace = Trace()
    with Scratch(tmp_path / "new" / "folder", trace=trace, request_bytes=2 * PAGE) as scratch:
        data = [random_pages(n) for n in (1, 5, 3)]
        slots = [scratch.take(part.numel()) for part in data]
        for i, (slot, part) in enumerate(zip(slots, data, strict=True)):
            scratch.write(slot, part, name=f"part {i}").wait()
        for i in (1, 0, 2):
            back = random_pages(data[i].numel() // PAGE)
            scratch.read(slots[i], back, name=f"part {i}").wait()
            assert torch.equal(back, data[i])
        assert scratch.written_bytes == scratch.file_bytes == 9 * PAGE
    assert {(span.lane, span.name, span.nbytes) for span in trace.spans()} == {
        (lane, f"part {i}", n * PAGE) for lane in ("disk", "disk write") for i, n in enumerate((1, 5, 3))
    }


@pytest.mark.parametrize("nameless", [True, False])
def test_the_folder_stays_empty_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool) -> None:
    if not nameless:
        monkeypatch.delattr(os, "O_TMPFILE")
    (tmp_path / "theirs").write_text("not ours")
    with Scratch(tmp_path) as scratch:
        data, back = random_pages(4), random_pages(4)
        slot = scratch.take(data.numel())
        scratch.write(slot, data, name="w").wait()
        assert os.listdir(tmp_path) == ["theirs"]
        scratch.read(slot, back, name="w").wait()
        assert torch.equal(back, data)
    assert os.listdir(tmp_path) == ["theirs"]


@pytest.mark.parametrize("nameless", [True, False])
def test_killed_at_any_instant_it_leaves_nothing(tmp_path: Path, nameless: bool) -> None:
    program = f"""
import os, sys
from pathlib import Path
if not {nameless}:
    del os.O_TMPFILE
from offload import Scratch, StagingBuffer
scratch = Scratch(Path({str(tmp_path)!r}))
data = StagingBuffer(1 << 20).tensor
print("begun", flush=True)
while True:
    slots = [scratch.take(1 << 20) for _ in range(4)]
    for write in [scratch.write(slot, data, name="w") for slot in slots]:
        write.wait()
    for slot in slots:
        scratch.give_back(slot)
"""
    child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "begun\n"
    child.send_signal(signal.SIGKILL)
    assert child.wait(60) == -signal.SIGKILL
    child.stdout.close()
    assert os.listdir(tmp_path) == []


def test_names_that_a_crash_has_left_are_removed_and_nothing_else(tmp_path: Path) -> None:
    left = tmp_path / f"{scratch_module._PREFIX}123-abcd"
    left.write_bytes(bytes(PAGE))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / left.name).touch()
    (tmp_path / f"{scratch_module._PREFIX}link").symlink_to(tmp_path / "theirs")
    with Scratch(tmp_path):
        assert not left.exists()
        assert (tmp_path / "theirs" / left.name).exists()
        assert (tmp_path / f"{scratch_module._PREFIX}link").is_symlink()


def test_its_space_is_free_once_it_is_dropped(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as folder:
        for _ in range(3):
            scratch = Scratch(folder)
            slot = scratch.take(6 << 20)
            scratch.write(slot, StagingBuffer(6 << 20).tensor, name="w").wait()
            del scratch
            gc.collect()


def test_a_full_disk_is_reported_and_serves_again_when_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as folder, Scratch(folder) as scratch:
        filler = fill(folder, leave_bytes=1 << 20)
        data = random_pages(512)
        slot = scratch.take(data.numel())
        with pytest.raises(TierFull, match=f"{folder}.*no room for .* bytes at offset"):
            scratch.write(slot, data, name="w").wait()
        filler.unlink()
        back = random_pages(512)
        scratch.write(slot, data, name="w").wait()
        scratch.read(slot, back, name="w").wait()
        assert torch.equal(back, data)
        assert scratch.written_bytes == data.numel()


def test_a_failed_write_is_reported_and_not_counted(tmp_path: Path) -> None:
    def no_write(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    trace = Trace()
    with Scratch(tmp_path, pwrite=no_write, trace=trace) as scratch:
        with pytest.raises(WriteError, match="EIO"):
            scratch.write(scratch.take(PAGE), random_pages(1), name="w").wait()
        assert scratch.written_bytes == 0
    assert not trace.spans()


def test_what_does_not_fit_its_slot_and_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    with pytest.raises(ValueError, match="w: expected at most the slot's 4096 bytes, got 8192"):
        scratch.write(scratch.take(PAGE), random_pages(2), name="w")
    scratch.close()
    with pytest.raises(Closed, match="w: the reader or writer was closed"):
        scratch.write(scratch.take(PAGE), random_pages(1), name="w")
    scratch.close()
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"give a folder that can be written \(Budget.disk\)"):
        Scratch(tmp_path / "file")
