"""Examines a machine: versions, GPU, usable engines and kernels, and how to get the rest."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from atlas_rl.vllm.internals.version import INSTALL, REQUIREMENT, check_version, installed_version

CORE = {"torch": "torch>=2.9,<3", "transformers": "transformers>=5.17,<6", "numpy": "numpy>=2,<3", "numba": "numba>=0.61",
        "safetensors": "safetensors>=0.5", "tqdm": "tqdm>=4.66"}  # fmt: skip
"""What every engine needs, as pyproject.toml has it, by the name of the module."""
EXTRAS = {
    "trl": ("TRL trainers", ("trl>=1.16,<2", "datasets>=4", "accelerate>=1.10", "peft>=0.18")),
    "deepspeed": ("ZeRO-2 and ZeRO-3", ("deepspeed>=0.19",)),
    "report": ("charts of `atlas-rl report`", ("plotly>=7.1,<8",)),
}
"""By extra, what it brings and the packages, as pyproject.toml has them. vLLM has a check of its own."""


@dataclass(frozen=True)
class Finding:
    """One check and its result.

    Attributes:
        state: `ok`, `missing` for an optional part that is not there, `broken` for what is needed or installed and does
            not work.
        what: Its name.
        found: What is there.
        cure: The command or the step that brings it; empty where nothing is to be done.
    """

    state: Literal["ok", "missing", "broken"]
    what: str
    found: str
    cure: str = ""


def examine() -> list[Finding]:
    """Examine Python, packages, GPU, kernels and engines of this process. Loads torch."""
    core = [_package(requirement, module) for module, requirement in CORE.items()]
    system = Finding("ok", "atlas_rl", f"{_own_version()}, Python {platform.python_version()}, {platform.platform()}")
    if any(finding.state == "broken" for finding in core):
        engine = Finding("broken", "engine in process", "packages that it needs do not work", "see the lines above")
        return [system, *core, engine]
    return [system, *core, *_devices(), *_kernels(), _in_process(), _vllm(), *(_extra(name) for name in EXTRAS)]


def report_on(findings: Sequence[Finding]) -> str:
    """The findings as text, one line each, followed by what to do."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<8} {finding.what:<{width}}  {finding.found}")
        if finding.cure:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.cure}")
    return "\n".join(lines)


def _own_version() -> str:
    try:
        return metadata.version("atlas-rl")
    except metadata.PackageNotFoundError:
        return "not installed, run from its sources"


def _package(requirement: str, module: str) -> Finding:
    """Check that a required package is installed in a suitable version and can be imported."""
    cure = f"pip install '{requirement}'"
    version, fits = _version(requirement)
    if version is None:
        return Finding("broken", module, "not installed", cure)
    if not fits:
        return Finding("broken", module, f"{version}, but this version of atlas_rl needs {requirement}", cure)
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a library that it loads is missing or for another machine
        return Finding(
            "broken",
            module,
            f"{version} cannot be imported ({error})",
            f"pip install --force-reinstall '{requirement}'",
        )
    return Finding("ok", module, version)


def _version(requirement: str) -> tuple[str | None, bool]:
    """The installed version of a package, and whether it meets the requirement."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return None, False
    return version, wanted.specifier.contains(version, prereleases=True)


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("ok", "CPU", f"{torch.get_num_threads()} threads of torch")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            of = torch.cuda.get_device_properties(index)
            yield Finding(
                "ok", f"GPU {index}", f"{of.name}, {of.total_memory / 1e9:.0f} GB, compute {of.major}.{of.minor}"
            )
    elif shutil.which("nvidia-smi") and torch.version.cuda is None:
        found = f"this machine has a driver of NVIDIA, and torch {torch.__version__} is a build without CUDA"
        yield Finding("broken", "GPU", found, "pip install --force-reinstall torch (a CUDA build)")
    elif shutil.which("nvidia-smi"):
        found = f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU"
        yield Finding("broken", "GPU", found, "compare the driver with nvidia-smi; look at CUDA_VISIBLE_DEVICES")
    else:
        yield Finding("ok", "GPU", "none: policies run on the CPU")


def _kernels() -> Iterator[Finding]:
    import torch

    yield Finding("ok", "CPU kernels", "numba; the first engine of a machine compiles them for about a minute")
    has_triton = importlib.util.find_spec("triton") is not None
    if not torch.cuda.is_available():
        yield Finding("ok", "Triton kernels", "not used without a GPU")
    elif has_triton:
        yield _triton()
    else:
        found = "no Triton: verification and drafting run by torch, slower"
        yield Finding("missing", "Triton kernels", found, "pip install triton (the version that torch names)")


def _triton() -> Finding:
    """Check Triton by its module: its package has other names in some builds (`pytorch-triton`, also for AMD)."""
    try:
        return Finding("ok", "Triton kernels", importlib.import_module("triton").__version__)
    except (ImportError, OSError) as error:
        cure = "pip install --force-reinstall triton (the version that torch names)"
        return Finding("broken", "Triton kernels", f"Triton cannot be imported ({error})", cure)


def _in_process() -> Finding:
    """Check the in-process engine; the packages it needs have been checked before."""
    if sys.platform != "linux":
        return Finding("broken", "engine in process", f"{sys.platform} is not supported", "use Linux")
    return Finding("ok", "engine in process", "AtlasRolloutEngine()")


def _vllm() -> Finding:
    if installed_version() is None:
        return Finding("missing", "engine in vLLM", "vLLM is not installed", INSTALL)
    try:
        return Finding("ok", "engine in vLLM", f"vLLM {check_version()}, AtlasRolloutEngine(backend='vllm')")
    except ValueError as error:
        return Finding("broken", "engine in vLLM", str(error), f"pip install '{REQUIREMENT}'")


def _extra(name: str) -> Finding:
    what, requirements = EXTRAS[name]
    found = {requirement: _version(requirement) for requirement in requirements}
    cure = f"in the checkout: pip install -e '.[{name}]'"
    if absent := [requirement for requirement, (version, _) in found.items() if version is None]:
        return Finding("missing", what, f"not installed: {', '.join(absent)}", cure)
    if unfit := [f"{requirement} (here {version})" for requirement, (version, fits) in found.items() if not fits]:
        return Finding("broken", what, f"another version is needed: {', '.join(unfit)}", cure)
    names = (requirement.partition(">")[0] for requirement in requirements)
    versions = (str(version) for version, _ in found.values())
    return Finding("ok", what, ", ".join(f"{n} {v}" for n, v in zip(names, versions, strict=True)))
