"""Compiled kernels are found by their content: by a copy of the package elsewhere, and not after a change. In processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from numba.core import config

from atlas_kernels.jit_cache import cache_folder, cached_njit
from atlas_rl.policy import linear_routes
from tests import ROOT

pytestmark = pytest.mark.slow

COUNTING = """
import json
from numba.core import event
compiled = event.RecordingListener()
event.register("numba:compile", compiled)
{work}
result = {result}
print(json.dumps([sorted(e.data["dispatcher"].py_func.__name__ for _, e in compiled.buffer if e.is_start), result]))
"""
ALL_KERNELS = COUNTING.format(
    work="from atlas_rl.decode.compile_kernels import compile_kernels; compile_kernels(); import atlas_rl",
    result="atlas_rl.__file__",
)
USERS = {"ATLAS_RL_CACHE": str(Path.home() / ".cache" / "atlas_rl")}
"""Names the user's cache, whose kernels need not be compiled again."""


def run(code: str, *path: Path, **environment: str):
    own = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    own["PYTHONPATH"] = os.pathsep.join(map(str, path))
    command = [sys.executable, "-c", code]
    # In that folder, because Python looks in the present one first.
    done = subprocess.run(command, cwd=path[0], env=own | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_new_checkout_compiles_nothing(tmp_path: Path):
    """The first process may find the user's kernels, or has to compile; the copy must find them."""
    run(ALL_KERNELS, ROOT, ROOT / "kernels", **USERS)
    copied = tmp_path / "checkout"
    for name in ("atlas_rl", "kernels"):
        shutil.copytree(
            ROOT / name, copied / name, ignore=shutil.ignore_patterns("__pycache__"), copy_function=shutil.copy
        )
    names, file = run(ALL_KERNELS, copied, copied / "kernels", **USERS)
    assert file == str(copied / "atlas_rl" / "__init__.py")
    assert names == []


RUNS = """
import gc, json
from numba.core.dispatcher import Dispatcher
from atlas_rl.decode.compile_kernels import compile_kernels

def known():
    found = [kernel for kernel in gc.get_objects() if isinstance(kernel, Dispatcher) and "atlas" in kernel.__module__]
    return {(kernel.py_func.__name__, str(signature)) for kernel in found for signature in kernel.signatures}

compile_kernels()
before = known()
from atlas_rl.controller.fixed import FixedController
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.drafters import recurrent_drafter
from tests.engines import SETTINGS, VOCAB, draft_model, engine_of, generate

for verification in ("invariant", "rejection"):
    for drafting in (None, "history", "recurrent", "draft_lm"):
        drafters = [HistorySpeculator(), recurrent_drafter(), DraftLM(draft_model(), VOCAB)]
        names = [drafter.name for drafter in drafters]
        controller = FixedController(names, drafting, 3) if drafting else None
        engine = engine_of(speculators=drafters, controller=controller, verification=verification)
        generate(engine)
        engine.policy_updated()  # now the recurrent head drafts
        for options in (*SETTINGS.values(), {"temperature": 0.0}):
            output = generate(engine, **options)
        assert drafting is None or output.report.drafted[drafting] > 0
print(json.dumps([len(before), sorted(known() - before)]))
"""


def test_set_up_compiles_what_runs_need():
    """A kernel that meets other types or layouts of arrays in a run is compiled there, in the midst of it: for seconds.

    Kernels that the user's cache holds are read from there, and count like compiled ones: before the runs, or after.
    """
    num_known, found_later = run(RUNS, ROOT, ROOT / "kernels", OMP_NUM_THREADS="1", **USERS)
    assert num_known > 20
    assert found_later == []


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package by the name of ours whose kernel takes a function and a constant from other modules."""
    folder = tmp_path / "one" / "atlas_rl"
    folder.mkdir(parents=True)
    texts = {
        "__init__": "",
        "constants": "OFFSET = 1\n",
        "inner": "import numba\n\n@numba.njit\ndef double(x):\n    return 2 * x\n",
        "outer": """
            from atlas_kernels.jit_cache import cached_njit
            from atlas_rl import inner
            from atlas_rl.constants import OFFSET

            @cached_njit(nogil=True)
            def kernel(x):
                return late(inner.double(x)) + OFFSET

            import numba

            @numba.njit(inline="always")
            def late(x):
                return x + 100
            """,
    }
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    return folder


KERNEL = COUNTING.format(work="from atlas_rl.outer import kernel", result="kernel(5)")


def test_what_changed_is_compiled_anew_wherever_it_stands(package: Path, tmp_path: Path):
    where = {"ATLAS_RL_CACHE": str(tmp_path / "cache")}
    kernels = ROOT / "kernels"
    names, result = run(KERNEL, package.parent, kernels, **where)
    assert "kernel" in names
    assert result == 111
    assert run(KERNEL, package.parent, kernels, **where) == [[], 111]
    other = tmp_path / "two"
    shutil.copytree(package, other / "atlas_rl", ignore=shutil.ignore_patterns("__pycache__"))
    assert run(KERNEL, other, kernels, **where) == [[], 111]
    for module, old, new, expected in (
        ("constants", "1", "7", 117),
        ("inner", "2 *", "3 *", 122),
        ("outer", "+ 100", "+ 200", 222),
    ):
        file = other / "atlas_rl" / f"{module}.py"
        file.write_text(file.read_text().replace(old, new))
        names, result = run(KERNEL, other, kernels, **where)
        assert "kernel" in names
        assert result == expected
    assert run(KERNEL, package.parent, kernels, **where) == [[], 111], "the first one's is still there"


def test_instructions_that_are_written_by_hand_are_part_of_a_kernel(package: Path, tmp_path: Path):
    """numba's intrinsics are no functions that it compiles: their own writes what becomes machine code."""
    written = package / "written.py"
    written.write_text(
        textwrap.dedent("""
        from llvmlite import ir
        from numba import types
        from numba.extending import intrinsic

        def adding(number):
            @intrinsic
            def add(context, x):
                return types.int64(x), lambda context, builder, signature, given: builder.add(given[0], Constants.of(number))
            return add

        import os
        MORE = int(os.environ.get("MORE", "0"))

        class Constants:
            @staticmethod
            def of(number):
                return ir.IntType(64)(1 * number + MORE)
        """)
    )
    outer = package / "outer.py"
    outer.write_text(outer.read_text() + "\nfrom atlas_rl.written import adding\n\nlate = adding(200)\n")
    where = {"ATLAS_RL_CACHE": str(tmp_path / "cache")}
    for old, new, expected in (("", "", 211), ("1 *", "2 *", 411)):
        written.write_text(written.read_text().replace(old, new))
        names, result = run(KERNEL, package.parent, ROOT / "kernels", **where)
        assert "kernel" in names
        assert result == expected
        assert run(KERNEL, package.parent, ROOT / "kernels", **where) == [[], expected]
    names, result = run(KERNEL, package.parent, ROOT / "kernels", MORE="5", **where)
    assert ("kernel" in names, result) == (True, 416), "a constant that only the class names"


def test_environments_with_other_versions_of_numba_share_the_folder(package: Path, tmp_path: Path):
    """As one with vLLM, which pins numba, beside one without."""
    where = {"ATLAS_RL_CACHE": str(tmp_path / "cache")}
    another = f"import numba; numba.__version__ = '0.0.1'\n{KERNEL}"
    for code in (KERNEL, another):
        names, _ = run(code, package.parent, ROOT / "kernels", **where)
        assert "kernel" in names
    for code in (KERNEL, another):
        assert run(code, package.parent, ROOT / "kernels", **where) == [[], 111]


def test_numbas_own_settings_hold(package: Path, tmp_path: Path):
    kernels, given = ROOT / "kernels", tmp_path / "given"
    cache = {"ATLAS_RL_CACHE": str(tmp_path / "cache")}
    names, _ = run(KERNEL, package.parent, kernels, NUMBA_CACHE_DIR=str(given), **cache)
    assert "kernel" in names
    assert list(given.glob("*kernel*.nbc"))
    assert not (tmp_path / "cache").exists()
    assert run(KERNEL, package.parent, kernels, NUMBA_DISABLE_JIT="1", **cache) == [[], 111]
    run(KERNEL, package.parent, kernels, NUMBA_CACHE_LOCATOR_CLASSES="InTreeCacheLocator", **cache)
    assert list((package / "__pycache__").glob("*kernel*.nbc"))
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_made_costs_nothing_but_time(package: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    names, result = run(KERNEL, package.parent, ROOT / "kernels", ATLAS_RL_CACHE=str(tmp_path / "file"))
    assert "kernel" in names
    assert result == 111


def test_kernels_lie_beside_what_else_is_known_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Two packages that must not import each other say where."""
    for name, value in (("ATLAS_RL_CACHE", "own"), ("XDG_CACHE_HOME", "xdg"), ("HOME", "home")):
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setattr(config, "CACHE_DIR", "")
    for name in ("ATLAS_RL_CACHE", "XDG_CACHE_HOME", "HOME"):
        assert cache_folder() == linear_routes.cache_folder() / "numba"
        monkeypatch.delenv(name)


def test_a_function_that_takes_variables_from_around_it_is_refused():
    """They would not be part of its key."""
    factor = 2

    def scaled(x):
        return factor * x

    with pytest.raises(TypeError, match="scaled must not take variables of a function around it"):
        cached_njit()(scaled)
