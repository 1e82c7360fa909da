"""The layout of docs/structure.md holds: no import runs up, no circle, no long file, no long function, no unnamed module.

An import counts wherever it stands: at the top of a file, inside a function, or under `TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

from tests import ROOT
from tests.quick import LEFT_OUT

FLOORS = {
    0: ("atlas_kernels",),
    1: ("checks", "counts", "docstrings", "progress", "whole_files", "policy", "report", "planner"),
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

# Arguments that calls which make a tensor have to name. Those of the second row make whole numbers of whole numbers.
NAMED_BY = {
    **{
        f"torch.{name}": {"dtype", "device"} for name in ("empty", "full", "linspace", "ones", "rand", "randn", "zeros")
    },
    **{f"torch.{name}": {"device"} for name in ("arange", "eye", "randint", "randperm", "tensor")},
}


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


def rows_of_the_map() -> list[tuple[int, Path, set[str]]]:
    """Rows of the floors in docs/structure.md: the floor, a folder or file, and the names in what is said of it."""
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    return [
        (
            int(floor),
            (ROOT if place.startswith("kernels/") else ROOT / "atlas_rl") / place,
            set(re.findall(r"`([a-z0-9_]+/?)`", text)),
        )
        for floor, places, text in re.findall(r"^\| (\d+) \| (.+?) \| (.+) \|$", page, re.MULTILINE)
        for place in re.findall(r"`([^`]+)`", places)
    ]


MAP = rows_of_the_map()
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


def test_new_tensors_name_their_type_and_device():
    """Else a process's default type and device decide. A module's buffers may be on its default device, as its weights."""
    unnamed = []
    for path in files_of("atlas_rl", "kernels"):
        calls = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
        of_modules = {
            id(argument)
            for call in calls
            if ast.unparse(call.func) in ("self.register_buffer", "nn.Parameter")
            for argument in call.args
        }
        for call in calls:
            needed = NAMED_BY.get(ast.unparse(call.func), set()) - {keyword.arg for keyword in call.keywords}
            if id(call) in of_modules:
                needed -= {"device"}
            if needed:
                unnamed.append(f"{path.relative_to(ROOT)}:{call.lineno} {', '.join(sorted(needed))}")
    assert not unnamed, "\n".join(unnamed)


def test_no_two_classes_share_a_name():
    places = defaultdict(list)
    for module, path in MODULES.items():
        for node in parsed(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module)
    shared = [f"{name}: {', '.join(modules)}" for name, modules in places.items() if len(modules) > 1]
    assert not shared, "\n".join(shared)


def test_the_map_has_the_floors():
    modules = {place: module_name(place / "__init__.py" if place.is_dir() else place) for _, place, _ in MAP}
    assert {FLOOR_OF[room_of(module)] for module in modules.values()} == set(FLOORS)
    wrong = [str(place) for floor, place, _ in MAP if FLOOR_OF[room_of(modules[place])] != floor]
    assert not wrong, "\n".join(wrong)


def test_the_map_names_every_module():
    """By a row of its folder: its own name, or that of a folder within (`name/`), which stands for all of its modules."""
    rows: dict[Path, set[str]] = defaultdict(set)
    for _, place, names in MAP:
        rows[place] |= names
    unnamed = []
    for path in files_of("atlas_rl"):
        folder = next((each for each in path.parents if each in rows), None)
        if path.name == "__init__.py" or path in rows:
            continue
        parts = () if folder is None else path.relative_to(folder).with_suffix("").parts
        if not parts or not {parts[-1], f"{parts[0]}/"} & rows[folder]:
            unnamed.append(str(path.relative_to(ROOT)))
    assert not unnamed, "name them in docs/structure.md:\n" + "\n".join(unnamed)


def test_the_map_names_no_module_that_is_gone():
    gone = [
        f"{place.relative_to(ROOT)}: {name}"
        for _, place, names in MAP
        for name in sorted(names)
        if place.is_dir() and place.is_relative_to(ROOT / "atlas_rl")
        if not any(place.rglob(name.removesuffix("/") if name.endswith("/") else f"{name}.py"))
    ]
    assert not gone, "\n".join(gone)


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
    folders = [path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").glob("*/**/__init__.py")]
    wrong = [str(each) for each in folders if each.parts[0] not in beside and not (ROOT / "atlas_rl" / each).is_dir()]
    assert len(folders) > len(FLOORS)
    assert not wrong, wrong
