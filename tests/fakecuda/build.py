"""Compile the simulated GPU for the interpreter that runs this: `python -m tests.fakecuda.build`.

The library lies in build/fakecuda under a name that holds what it was made from, so that a second call finds it.
Nothing is built, and the reason is said, where there is no C++ compiler or torch is not a CPU build.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "simulator"
FOLDER = Path(__file__).resolve().parents[2] / "build" / "fakecuda"


def library() -> Path:
    """Where the library for these sources and this interpreter and torch lies, built or not."""
    from importlib.metadata import version

    parts = [source.read_bytes() for source in sorted(SOURCES.iterdir())]
    made_from = b"\0".join([*parts, version("torch").encode(), sys.version.encode()])
    name = f"fakecuda_{hashlib.sha256(made_from).hexdigest()[:12]}"
    return FOLDER / name / ("_fakecuda" + sysconfig.get_config_var("EXT_SUFFIX"))


def reason_not_to_build() -> str | None:
    """Why the simulated GPU cannot be had here; None if it can."""
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return f"torch {torch.__version__} brings its own GPU; the simulated one needs the CPU build"
    if sys.platform != "linux":
        return f"the simulated GPU maps memory as Linux does, this is {sys.platform}"
    if compiler() is None:
        return "no C++ compiler (g++ or clang++) was found"
    return None


def compiler() -> str | None:
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None
    )


def build() -> Path:
    """Compile the library if it is not there yet; half a minute.

    Raises:
        RuntimeError: It cannot be had here, or the compiler failed; says why.
    """
    out = library()
    if out.is_file():
        return out
    reason = reason_not_to_build()
    if reason is not None:
        raise RuntimeError(reason)
    import torch
    from torch.utils import cpp_extension

    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"{out.name}.{os.getpid()}")
    libraries = cpp_extension.library_paths()[0]
    command = [
        compiler() or "g++",
        *("-O1", "-g0", "-std=c++20", "-fPIC", "-shared", "-w"),
        "-DTORCH_EXTENSION_NAME=_fakecuda",
        "-DTORCH_API_INCLUDE_EXTENSION_H",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-isystem{path}" for path in cpp_extension.include_paths()),
        f"-I{sysconfig.get_paths()['include']}",
        str(SOURCES / "module.cpp"),
        *("-o", str(unfinished)),
        *(f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python", f"-Wl,-rpath,{libraries}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-4000:]}")
    # Its own name last: two runs at once build two files and agree on one.
    unfinished.replace(out)
    return out


if __name__ == "__main__":
    print(build())
