"""A wheel and an sdist hold all that is needed: installed elsewhere, they train, report, examine the machine, are typed."""

import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests import ROOT
from tests.packaging.environment import ABSENT, Installed, build_and_install, run

pytestmark = pytest.mark.slow
PROGRAMS = Path(__file__).parent / "programs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = {"atlas_rl": ROOT / "atlas_rl", "atlas_kernels": ROOT / "kernels" / "atlas_kernels"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return build_and_install(tmp_path_factory.mktemp("package"))


def package_files(prefix: str = "", kernels: str = "atlas_kernels") -> set[str]:
    """Every file of the packages in the checkout, by its name in an archive."""
    folders = {"atlas_rl": "atlas_rl", "atlas_kernels": kernels}
    return {
        f"{prefix}{folders[package]}/{file.relative_to(folder).as_posix()}"
        for package, folder in SOURCES.items()
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(installed):
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    files = package_files()
    assert {"atlas_rl/py.typed", "atlas_kernels/py.typed", "atlas_rl/report/page/page.css"} <= files
    assert {name for name in names if ".dist-info/" not in name} == files
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_what_the_wheel_is_built_from(installed):
    with tarfile.open(installed.sdist) as archive:
        names = {member.name for member in archive.getmembers() if member.isfile()}
    root = f"atlas_rl-{PROJECT['version']}/"
    assert package_files(root, kernels="kernels/atlas_kernels") <= names
    assert {f"{root}{name}" for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")} <= names
    assert not any(name.startswith(f"{root}tests/") for name in names)


def test_the_wheel_asks_for_what_pyproject_says(installed):
    archive = zipfile.ZipFile(installed.wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(archive.read(name).decode())
    extras = PROJECT["optional-dependencies"]
    assert set(metadata.get_all("Provides-Extra")) == set(extras)
    asked = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    for extra, wanted in {"": PROJECT["dependencies"], **extras}.items():
        here = {r.name for r in asked if (r.marker is None if not extra else f'extra == "{extra}"' in str(r.marker))}
        assert here == {Requirement(text).name for text in wanted}


def test_a_script_trains_and_generates_outside_the_checkout(installed):
    script = installed.home / "tiny_grpo.py"
    script.write_bytes((PROGRAMS / script.name).read_bytes())
    shown = installed.run("python", script.name, "run")
    assert "atlas step 1 |" in shown
    assert "completions [[" in shown
    assert f"loaded from {next(installed.folder.glob('lib/python*'))}/\n" in shown
    # The page needs its style sheet and script, which lie in the package, and plotly's.
    assert "report.html: 1 run, 2 steps" in installed.run("atlas-rl", "report", "run")
    page = (installed.home / "report.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme" in page
    assert "beforeprint" in page


def test_the_commands_work_and_say_which_extras_are_absent(installed):
    assert installed.run("python", "-m", "atlas_rl", "--version") == f"atlas-rl {PROJECT['version']}\n"
    shown = installed.run("atlas-rl", "doctor")
    assert f"{PROJECT['version']}, Python" in shown
    assert "broken" not in shown
    for what in ("TRL trainers", "charts of `atlas-rl report`"):
        assert f"ok       {what}" in shown
    for what, extra in {"engine in vLLM": "vllm", "ZeRO-2 and ZeRO-3": "deepspeed"}.items():
        assert extra in ABSENT
        assert f"missing  {what}" in shown
        assert f"pip install -e '.[{extra}]'" in shown


def test_a_strict_type_checker_knows_what_the_public_names_return(installed):
    """Of other packages nothing is read, to save a minute: what is checked is that ours are typed and reach the user."""
    program = installed.home / "typed.py"
    program.write_bytes((PROGRAMS / program.name).read_bytes())
    (installed.home / "mypy.ini").write_text(
        "[mypy]\nstrict = true\nfollow_imports = skip\n[mypy-atlas_rl.*,atlas_kernels.*]\nfollow_imports = normal\n"
    )
    python = str(installed.folder / "bin" / "python")
    checked = ["--config-file", "mypy.ini", "--python-executable", python, program.name]
    assert "Success" in run([sys.executable, "-m", "mypy", *checked], cwd=installed.home)
