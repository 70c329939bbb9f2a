"""The rules between modules: who may import whom, what importing costs, and the shape of files and functions."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for package in ("offload", "lowmem") for path in (ROOT / package).rglob("*.py"))
MODELS_AND_TRAINING = ("transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "tokenizers")
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 80
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "base", "misc"}


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Fully qualified names of the modules that any statement below `tree` imports, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names_under(names: Iterator[str], *packages: str) -> set[str]:
    return {name for name in names if any(name == package or name.startswith(package + ".") for package in packages)}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_module_imports_only_what_its_layer_may(path: Path) -> None:
    names = list(imports_of(ast.parse(path.read_text())))
    forbidden: set[str] = set()
    if path.is_relative_to(ROOT / "offload"):
        forbidden = names_under(iter(names), "lowmem", *MODELS_AND_TRAINING)
    elif path.parent.name in {"optim", "quant", "adapters"}:
        forbidden = names_under(iter(names), "lowmem.streaming")
    assert not forbidden, f"{name_of(path)} may not import {sorted(forbidden)}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_lowmem_uses_only_public_names_of_offload(path: Path) -> None:
    if path.is_relative_to(ROOT / "lowmem"):
        names = names_under(imports_of(ast.parse(path.read_text())), "offload")
        private = {name for name in names if any(part.startswith("_") for part in name.split("."))}
        assert not private, f"{name_of(path)} imports private names {sorted(private)}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_small_and_are_named_for_what_they_are(path: Path) -> None:
    assert path.stem not in VAGUE_NAMES, f"{name_of(path)}: name the noun it holds"
    source = path.read_text()
    assert source.count("\n") <= MAX_FILE_LINES, f"{name_of(path)} has {source.count(chr(10))} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert num_lines <= MAX_FUNCTION_LINES, f"{name_of(path)}: {node.name} has {num_lines} lines"


@pytest.mark.parametrize("package", ["lowmem", "offload"])
def test_importing_starts_nothing_and_is_quick(package: str) -> None:
    run = measure_import(package)
    assert run["num_new_threads"] == 0
    assert run["num_new_children"] == 0
    assert not set(run["modules"]) & set(MODELS_AND_TRAINING)
    if package == "offload":
        assert "lowmem" not in run["modules"]
    # CPU time, and again if it was slow: another process on the machine must not decide this test.
    assert run["import_s"] < 0.3 or measure_import(package)["import_s"] < 0.3


def measure_import(package: str) -> dict[str, Any]:
    program = f"""
import json, multiprocessing, sys, threading, time, torch
num_threads = threading.active_count()
start_s = time.process_time()
import {package}
import_s = time.process_time() - start_s
print(json.dumps(dict(
    import_s=import_s,
    num_new_threads=threading.active_count() - num_threads,
    num_new_children=len(multiprocessing.active_children()),
    modules=sorted({{name.split(".")[0] for name in sys.modules}}),
)))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result
