"""The wheel, built as a release would be, and an environment in which only it and what it needs are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

ABSENT = ("vllm", "deepspeed")
"""Optional packages that the environment lacks, as most users' do; TRL is also loaded faster without them."""
_NOT_OF_THE_SOURCES = (".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
_TIMEOUT_S = 300


@dataclass(frozen=True)
class Installed:
    """What was built and where it is installed.

    Attributes:
        sdist: The source distribution.
        wheel: Built from the sdist, not from the checkout.
        folder: Of the environment.
        home: An empty folder outside the checkout, in which programs run.
    """

    sdist: Path
    wheel: Path
    folder: Path
    home: Path

    def run(self, program: str, *arguments: str) -> str:
        """Run one of the environment's programs at `home`; its output, of which a status other than 0 makes an error."""
        return run([str(self.folder / "bin" / program), *arguments], cwd=self.home)


def build_and_install(folder: Path) -> Installed:
    """Build sdist and wheel, and install the wheel; nothing is downloaded and the checkout is left as it is."""
    sources, built, home = folder / "sources", folder / "dist", folder / "home"
    home.mkdir(parents=True)
    shutil.copytree(ROOT, sources, ignore=shutil.ignore_patterns(*_NOT_OF_THE_SOURCES))
    python, pip = sys.executable, [sys.executable, "-m", "pip", "--no-cache-dir", "--disable-pip-version-check"]
    run([python, "-c", f"from setuptools.build_meta import build_sdist; build_sdist({str(built)!r})"], cwd=sources)
    (sdist,) = built.glob("*.tar.gz")
    run([*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(built), str(sdist)], cwd=home)
    (wheel,) = built.glob("*.whl")
    environment = folder / "environment"
    run([python, "-m", "venv", "--without-pip", str(environment)], cwd=home)
    own_python = environment / "bin" / "python"
    run([*pip, "--python", str(own_python), "install", "--no-deps", "--no-index", str(wheel)], cwd=home)
    _lend_packages(folder / "lent" / "site-packages", environment)
    return Installed(sdist, wheel, environment, home)


def _lend_packages(lent: Path, environment: Path) -> None:
    """Let an environment import what this one has installed, but for this project and what is `ABSENT`.

    The folder has the usual name: dill, with which datasets makes its fingerprints, knows installed modules by it.
    """
    lent.mkdir(parents=True)
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site).iterdir():
            name = entry.name.lower().removeprefix("__editable__").strip("._")
            if not name.startswith(("atlas", *ABSENT)) and entry.suffix != ".pth":
                (lent / entry.name).symlink_to(entry)
    (own_site,) = environment.glob("lib/python*/site-packages")
    (own_site / "lent.pth").write_text(f"{lent}\n", encoding="utf-8")


def run(command: list[str], cwd: Path) -> str:
    """Output of a command that must succeed; nothing leads it to the checkout."""
    left_out = ("PYTHONPATH", "VIRTUAL_ENV", "PYTEST_CURRENT_TEST")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout
