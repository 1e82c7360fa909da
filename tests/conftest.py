"""Fixtures that every test may use, and the order of the tests: fast ones first, slow ones next, those of vLLM last."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub: no test reaches a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before any import of torch; tiny policies are faster so

# Before any import of numba: with the folder of `own_cache` every process would compile the kernels anew.
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path.home() / ".cache" / "atlas_rl" / "numba"))

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any import of triton: its kernels then run on the CPU

from atlas_rl.policy.ragged_attention import RaggedBatch
from tests import ROOT
from tests.models import FACTORIES
from tests.quick import is_left_out, quick_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="of every test that is not slow the first case (tests/quick.py)"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `--quick`, other folders are not even imported: what they load takes longer than the quick tests of a folder."""
    return True if config.getoption("quick") and is_left_out(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests that use the demo policy as slow; order slow tests after all others, and those of vLLM last."""
    for item in items:
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    # vLLM's CPU worker patches torch in its process: what follows it runs in vLLM's world. xdist keeps the order.
    items.sort(key=lambda item: ("vllm" in item.nodeid.split("::")[0], item.get_closest_marker("slow") is not None))
    if config.getoption("quick"):
        quick = quick_of(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in quick])
        items[:] = [item for item in items if item in quick]


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    """A tiny Llama shared by all tests: leave weights and modes as they are, or build your own (tests/models.py)."""
    return FACTORIES["llama"]()


@pytest.fixture(scope="session", params=sorted(FACTORIES))
def tiny_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """One tiny model of each family in turn, shared like `llama`."""
    return FACTORIES[request.param]()


@pytest.fixture
def fixed_shapes(monkeypatch: pytest.MonkeyPatch) -> list[RaggedBatch]:
    """Every cache has steps of fixed shapes, as on a GPU; the caches that were made."""
    made: list[RaggedBatch] = []

    class Fixed(RaggedBatch):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.varlen = True
            made.append(self)

    monkeypatch.setattr("atlas_rl.policy.in_process.RaggedBatch", Fixed)
    return made


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests find out about the machine, on two busy cores, is not kept for its user."""
    os.environ["ATLAS_RL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="module")
def no_rank_stays() -> Iterator[None]:
    """TRL's colocated vLLM makes its process a rank by the environment, which children of later tests would inherit."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ[name] for name in names if name in os.environ}
    yield
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(before)


@pytest.fixture(autouse=True)
def modes_stay() -> Iterator[None]:
    """A test that leaves gradients off, or inference mode on, would break those after it in its process."""
    yield
    left = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    torch.set_grad_enabled(True)
    assert left == (True, False), f"gradients on, inference mode: {left} after this test"


@pytest.fixture
def accelerate_anew() -> Iterator[None]:
    """accelerate keeps a process's first `Accelerator` settings for good: forget them, and put back what was there."""
    states = [(state, dict(state._shared_state)) for state in (AcceleratorState, PartialState, GradientState)]
    for state, _ in states:
        state._shared_state.clear()
    yield
    for state, before in states:
        state._shared_state.clear()
        state._shared_state.update(before)


@pytest.fixture(scope="session")
def demo() -> Any:
    """Imports modules of the demo as its own scripts do: `demo("policy").load_policy(...)`."""
    folder = str(ROOT / "examples" / "grpo_demo")
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)


@pytest.fixture(scope="session")
def smollm2(demo: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer, without the warm start; shared, so leave it unchanged."""
    model, tokenizer = demo("policy").load_policy(warm=False)
    return model, tokenizer
