"""What the tests on vLLM share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def folder(policy: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module's `policy`."""
    path = tmp_path_factory.mktemp("policy")
    policy.save_pretrained(path)
    return path
