import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from offload.blocks import BlockSpec, TensorSpec, lay_out
from offload.errors import Closed, ReadError, SourceChanged, SourceError
from offload.files.file_io import FileIO
from offload.files.safetensors import SafetensorsSource
from tests.offload.not_files import NOT_FILES, put_in_place

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def write_raw(file: Path, header: Any, *, data: bytes = b"", length: int | None = None, pad: int = 0) -> Path:
    """Write a safetensors file that may lie. `header` is JSON to be, or bytes as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * pad
    file.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return file


def write_sharded(folder: Path) -> dict[str, Tensor]:
    """Two shards with an index, as `save_pretrained` writes them."""
    first = {"a": torch.randn(3, 5), "b": torch.randn(7).to(torch.bfloat16)}
    second = {"c": torch.randn(2, 2, 2), "d": torch.tensor(4.0), "e": torch.zeros(0, 3)}
    save_file(first, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(second, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    weight_map |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    write_index(folder, weight_map)
    return first | second


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def stored(spec: TensorSpec) -> Tensor:
    raw = spec.file.read_bytes()[spec.offset_bytes : spec.offset_bytes + spec.nbytes]
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.zeros(0, dtype=torch.uint8)


def assert_holds(source: SafetensorsSource, tensors: dict[str, Tensor]) -> None:
    assert set(source.tensors) == set(tensors)
    for name, tensor in tensors.items():
        spec = source.tensors[name]
        assert (spec.name, spec.dtype, spec.shape) == (name, tensor.dtype, tuple(tensor.shape))
        assert torch.equal(stored(spec), tensor.contiguous().reshape(-1).view(torch.uint8))


# ---- what is read


def test_sharded_checkpoint_is_found_through_its_index(tmp_path: Path) -> None:
    tensors = write_sharded(tmp_path)
    save_file({"zz": torch.ones(1)}, tmp_path / "unrelated.safetensors")
    with SafetensorsSource(tmp_path) as source:
        assert_holds(source, tensors)
        assert [file.name[:11] for file in source.files] == ["model-00001", "model-00002"]


def test_single_file_folder_one_file_and_a_list_of_files_are_read(tmp_path: Path) -> None:
    one, two = {"a": torch.randn(3)}, {"b": torch.randn(4)}
    save_file(one, tmp_path / "x.safetensors")
    save_file(two, tmp_path / "y.safetensors")
    (tmp_path / "._x.safetensors").write_bytes(b"left by another system")
    for location, tensors in (
        (tmp_path, one | two),
        (str(tmp_path), one | two),
        (tmp_path / "x.safetensors", one),
        ([tmp_path / "y.safetensors", tmp_path / "x.safetensors"], one | two),
    ):
        with SafetensorsSource(location) as source:
            assert_holds(source, tensors)
    save_file({"c": torch.zeros(1)}, tmp_path / "model.safetensors")
    with SafetensorsSource(tmp_path) as source:
        assert set(source.tensors) == {"c"}


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_is_known(tmp_path: Path, code: str) -> None:
    tensor = torch.randint(0, 2, (3, 5)).to(DTYPES[code])
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    assert f'"{code}"' in (tmp_path / "model.safetensors").read_bytes()[8:200].decode(errors="ignore")
    with SafetensorsSource(tmp_path) as source:
        assert_holds(source, {"w": tensor})


@pytest.mark.parametrize("pad", range(8))
def test_headers_of_odd_length_are_legal(tmp_path: Path, pad: int) -> None:
    data = os.urandom(12)
    header = {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}, "__metadata__": {"k": "v"}}
    write_raw(tmp_path / "model.safetensors", header, data=data, pad=pad)
    with SafetensorsSource(tmp_path) as source:
        assert stored(source.tensors["w"]).numpy().tobytes() == data
    assert load_file(tmp_path / "model.safetensors")["w"].numpy().tobytes() == data


def test_shards_that_are_links_out_of_the_folder_are_read(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    folder.mkdir(parents=True)
    tensors = write_sharded(blobs)
    for file in list(blobs.iterdir()):
        blob = file.rename(blobs / f"blob-{file.name[:11]}")
        (folder / file.name).symlink_to(Path("../../blobs") / blob.name)
    (tmp_path / "current").symlink_to(folder)
    with SafetensorsSource(tmp_path / "current") as source:
        assert_holds(source, tensors)


def test_index_decides_between_two_files_that_hold_the_same_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3), "b": torch.zeros(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.ones(3), "c": torch.ones(1)}, tmp_path / "y.safetensors")
    with pytest.raises(SourceError, match=r"tensor 'a': .*x.safetensors holds a tensor of the same name"):
        SafetensorsSource(tmp_path)
    write_index(tmp_path, {"a": "y.safetensors", "b": "./x.safetensors", "c": "y.safetensors"})
    with SafetensorsSource(tmp_path) as source:
        assert_holds(source, {"a": torch.ones(3), "b": torch.zeros(1), "c": torch.ones(1)})


def test_hundred_thousand_tensors_open_in_a_couple_of_seconds(tmp_path: Path) -> None:
    header = {
        f"model.layers.{i // 1000}.mlp.experts.{i % 1000}.up_proj.weight": {
            "dtype": "U8",
            "shape": [1, 1],
            "data_offsets": [i, i + 1],
        }
        for i in range(100_000)
    }
    write_raw(tmp_path / "model.safetensors", header, data=bytes(100_000))
    start_s = time.process_time()
    with SafetensorsSource(tmp_path) as source:
        assert len(source.tensors) == 100_000
    # CPU time, three times what it takes: other processes on the machine must not decide this test.
    assert time.process_time() - start_s < 5


# ---- files that are missing or of the wrong kind


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match=r"model-00002-of-00002.safetensors: file: it does not exist; download"):
        SafetensorsSource(tmp_path)


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="absent: location: expected a checkpoint folder"):
        SafetensorsSource(tmp_path / "absent")
    with pytest.raises(SourceError, match=r"\*.safetensors: the folder holds no such file"):
        SafetensorsSource(tmp_path)
    with pytest.raises(ValueError, match="at least one safetensors file, got an empty list"):
        SafetensorsSource([])


def test_pickled_checkpoint_is_refused_with_the_conversion_to_do(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(2)}, file)
    for location in (tmp_path, file):
        with pytest.raises(SourceError, match=r"pytorch_model.bin: the checkpoint is pickled.*save_pretrained\("):
            SafetensorsSource(location)


@pytest.mark.parametrize("kind", NOT_FILES)
def test_what_is_no_file_in_place_of_a_shard_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    found = put_in_place(tmp_path / "a.safetensors", kind)
    with pytest.raises(SourceError, match=rf"a.safetensors: file: .*expected a regular file, got {found}"):
        SafetensorsSource(tmp_path)
    with FileIO() as reader:
        spec = TensorSpec(
            name="w", dtype=torch.uint8, shape=(9,), file=tmp_path / "a.safetensors", offset_bytes=0, nbytes=9
        )
        layout = lay_out(BlockSpec(name="b", tensors=(spec,)))
        with pytest.raises(ReadError, match=rf"opening it: expected a regular file, got {found}"):
            reader.read(layout, torch.zeros(layout.buffer_bytes, dtype=torch.uint8)).wait()


@pytest.mark.parametrize("kind", NOT_FILES)
def test_what_is_no_file_in_place_of_the_index_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    found = put_in_place(tmp_path / "model.safetensors.index.json", kind)
    with pytest.raises(SourceError, match=rf"index.json: file: .*expected a regular file, got {found}"):
        SafetensorsSource(tmp_path)


def test_an_index_of_absurd_size_is_refused_without_reading_it(tmp_path: Path) -> None:
    with open(tmp_path / "model.safetensors.index.json", "wb") as file:
        file.truncate(5 << 30)
    with pytest.raises(SourceError, match=r"index.json: file: .*expected at most 100000000 bytes, got 5368709120"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    "raw", [b'{"weight_map": {"\\ud800": "a.safetensors"}}', b'{"weight_map": {"w": "\\ud800/a.safetensors"}}']
)
def test_names_that_are_no_text_are_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(raw)
    with pytest.raises(SourceError, match=r"index.json: (index|weight_map\['w'\]): .*ud800") as caught:
        SafetensorsSource(tmp_path)
    str(caught.value).encode()


def test_two_checkpoints_in_one_folder_are_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=r"weight_map: the folder also holds a model.safetensors .* two checkpoints"):
        SafetensorsSource(tmp_path)


# ---- headers that lie


def entry(dtype: Any = "F32", shape: Any = (2,), data_offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}


LIES: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b"{nonsense", b"", r"header: not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "header: not UTF-8"),
    "not an object": ([1], b"", "header: expected a JSON object, got list"),
    "nested deeply": (b'{"a":' + b"[" * 200_000, b"", "header: not valid JSON"),
    "absurd number": (b'{"a":' + b"9" * 10_000 + b"}", b"", "header: not valid JSON"),
    "same tensor twice": (b'{"w": {}, "v": {}, "w": {}}', b"", "header: key 'w' occurs twice"),
    "same field twice": (b'{"w": {"dtype": "F32", "dtype": "F32"}}', b"", "header: key 'dtype' occurs twice"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__: expected an object whose values are text"),
    "entry": ({"w": 3}, b"", "tensor 'w' entry: expected an object, got int"),
    "no fields": ({"w": {}}, b"", "tensor 'w' dtype: expected one of F64, .*got None"),
    "unknown dtype": ({"w": entry("F5")}, bytes(8), "tensor 'w' dtype: expected one of F64, .* got 'F5'"),
    "dtype of another type": ({"w": entry(["F32"])}, bytes(8), r"tensor 'w' dtype: .* got \['F32'\]"),
    "no shape": ({"w": entry(shape=None)}, bytes(8), "tensor 'w' shape: expected a list of whole numbers"),
    "negative shape": ({"w": entry(shape=[-2])}, bytes(8), r"tensor 'w' shape: .* got \[-2\]"),
    "true in shape": ({"w": entry(shape=[2, True])}, bytes(8), r"tensor 'w' shape: .* got \[2, True\]"),
    "fraction in shape": ({"w": entry(shape=[2.0])}, bytes(8), r"tensor 'w' shape: .* got \[2.0\]"),
    "absurd shape": ({"w": entry(shape=[2**70])}, bytes(8), "tensor 'w' shape: expected a list of whole numbers"),
    "too many dims": ({"w": entry(shape=[1] * 65)}, bytes(8), "tensor 'w' shape: expected at most 64"),
    "offsets not a pair": ({"w": entry(data_offsets=[0])}, bytes(8), r"data_offsets: expected \[begin, end\].*\[0\]"),
    "offsets negative": ({"w": entry(data_offsets=[-8, 0])}, bytes(8), r"data_offsets: .* got \[-8, 0\]"),
    "offsets backwards": ({"w": entry(data_offsets=[8, 0])}, bytes(8), r"data_offsets: .* got \[8, 0\]"),
    "offsets as text": ({"w": entry(data_offsets="08")}, bytes(8), "data_offsets: expected .* got '08'"),
    "size against shape": (
        {"w": entry(shape=[3])},
        bytes(8),
        r"tensor 'w' data_offsets: expected 12 bytes for shape \[3\] of F32, got 8",
    ),
    "product overflows": (
        {"w": entry("U8", [2**32, 2**32], [0, 0])},
        b"",
        "expected 18446744073709551616 bytes for shape .* got 0",
    ),
    "overlap": (
        {"w": entry(), "v": entry(data_offsets=[4, 12])},
        bytes(12),
        "tensor 'v' data_offsets: it overlaps 'w': expected byte",
    ),
    "same bytes twice": ({"w": entry(), "v": entry()}, bytes(8), "it overlaps '[vw]'"),
    "hole": (
        {"w": entry(), "v": entry(data_offsets=[12, 20])},
        bytes(20),
        "tensor 'v' data_offsets: it leaves a hole after 'w'",
    ),
    "hole at the start": ({"w": entry(data_offsets=[8, 16])}, bytes(16), "leaves a hole after the header"),
    "out of the file": ({"w": entry()}, bytes(7), "'w' data_offsets: it ends at byte .* it is truncated; download"),
    "bytes left over": ({"w": entry()}, bytes(9), "data_offsets: the last tensor ends at byte .*, the file has"),
}


@pytest.mark.parametrize("lie", LIES)
def test_header_that_lies_is_refused_with_file_field_and_remedy(tmp_path: Path, lie: str) -> None:
    header, data, match = LIES[lie]
    write_raw(tmp_path / "model.safetensors", header, data=data)
    with pytest.raises(SourceError, match=match) as caught:
        SafetensorsSource(tmp_path)
    assert caught.value.file == tmp_path / "model.safetensors"
    assert str(caught.value).startswith(f"{tmp_path / 'model.safetensors'}: ")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("length", "match"),
    [
        (10**9, "header length: expected at most 100000000 bytes, got 1000000000; this is not a safetensors file"),
        (2**64 - 1, "header length: expected at most 100000000 bytes, got 18446744073709551615"),
        (1000, r"header length: expected 1008 bytes with the header, the file has 10: it is truncated"),
    ],
)
def test_header_of_absurd_length_is_refused(tmp_path: Path, length: int, match: str) -> None:
    write_raw(tmp_path / "model.safetensors", {}, length=length)
    with pytest.raises(SourceError, match=match):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 1, 7, 8, 20, -1])
def test_file_cut_short_anywhere_is_refused(tmp_path: Path, num_bytes: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(100)}, file)
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(SourceError, match="truncated"):
        SafetensorsSource(tmp_path)


# ---- indexes that lie


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/evil.safetensors", "sub/../../evil.safetensors", "out/evil.safetensors"]
)
def test_index_that_names_a_file_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "evil.safetensors")
    (folder / "out").symlink_to(tmp_path)
    write_index(folder, {"w": name})
    with pytest.raises(
        SourceError, match=rf"index.json: weight_map\['w'\]: it names a file outside .*{re.escape(name)}"
    ):
        SafetensorsSource(folder)


@pytest.mark.parametrize(
    ("index", "match"),
    [
        (b"{", "index: not valid JSON"),
        (b"[]", "index: expected a JSON object, got list"),
        (b"{}", "weight_map: expected a non-empty object of tensor name to file name, got NoneType"),
        (b'{"weight_map": {}}', "weight_map: expected a non-empty object"),
        (b'{"weight_map": {"w": 3}}', r"weight_map\['w'\]: expected the name of a .safetensors file, got 3"),
        (b'{"weight_map": {"w": ["a"]}}', r"weight_map\['w'\]: expected the name of a .safetensors file"),
        (b'{"weight_map": {"w": "pytorch_model.bin"}}', r"weight_map\['w'\]: .* got 'pytorch_model.bin'"),
        (b'{"weight_map": {"w": "a\\u0000.safetensors"}}', r"weight_map\['w'\]: .* got 'a\\x00.safetensors'"),
        (b'{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', "index: key 'w' occurs twice"),
    ],
)
def test_index_that_is_no_index_is_refused(tmp_path: Path, index: bytes, match: str) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(SourceError, match=match):
        SafetensorsSource(tmp_path)


def test_index_that_names_a_tensor_its_shard_lacks_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    write_index(tmp_path, {"w": "a.safetensors", "v": "a.safetensors"})
    with pytest.raises(SourceError, match=r"a.safetensors: tensor 'v': the index says that this file holds it"):
        SafetensorsSource(tmp_path)


def test_refused_checkpoint_leaves_no_file_open(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match="truncated") as caught:
        SafetensorsSource(tmp_path)
    assert caught.value.__traceback__, "which keeps the source from being collected"
    assert not open_files_under(tmp_path)
    with SafetensorsSource(tmp_path / "model-00001-of-00002.safetensors"):
        assert len(open_files_under(tmp_path)) == 1
    assert not open_files_under(tmp_path)


def open_files_under(folder: Path) -> list[str]:
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return [name for name in names if name.startswith(str(folder))]


# ---- identity


def test_fingerprint_is_stable_and_changes_with_any_file(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    prints = []
    for _ in range(2):
        with SafetensorsSource(tmp_path) as source:
            prints.append(source.fingerprint())
    assert prints[0] == prints[1]
    moved = tmp_path.rename(tmp_path.with_name("elsewhere"))
    with SafetensorsSource(moved) as source:
        assert source.fingerprint() == prints[0]
    file = moved / "model-00002-of-00002.safetensors"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    with SafetensorsSource(moved) as source:
        prints.append(source.fingerprint())
    assert prints[2] != prints[0]


def rewrite(file: Path) -> None:
    raw = file.read_bytes()
    with open(file, "r+b") as opened:
        opened.write(raw)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


def replace(file: Path) -> None:
    status = file.stat()
    new = file.with_name("new")
    new.write_bytes(file.read_bytes())
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.rename(file)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda file: os.truncate(file, 100), "model.safetensors changed while .* expected 4.. bytes, got 100"),
        (rewrite, "it was written to"),
        (replace, "the path was replaced"),
        (Path.unlink, "it is no longer there"),
    ],
)
def test_file_that_changes_is_found_out(tmp_path: Path, change: Any, match: str) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(100)}, file)
    with SafetensorsSource(tmp_path) as source:
        source.check_unchanged(file)
        change(file)
        with pytest.raises(SourceChanged, match=match):
            source.check_unchanged(file)


@pytest.mark.parametrize("numel", [1, 40_000])
def test_copies_have_one_fingerprint_and_another_training_of_the_model_has_its_own(tmp_path: Path, numel: int) -> None:
    weight = torch.arange(float(numel))
    copies, files = [], []
    for name, values in {"here": weight, "there": weight, "trained on": weight + 1e-2}.items():
        (tmp_path / name).mkdir()
        save_file({"w": values}, tmp_path / name / "model.safetensors")
        os.utime(tmp_path / name / "model.safetensors", ns=(len(files), len(files)))
        with SafetensorsSource(tmp_path / name) as source:
            copies.append(source.fingerprint(of_copies=True))
            files.append(source.fingerprint())
    assert copies[0] == copies[1] != copies[2]
    assert len(set(files)) == 3


def test_closed_source_says_so(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    source.close()
    source.close()
    assert source.tensors["w"].nbytes == 4
    with pytest.raises(Closed, match="the source was closed"):
        source.check_unchanged(source.files[0])
