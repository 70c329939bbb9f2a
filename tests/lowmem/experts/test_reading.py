"""Single experts read into few buffers: guesses, failures, and waits that are interrupted while their reads go on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lowmem.experts import reading
from lowmem.experts.reading import ExpertReader
from offload import BlockSpec, FileIO, SafetensorsSource, Transfer

NUM, SIZE = 12, 3000


@pytest.fixture
def experts(tmp_path: Path) -> Iterator[tuple[dict[str, torch.Tensor], FileIO, Any]]:
    """Values of some experts, and what reads them."""
    values = {f"expert{number}": torch.full((SIZE,), float(number)) for number in range(NUM)}
    save_file(values, tmp_path / "model.safetensors")
    with SafetensorsSource(tmp_path) as source, FileIO(stamps=source.stamps) as reader:
        yield values, reader, lambda _, expert: BlockSpec(name="", tensors=(source.tensors[f"expert{expert}"],))


def opened(reader: FileIO, spec_of: Any, num: int) -> ExpertReader:
    return ExpertReader(spec_of, reader=reader, device=torch.device("cpu"), buffer_bytes=24576, num_buffers=num)


def brought(single: ExpertReader, expert: int) -> torch.Tensor:
    return single.bring(0, expert)[f"expert{expert}"]


def test_every_expert_is_its_own_whatever_was_expected_or_foreseen(experts: Any) -> None:
    values, reader, spec_of = experts
    single = opened(reader, spec_of, 4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        order = torch.randperm(NUM, generator=generator).tolist()
        single.expect(0, order[:2])
        single.foresee(0, order[2:6])
        for expert in order[:3]:
            assert torch.equal(brought(single, expert), values[f"expert{expert}"])
    assert single.allocated_bytes == 4 * 24576
    assert single.num_read >= single.num_foreseen > single.num_came_true > 0
    single.close()


def test_what_is_expected_now_is_not_given_up_for_a_guess(experts: Any) -> None:
    values, reader, spec_of = experts
    single = opened(reader, spec_of, 3)
    single.expect(0, [0, 1, 2])
    single.foresee(0, [3, 4])
    assert single.num_foreseen == 0
    single.expect(0, [0, 1])
    brought(single, 2)
    single.foresee(0, [5, 6])
    assert single.num_foreseen == 1
    num_read = single.num_read
    assert all(torch.equal(brought(single, one), values[f"expert{one}"]) for one in (0, 1, 5))
    assert single.num_read == num_read
    assert single.num_came_true == 1
    single.close()


def test_guesses_end_where_they_are_wrong(experts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, reader, spec_of = experts
    monkeypatch.setattr(reading, "_FIRST_GUESSES", 4)
    single = opened(reader, spec_of, 2)
    for _ in range(20):
        single.expect(0, [0])
        brought(single, 0)
        single.foresee(0, [1])
        single.expect(0, [2])
        brought(single, 2)
    assert not single.foresees
    assert 4 <= single.num_foreseen < 20
    single.close()


class Held:
    """A transfer that ends when it is let go; a wait for it can be interrupted."""

    def __init__(self, transfer: Transfer, gate: threading.Event) -> None:
        self._transfer, self._gate, self.interrupts = transfer, gate, True

    def wait(self) -> None:
        if self.interrupts:
            raise KeyboardInterrupt
        self._gate.wait()
        self._transfer.wait()

    def done(self) -> bool:
        return self._gate.is_set() and self._transfer.done()

    def outcome(self) -> object:
        self._gate.wait()
        return self._transfer.outcome()


def test_interrupted_wait_gives_no_buffer_out_while_its_read_still_writes(
    experts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, reader, spec_of = experts
    single = opened(reader, spec_of, 2)
    gate = threading.Event()
    held: list[Held] = []
    read = FileIO.read
    into: list[int] = []

    def holding(self: FileIO, layout: Any, buffer: torch.Tensor, *rest: Any) -> Any:
        into.append(buffer.data_ptr())
        transfer = read(self, layout, buffer, *rest)
        if held:
            return transfer
        held.append(Held(transfer, gate))
        return held[0]

    monkeypatch.setattr(FileIO, "read", holding)
    with pytest.raises(KeyboardInterrupt):
        single.bring(0, 0)
    # The read goes on: another expert gets another buffer, and the same one finds its own read again.
    assert torch.equal(brought(single, 1), values["expert1"])
    assert into[0] != into[1]
    held[0].interrupts = False
    threading.Timer(0.05, gate.set).start()
    assert torch.equal(brought(single, 0), values["expert0"])
    assert len(into) == 2
    single.close()


def test_buffer_that_a_read_under_way_has_is_given_out_after_its_end(
    experts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, reader, spec_of = experts
    single = opened(reader, spec_of, 1)
    gate = threading.Event()
    held: list[Held] = []
    read = FileIO.read

    def holding(self: FileIO, layout: Any, buffer: torch.Tensor, *rest: Any) -> Any:
        if held:
            assert gate.is_set(), "the buffer is being written to"
            return read(self, layout, buffer, *rest)
        held.append(Held(read(self, layout, buffer, *rest), gate))
        return held[0]

    monkeypatch.setattr(FileIO, "read", holding)
    with pytest.raises(KeyboardInterrupt):
        single.bring(0, 0)
    threading.Timer(0.05, gate.set).start()
    assert torch.equal(brought(single, 1), values["expert1"])
    single.close()
