"""NF4, FP4 and int8 as bitsandbytes stores them: found by name and size, and the values that bitsandbytes makes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import save_file
from torch import Tensor

from lowmem.errors import UnsupportedError
from lowmem.quantization import kernels
from lowmem.quantization.registry import find_packed, format_of
from offload import SafetensorsSource, SourceError

FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT_BIT = {"quant_method": "bitsandbytes", "load_in_8bit": True}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def stored_4bit(weight: Tensor, name: str = "p.weight", **options: Any) -> tuple[dict[str, Tensor], Any]:
    """What a checkpoint holds of a weight, and bitsandbytes' own state."""
    options = {"quant_type": "nf4", "compress_statistics": True, **options}
    packed, state = functional.quantize_4bit(weight, **options)
    parts = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {name: packed, **parts}, state


def stored_int8(weight: Tensor, name: str = "p") -> dict[str, Tensor]:
    codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    return {f"{name}.weight": codes, f"{name}.SCB": scales, f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8)}


def find(folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Any:
    save_file(dict(tensors), folder / "model.safetensors")
    with SafetensorsSource(folder) as source:
        return find_packed(settings, source.tensors, file=folder / "config.json")


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


OPTIONS: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({}, (96, 64)),
    ({"compress_statistics": False}, (96, 64)),
    ({"quant_type": "fp4"}, (96, 64)),
    ({"quant_type": "fp4", "compress_statistics": False, "blocksize": 128}, (96, 64)),
    # Blocks that begin within a row, more than one block of absmaxes, a last block that is short.
    ({}, (257, 66)),
    ({"blocksize": 32}, (130, 36)),
    ({"blocksize": 4096}, (96, 64)),
    ({"blocksize": 2048, "compress_statistics": False}, (67, 62)),
    ({"quant_storage": torch.bfloat16}, (96, 64)),
    ({"quant_storage": torch.float32, "quant_type": "fp4"}, (96, 64)),
    # An odd number of weights, and of columns.
    ({}, (5, 13)),
    # A stack, as of experts.
    ({}, (3, 32, 24)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("options", "shape"), OPTIONS, ids=str)
def test_four_bit_weight_has_the_values_of_its_specification(
    options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors, state = stored_4bit(drawn(*shape).to(torch.bfloat16), **options)
    found = find(tmp_path, tensors, FOUR_BIT | {"bnb_4bit_quant_type": state.quant_type})
    weight = found["p.weight"]
    assert (weight.shape, weight.format, set(found)) == (shape, state.quant_type, {"p.weight"})
    assert {part.name for part in (*weight.parts, *weight.read_once)} == set(tensors)
    expected = by_the_book(tensors, shape)
    assert torch.equal(weight.make(tensors, torch.float32), expected)
    assert torch.equal(weight.make(tensors, dtype), expected.to(dtype))


def by_the_book(tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """The definition, in plain steps."""
    parts = {name.removeprefix("p.weight"): tensor for name, tensor in tensors.items()}
    state = json.loads(bytes(next(tensor for name, tensor in parts.items() if "quant_state" in name).tolist()))
    packed = parts[""].view(torch.uint8).flatten()
    codes = [nibble for byte in packed.tolist() for nibble in (byte >> 4, byte & 15)]
    absmax = parts[".absmax"].float()
    if "nested_blocksize" in state:
        scales = parts[".nested_absmax"].repeat_interleave(state["nested_blocksize"])[: absmax.numel()]
        absmax = parts[".nested_quant_map"][parts[".absmax"].long()] * scales + torch.tensor(state["nested_offset"])
    num = torch.Size(shape).numel()
    values = parts[".quant_map"][torch.tensor(codes[:num])] * absmax.repeat_interleave(state["blocksize"])[:num]
    return values.view(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_four_bit_weight_has_the_values_of_bitsandbytes(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors, state = stored_4bit(drawn(192, 128))
    made = find(tmp_path, tensors, FOUR_BIT)["p.weight"].make(tensors, dtype)
    state.dtype = dtype
    assert torch.equal(made, functional.dequantize_4bit(tensors["p.weight"], state))


@pytest.mark.parametrize("shape", [(24, 40), (1, 7), (1500, 900)], ids=str)
def test_int8_weight_has_the_values_of_bitsandbytes(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = stored_int8(drawn(*shape))
    weight = find(tmp_path, tensors, EIGHT_BIT)["p.weight"]
    expected = functional.int8_vectorwise_dequant(tensors["p.weight"], tensors["p.SCB"])
    assert {part.name for part in (*weight.parts, *weight.read_once)} == set(tensors)
    for dtype in DTYPES:
        assert torch.equal(weight.make(tensors, dtype), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num", [1, 63, 64, 65, 4097, 100_003])
def test_torch_makes_the_bits_of_the_kernels(num: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_TORCH_ELEMENTS", 4096)
    made = torch.Generator().manual_seed(num)
    packed = torch.randint(0, 256, (num,), generator=made, dtype=torch.uint8)
    absmax = torch.rand(-(-num // 64), generator=made)
    table = torch.rand(256, generator=made)
    results = []
    for has_kernels in (True, False):
        if not has_kernels:
            monkeypatch.setattr(kernels, "unpack_bytes", lambda *_, **__: False)
            monkeypatch.setattr(kernels, "unpack_nibbles", lambda *_, **__: False)
        # Memory behind the end is left alone.
        out = torch.full((3, num + 8), 7.0).to(dtype)
        kernels.bytes_of_table(packed, absmax, table, out[0, :num], block_size=64)
        for row, code in enumerate(kernels.CODES, start=1):
            codes = packed[: -(-num // 2)]
            kernels.nibbles(codes, absmax, torch.tensor(kernels.CODES[code]), out[row, :num], code=code, block_size=64)
        assert bool((out[:, num:] == 7).all())
        results.append(out)
    assert torch.equal(*results)


@pytest.mark.parametrize("code", list(kernels.CODES))
def test_tables_are_those_of_bitsandbytes(code: str) -> None:
    expected = functional.get_4bit_type(code, device="cpu")
    assert torch.equal(torch.tensor(kernels.CODES[code]).abs(), expected.abs())  # type: ignore[index]
    assert torch.equal(torch.tensor(kernels.CODES[code]), expected)  # type: ignore[index]


def _state(change: Mapping[str, object]) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        key = "p.weight.quant_state.bitsandbytes__nf4"
        value = json.loads(bytes(tensors[key].tolist())) | change
        tensors[key] = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)

    return edit


def _cut(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no absmax": (lambda t: t.pop("p.weight.absmax"), r"expected p.weight.absmax beside it"),
    "no table": (lambda t: t.pop("p.weight.quant_map"), r"expected p.weight.quant_map beside it"),
    "no state": (lambda t: t.pop("p.weight.quant_state.bitsandbytes__nf4"), r"quant_state.bitsandbytes__nf4 beside"),
    "no weight": (lambda t: t.pop("p.weight"), r"expected p.weight beside it"),
    "no nested absmax": (lambda t: t.pop("p.weight.nested_absmax"), r"expected p.weight.nested_absmax beside"),
    "short weight": (_cut("p.weight"), r"p.weight: expected 3072 bytes for shape \[96, 64\], got 3071"),
    "short absmax": (_cut("p.weight.absmax"), r"p.weight.absmax: expected 96 elements, got shape \[95\]"),
    "short nested table": (_cut("p.weight.nested_quant_map"), r"expected 256 elements, got shape \[255\]"),
    "absmax of another kind": (
        lambda t: t.update({"p.weight.absmax": torch.zeros(96)}),
        r"p.weight.absmax: expected uint8, got float32",
    ),
    "another table": (
        lambda t: t.update({"p.weight.quant_map": torch.linspace(-1, 1, 16)}),
        r"quant_map: expected the values of nf4, got \[-1.0, ",
    ),
    "block size": (_state({"blocksize": 48}), r"blocksize: expected one of 32, 64, .*got 48"),
    "another shape": (_state({"shape": [96, 65]}), r"expected 3120 bytes for shape \[96, 65\], got 3072"),
    "no shape": (_state({"shape": None}), r"shape: expected a list"),
    "empty shape": (_state({"shape": [0, 4]}), r"shape: expected sizes of at least 1"),
    "another type": (_state({"quant_type": "fp4"}), r"quant_type: expected nf4"),
    "no offset": (_state({"nested_offset": "x"}), r"nested_offset: expected a number, got 'x'"),
    "infinite offset": (_state({"nested_offset": float("inf")}), r"nested_offset: expected a number"),
    "nested dtype": (_state({"nested_dtype": "bfloat16"}), r"nested_dtype: expected float32, got bfloat16"),
    "nested block size": (_state({"nested_blocksize": 0}), r"nested_blocksize: expected at least 1"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_four_bit_weight_is_one_sentence(damage: str, tmp_path: Path) -> None:
    tensors, _ = stored_4bit(drawn(96, 64))
    change, said = DAMAGE[damage]
    change(tensors)
    with pytest.raises(SourceError, match=said):
        find(tmp_path, tensors, FOUR_BIT)


def test_absmax_that_a_processor_has_rearranged_is_refused(tmp_path: Path) -> None:
    # bitsandbytes 0.50 leaves it so after an evaluation on some processors; read as it is, it would be wrong by 40%.
    tensors, _ = stored_4bit(drawn(96, 64), compress_statistics=False)
    tensors["p.weight.absmax"] = torch.zeros(1, 96, dtype=torch.bfloat16)
    with pytest.raises(SourceError, match=r"absmax: expected float32, got bfloat16"):
        find(tmp_path, tensors, FOUR_BIT)


INT8_DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], type[Exception], str]] = {
    "no scales": (lambda t: t.pop("p.SCB"), SourceError, r"p.weight: expected p.SCB beside it"),
    "no weight": (lambda t: t.pop("p.weight"), SourceError, r"p.SCB: expected p.weight beside it"),
    "short scales": (_cut("p.SCB"), SourceError, r"p.SCB: expected 24 elements, got shape \[23\]"),
    "a flat weight": (
        lambda t: t.update({"p.weight": t["p.weight"].flatten()}),
        SourceError,
        r"expected rows and columns, got shape \[960\]",
    ),
    "tiles": (
        lambda t: t.update({"p.weight_format": torch.tensor(2, dtype=torch.uint8)}),
        UnsupportedError,
        r"p.weight_format=2 is not supported: .*tiles",
    ),
}


@pytest.mark.parametrize("damage", INT8_DAMAGE)
def test_damaged_int8_weight_is_one_sentence(damage: str, tmp_path: Path) -> None:
    tensors = stored_int8(drawn(24, 40))
    change, kind, said = INT8_DAMAGE[damage]
    change(tensors)
    with pytest.raises(kind, match=said):
        find(tmp_path, tensors, EIGHT_BIT)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "hqq"}, r"quantised with hqq is not supported: .*bitsandbytes nf4"),
        ({"quant_method": 7}, r"quantised with 7 is not supported"),
        ({}, r"quantised with None is not supported"),
        ("nf4", r"quantization_config 'nf4' is not supported: it is not an object"),
        (FOUR_BIT | {"bnb_4bit_quant_type": "nf5"}, r"bnb_4bit_quant_type='nf5'"),
        (EIGHT_BIT | {"llm_int8_has_fp16_weight": True}, r"llm_int8_has_fp16_weight=True"),
    ],
    ids=str,
)
def test_unknown_settings_are_refused_by_name(settings: object, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        format_of(settings)


def test_settings_without_packed_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"quantization_config: it says that weights are stored as nf4, and"):
        find(tmp_path, {"p.weight": torch.zeros(4, 4)}, FOUR_BIT)


def test_weights_are_found_beside_plain_ones(tmp_path: Path) -> None:
    tensors, _ = stored_4bit(drawn(8, 64), name="a.weight")
    found = find(tmp_path, {**tensors, "b.weight": torch.zeros(4, 4)}, FOUR_BIT)
    assert set(found) == {"a.weight"}
    weight = found["a.weight"]
    assert (weight.num_params, weight.nbytes) == (512, 256 + 8 + 64 + 4 + 1024)
    with pytest.raises(SourceError, match=r"a\.weight: too odd"):
        replace(weight).refuse("too odd")
