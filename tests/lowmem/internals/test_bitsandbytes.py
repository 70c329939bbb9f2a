"""bitsandbytes' library has the kernels that are called by address, and they write what they are taken to write."""

from __future__ import annotations

import logging
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes import cextension, functional

from lowmem.errors import UnsupportedError
from lowmem.internals import bitsandbytes as internals


@pytest.fixture(autouse=True)
def _asked_anew() -> None:
    internals._library.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_kernel_of_nibbles_writes_table_times_absmax(code: internals.Code, dtype: torch.dtype) -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    absmax = torch.tensor([1.0, 3.0, 0.7, 1e-3])
    out = torch.zeros(512, dtype=dtype)
    assert internals.unpack_nibbles(packed, absmax, out, code=code, block_size=128)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten().long()
    expected = functional.get_4bit_type(code, device="cpu")[codes] * absmax.repeat_interleave(128)
    assert torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernel_of_bytes_writes_table_times_absmax(dtype: torch.dtype) -> None:
    packed, table = torch.arange(256, dtype=torch.uint8), torch.linspace(-1, 1, 256)
    absmax, out = torch.tensor([2.0, 0.3]), torch.zeros(256, dtype=dtype)
    assert internals.unpack_bytes(packed, absmax, table, out, block_size=128)
    assert torch.equal(out, (table * absmax.repeat_interleave(128)).to(dtype))


@pytest.mark.parametrize(
    "wrong",
    [
        {"absmax": torch.zeros(1, dtype=torch.float64)},
        {"packed": torch.zeros(64, dtype=torch.uint8)[::2]},
        {"out": torch.zeros(64, dtype=torch.float64)},
        {"out": torch.zeros(8, 8).t()},
    ],
    ids=str,
)
def test_memory_that_a_kernel_would_read_wrongly_is_refused(wrong: dict[str, torch.Tensor]) -> None:
    right = {"packed": torch.zeros(32, dtype=torch.uint8), "absmax": torch.zeros(1), "out": torch.zeros(64)}
    with pytest.raises(ValueError, match="expected contiguous"):
        internals.unpack_nibbles(**(right | wrong), code="nf4", block_size=64)


def test_library_without_the_kernels_fails_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cextension, "lib", SimpleNamespace())
    with pytest.raises(UnsupportedError, match=rf"bitsandbytes {version('bitsandbytes')} .*no cdequantize_blockwise"):
        internals.unpack_nibbles(
            torch.zeros(1, dtype=torch.uint8), torch.zeros(1), torch.zeros(2), code="nf4", block_size=64
        )
    internals._library.cache_clear()
    monkeypatch.delattr(cextension, "lib")
    with pytest.raises(UnsupportedError, match=r"cextension\.lib"):
        internals.unpack_bytes(
            torch.zeros(1, dtype=torch.uint8), torch.zeros(1), torch.zeros(256), torch.zeros(1), block_size=64
        )


def test_without_a_library_torch_is_left_to_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "is_installed", lambda: False)
    args = torch.zeros(1, dtype=torch.uint8), torch.zeros(1), torch.zeros(2)
    assert not internals.unpack_nibbles(*args, code="nf4", block_size=64)


def test_it_is_imported_without_its_advertisement() -> None:
    program = (
        "import torch; from lowmem.internals.bitsandbytes import unpack_nibbles as unpack;"
        "unpack(torch.zeros(1, dtype=torch.uint8), torch.zeros(1), torch.zeros(2), code='nf4', block_size=64)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "kernels" not in done.stderr
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").level == logging.NOTSET
