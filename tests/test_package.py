"""The package as a newcomer meets it: imports that stay light, names that shadow nobody, one version."""

import importlib
import importlib.metadata
import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import atlas_rl
from tests import ROOT

OPTIONAL = ("vllm", "triton", "trl", "deepspeed")
HEAVY = (*OPTIONAL, "peft", "transformers", "datasets", "accelerate")
MODULES = sorted(module.name for module in pkgutil.walk_packages(atlas_rl.__path__, "atlas_rl."))


def run_python(code: str, cwd: Path = ROOT) -> str:
    """Output of `python -c code`, whose `sys.path` begins with `cwd`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_light():
    code = f"import sys, atlas_rl; print([name for name in {HEAVY} if name in sys.modules])"
    assert run_python(code) == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONAL)
def test_every_public_name_loads_without_optional_packages(name):
    code = (
        f"import sys; sys.modules[{name!r}] = None\n"  # importing it now raises
        "import atlas_rl\n"
        "for public in atlas_rl.__all__: getattr(atlas_rl, public)"
    )
    run_python(code)


def test_works_outside_of_the_checkout(tmp_path):
    found = run_python("import atlas_rl, atlas_kernels; print(atlas_rl.__file__)", cwd=tmp_path)
    assert Path(found).resolve() == ROOT / "atlas_rl" / "__init__.py"


@pytest.mark.parametrize("name", MODULES)
def test_every_module_imports(name):
    importlib.import_module(name)


def test_version_is_that_of_pyproject():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert importlib.metadata.version("atlas-rl") == version
    assert atlas_rl.__version__ == version


def test_our_kernels_folder_shadows_nobody(tmp_path):
    """PyPI has a package named `kernels`, which transformers imports: it must win over our folder."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    installed = tmp_path / "site" / "kernels"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("__version__ = 'the one from PyPI'\n")
    # Our folder comes first on sys.path (`''`), the installed package last.
    code = f"import sys; sys.path.append({str(installed.parent)!r}); import kernels; print(kernels.__version__)"
    assert run_python(code) == "the one from PyPI"


@pytest.mark.slow
def test_transformers_is_not_fooled_by_the_kernels_folder(tmp_path):
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert run_python(code, cwd=ROOT) == run_python(code, cwd=tmp_path)
