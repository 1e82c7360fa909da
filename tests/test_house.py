"""The layout of docs/structure.md holds: no import runs up, no circle, no long file, no long function.

An import counts wherever it stands: at the top of a file, inside a function, or under `TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

from tests import ROOT
from tests.quick import LEFT_OUT

FLOORS = {
    0: ("atlas_kernels",),
    1: ("checks", "counts", "docstrings", "progress", "policy", "report", "planner"),
    2: ("core",),
    3: ("sampling", "controller"),
    4: ("speculators", "audit"),
    5: ("config", "decode", "sync"),
    6: ("vllm", "replay"),
    7: ("rollout", "training", "doctor"),
    8: ("integrations",),
    9: ("engine",),
    10: ("atlas_rl", "pages"),  # the package itself, with `cli` and `__main__`
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}

# Beyond the floors: who may not import what, and the modules that may all the same.
NEVER = (
    ("report", ("atlas_kernels", "torch"), ()),
    ("planner", ("atlas_kernels", "torch", "numpy", "transformers"), ()),
    ("controller", ("torch", "atlas_rl.policy"), ()),
    ("speculators", ("atlas_rl.controller",), ()),
    ("", ("trl",), ("atlas_rl.integrations",)),
    ("", ("vllm",), ("atlas_rl.vllm", "atlas_rl.integrations.trl.vllm")),
    ("vllm", ("vllm.v1", "vllm.model_executor", "vllm.distributed"), ("atlas_rl.vllm.internals",)),
)
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def files_of(*folders: str) -> list[Path]:
    return sorted(chain.from_iterable((ROOT / folder).rglob("*.py") for folder in folders))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[parts[0] == "kernels" : -1 if parts[-1] == "__init__" else None])


MODULES = {module_name(path): path for path in files_of("atlas_rl", "kernels")}
TESTS = {module_name(path): path for path in files_of("tests")}


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules that a file imports; of a `from`, the name behind it where that is one of the `known` modules."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports are not used here"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in names}
    return found


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def room_of(module: str) -> str | None:
    """The folder of a module of ours, or the file itself where it lies beside the folders; None for others."""
    if not within(module, "atlas_rl", "atlas_kernels"):
        return None
    package, _, rest = module.partition(".")
    room = rest.partition(".")[0] if package == "atlas_rl" else package
    return "atlas_rl" if room in ("", "cli", "__main__") else room


IMPORTS = {module: imports_of(path, MODULES) for module, path in MODULES.items()}


def test_every_room_has_a_floor():
    assert {room_of(module) for module in MODULES} == set(FLOOR_OF)


def test_no_import_runs_up():
    up = [
        f"{module} -> {other}"
        for module, others in IMPORTS.items()
        for other in sorted(others)
        if (room := room_of(other)) is not None
        and room != room_of(module)
        and FLOOR_OF[room] >= FLOOR_OF[room_of(module)]
    ]
    assert not up, "\n".join(up)


def test_what_must_never_be_imported():
    found = [
        f"{module} -> {other}"
        for room, forbidden, but in NEVER
        for module, others in IMPORTS.items()
        for other in sorted(others)
        if room in ("", room_of(module)) and not within(module, *but) and within(other, *forbidden)
    ]
    assert not found, "\n".join(found)


def test_no_circle_within_a_folder():
    """Across folders there is none either, as no import runs up."""
    graph = {
        module: {other for other in others if other != module and room_of(other) == room_of(module)}
        for module, others in IMPORTS.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_file_is_long():
    files = files_of("atlas_rl", "kernels", "benchmarks", "examples", "tests")
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    long = [f"{path.relative_to(ROOT)}: {length}" for path, length in lengths.items() if length > MAX_FILE_LINES]
    assert not long, "\n".join(long)


def test_no_function_is_long():
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length}"
        for path in files_of("atlas_rl", "kernels", "benchmarks", "examples", "tests")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def test_no_test_imports_a_test():
    found = [
        f"{module} -> {other}"
        for module, path in TESTS.items()
        for other in sorted(imports_of(path, TESTS))
        if within(other, "tests") and other.rpartition(".")[2].startswith("test_")
    ]
    assert not found, "\n".join(found)


def test_what_quick_leaves_out_exists():
    """A file that moves would else join the quick tests, or stay out of them, unseen."""
    missing = [name for name in LEFT_OUT if not (ROOT / "tests" / name).exists()]
    assert not missing, missing


def test_the_folders_of_tests_mirror_the_house():
    """And beside them are those of what lies beside the package, and of devices."""
    beside = {"kernels", "benchmarks", "examples", "packaging", "gpu", "pretend_cuda"}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")}
    assert folders <= set(FLOOR_OF) | beside, folders - set(FLOOR_OF) - beside
