"""The rules of the house: who may import whom, where private names of others stand, how large rooms and files get."""

import ast
import importlib
import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for package in ("offload", "lowmem") for path in (ROOT / package).rglob("*.py"))
MODELS_AND_TRAINING = ("transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "tokenizers")
# From the ground up. A room imports itself and what stands before it, also lazily and for types.
ROOMS = (
    "offload",
    "lowmem.errors",
    "lowmem.host_memory",
    "lowmem.progress_line",
    "lowmem.processes",
    "lowmem.internals",
    "lowmem.quantization",
    "lowmem.models",
    "lowmem.experts",
    "lowmem.packing",
    "lowmem.headers",
    "lowmem.optim",
    "lowmem.planning",
    "lowmem.adapters",
    "lowmem.streaming",
    "lowmem.full",
    "lowmem.generation",
    "lowmem.essa",
    "lowmem.loading",
    "lowmem.machines",
    "lowmem.monitoring",
    "lowmem.doctor",
    "lowmem.api",
    "lowmem.cli",
)
FACES = {"lowmem", "lowmem.__main__"}
MAX_FILES = 125
# What is counted apart from these, and why.
COUNTED_APART = {
    "lowmem/full/gpu_tier.py": "state of full tuning behind a GPU: no other file has anything to do with one",
    "lowmem/quantization": "a room of its own: one file for each format in which weights are packed",
    "lowmem/internals/bitsandbytes.py": "the kernels of that room",
    "lowmem/packing": "a room of its own: what is packed, the bake, where its results are kept",
    "lowmem/experts": "a room of its own: experts of a mixture are taken apart only where they are packed",
    "lowmem/internals/experts.py": "the private names of that room",
    "lowmem/internals/unread.py": "products of a recomputation that nobody reads: torch's dispatch, and nothing else",
    "lowmem/adapters/expert_export.py": "the way of adapters of experts to inference servers",
    "lowmem/adapters/merged_values.py": "the values of a merge, which two kinds of output are written from",
    "lowmem/adapters/merge_packed.py": "the kind that is packed",
    "lowmem/monitoring/account.py": "where a run's seconds and bytes went, for `lowmem trace` and the report",
    "lowmem/monitoring/report.py": "the page that shows it",
    "lowmem/headers": "models whose weights are not here: known from the hub's headers, or from config.json",
    "lowmem/planning/optimizer_sizes.py": "what any optimizer keeps of a model, for plans that are told of one",
    "lowmem/full/shared_state.py": "state of full tuning that several processes of a machine have in common",
    "lowmem/processes": "a room of its own: what several processes of a run agree on and share",
    "offload/sharing": "a room of its own: memory and reads that several processes of a machine share",
    "lowmem/machines": "machines that are planned for, and what was measured on this one",
}
MAX_ROOT_FILES = 9
MAX_FOLDER_FILES = 14
MIN_FILE_LINES = 80
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
# Faces, and tables that nothing else is opened together with.
SHORT_FILES = {"lowmem/errors.py", "lowmem/planning/limits.py"}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "base", "misc"}
OWN_PRIVATE_PACKAGES = ("lowmem", "offload")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Fully qualified names of whatever any statement below `tree` imports, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names_under(names: Iterator[str], *packages: str) -> set[str]:
    return {name for name in names if any(name == package or name.startswith(package + ".") for package in packages)}


def imported_modules(path: Path) -> set[str]:
    """Our own modules that a file imports from, lazily and for types too."""
    found = set()
    for name in names_under(imports_of(tree_of(path)), "lowmem", "offload"):
        while name not in MODULES:
            name = name.rpartition(".")[0]
        found.add(name)
    return found


def room_of(module: str) -> str | None:
    return max((room for room in ROOMS if module == room or module.startswith(room + ".")), key=len, default=None)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_only_go_down(path: Path) -> None:
    module = module_of(path)
    if module in FACES:
        return
    room = room_of(module)
    assert room is not None, f"{name_of(path)} is in no room; give its room a place in ROOMS"
    floor = ROOMS.index(room)
    up = sorted(name for name in imported_modules(path) if (other := room_of(name)) and ROOMS.index(other) > floor)
    assert not up, f"{name_of(path)}: {room} may not import {up}, which stand above it"
    if room == "offload":
        foreign = names_under(imports_of(tree_of(path)), *MODELS_AND_TRAINING)
        assert not foreign, f"{name_of(path)}: offload knows nothing of models, yet imports {sorted(foreign)}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    arrows = {
        module: {name for name in imported_modules(path) if name != module and MODULES[name].name != "__init__.py"}
        for module, path in MODULES.items()
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def follow(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for name in sorted(arrows[module]):
                follow(name, (*way, module))
            done.add(module)

    for module in sorted(arrows):
        follow(module, ())


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_lowmem_uses_only_public_names_of_offload(path: Path) -> None:
    if path.is_relative_to(ROOT / "lowmem"):
        import offload

        names = {name.removeprefix("offload.") for name in names_under(imports_of(tree_of(path)), "offload")}
        beyond = sorted(names - set(offload.__all__))
        assert not beyond, f"{name_of(path)} imports {beyond}, which offload/__init__.py does not export"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_private_names_of_other_packages_stand_in_internals_only(path: Path) -> None:
    if not path.is_relative_to(ROOT / "lowmem" / "internals"):
        assert not list(foreign_private_names(path)), (
            f"{name_of(path)}: move these behind functions in lowmem/internals/"
        )


@cache
def own_private_names() -> frozenset[str]:
    """Every `_name` that this project itself defines: methods, functions, attributes, slots, fields."""
    found: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    found.add(name)
                case (
                    ast.Name(id=name, ctx=ast.Store())
                    | ast.Attribute(attr=name, value=ast.Name(id="self" | "cls"), ctx=ast.Store())
                ):
                    found.add(name)
                case _:
                    pass
    return frozenset(name for name in found if name.startswith("_"))


# What Python itself and its documented protocols call so.
_PYTHONS_OWN = frozenset({"_replace", "_asdict", "_fields", "_make"})
_FRAMES_AND_TABLES = {("sys", "_getframe"), ("sys", "modules")}


def foreign_private_names(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        match node:
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] not in OWN_PRIVATE_PACKAGES:
                parts = [*module.split("."), *(alias.name for alias in node.names)]
                if module != "__future__" and any(is_private(part) for part in parts):
                    yield f"line {node.lineno}: {module} {[alias.name for alias in node.names]}"
            case ast.Attribute(value=ast.Name(id=owner), attr=attr) if (owner, attr) in _FRAMES_AND_TABLES:
                yield f"line {node.lineno}: {owner}.{attr}"
            case ast.Attribute(attr="__class__", ctx=ast.Store()):
                yield f"line {node.lineno}: an assignment to __class__"
            case ast.Attribute(attr=attr) if is_private(attr) and attr not in own_private_names() | _PYTHONS_OWN:
                yield f"line {node.lineno}: .{attr}"
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=str(attr)), *_]
            ):
                if is_private(attr) and attr not in own_private_names():
                    yield f"line {node.lineno}: {attr!r} by name"
            case _:
                pass


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_all_lists_what_can_be_imported(path: Path) -> None:
    module = importlib.import_module(module_of(path))
    exported = getattr(module, "__all__", [])
    assert len(exported) == len(set(exported))
    missing = [name for name in exported if not hasattr(module, name)]
    assert not missing, f"{name_of(path)}: __all__ names {missing}, which cannot be imported"


def test_one_public_class_name_means_one_thing() -> None:
    places = defaultdict(list)
    for path in SOURCES:
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name_of(path))
    twice = {name: found for name, found in places.items() if len(found) > 1}
    assert not twice


@cache
def public_classes() -> dict[str, tuple[Path, ast.ClassDef]]:
    return {
        node.name: (path, node)
        for path in SOURCES
        for node in tree_of(path).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    }


def documented_methods(name: str) -> set[str]:
    """Methods of a class, inherited ones too, that say what they do."""
    if name not in public_classes():
        return set()
    node = public_classes()[name][1]
    found = {one.name for one in node.body if isinstance(one, ast.FunctionDef) and ast.get_docstring(one)}
    return found.union(*(documented_methods(ast.unparse(base)) for base in node.bases))


def test_public_methods_say_what_they_do() -> None:
    """Or whoever they are inherited from does; a property that ends in its unit has said all there is."""
    silent = [
        f"{name_of(path)}: {name}.{one.name}"
        for name, (path, node) in public_classes().items()
        for one in node.body
        if isinstance(one, ast.FunctionDef)
        and not one.name.startswith("_")
        and one.name not in documented_methods(name)
        and one.name not in ("forward", "backward")  # torch says what they are
        and not (one.name.endswith(("bytes", "_s")) and "property" in map(ast.unparse, one.decorator_list))
    ]
    assert not silent


def test_folders_hold_few_files() -> None:
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in SOURCES)
    apart = tuple(COUNTED_APART)
    assert sum(not name_of(path).startswith(apart) for path in SOURCES) <= MAX_FILES
    assert counts["lowmem"] <= MAX_ROOT_FILES
    assert not {folder: count for folder, count in counts.items() if count > MAX_FOLDER_FILES}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_hold_one_mechanism_and_are_named_for_it(path: Path) -> None:
    assert path.stem not in VAGUE_NAMES, f"{name_of(path)}: name the mechanism it holds"
    num_lines = path.read_text().count("\n")
    assert num_lines <= MAX_FILE_LINES, f"{name_of(path)} has {num_lines} lines"
    if not path.stem.startswith("__") and name_of(path) not in SHORT_FILES:
        assert num_lines >= MIN_FILE_LINES, f"{name_of(path)} has {num_lines} lines: put it where it is opened together"
    for node in ast.walk(tree_of(path)):
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
