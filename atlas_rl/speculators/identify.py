"""Identifies the content of a checkpoint folder by its configuration and its tensors' names and shapes.

Heads of many kinds come in similar folders. An EAGLE-1 head calls itself a Llama of one layer; DFlash, DSpark and
P-EAGLE heads of the `speculators` layout have the fields of an EAGLE-3 head, and DFlash 2 and DSpark heads those of a
DFlash head. Loaded as the wrong kind, a head drafts badly without any error, so each kind is named here, and every
loader asks first.

The layouts are those of SafeAILab/EAGLE (a flat Llama configuration), vllm-project/speculators (`speculators_model_type`),
FasterDecoding/Medusa, and vLLM's own loaders.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

CAUSAL_LM = "a causal LM"
EAGLE3 = "an EAGLE-3 head"
_EAGLE1 = "an EAGLE-1 or EAGLE-2 head"
MTP = "a multi-token prediction (MTP) head"
DFLASH, DSPARK = "a DFlash head", "a DSpark head"
_P_EAGLE, _DFLASH2, _LILICORR = "a P-EAGLE head", "a DFlash 2 head", "a LiLiCorr head"
_MEDUSA, _HYDRA, _MLP = "Medusa heads", "Hydra heads", "an MLP speculator"

_GIVE = " Give a folder that save_pretrained() wrote."
_SAFETENSORS, _PICKLE = "model.safetensors", "pytorch_model.bin"
# Parts of names, without `-` and `_`, in the order of the search: "peagle" contains "eagle", "dflash2" "dflash".
_NAMES = {
    "peagle": _P_EAGLE,
    "dspark": DSPARK,
    "lilicorr": _LILICORR,
    "dflash2": _DFLASH2,
    "dflash": DFLASH,
    "medusa": _MEDUSA,
    "hydra": _HYDRA,
    "mlpspeculator": _MLP,
    "eagle3": EAGLE3,
    "eagle": _EAGLE1,
    "mtp": MTP,
}
# Prefixes of configuration fields that only such heads have.
_FIELDS = {
    "dspark_": DSPARK,
    "markov_": DSPARK,
    "lilicorr_": _LILICORR,
    "medusa_": _MEDUSA,
    "num_medusa_": _MEDUSA,
    "hydra_": _HYDRA,
}
# Names of tensors that only such heads have, `model.` cut off.
_TENSORS = {
    r"mask_hidden": _P_EAGLE,
    r"(markov|confidence)_head\.": DSPARK,
    r"(?:\w+\.)*(predecessor_codebook|successor_codebook|base_kernel)\b": _DFLASH2,
    r"medusa_head\.|blocks\.\d+\.layers\.|\d+\.\d+\.(linear\.)?weight": _MEDUSA,
    r"fusion_fc\.": _EAGLE1,
    r"midlayer\.": EAGLE3,
}

# Names of a layer for multi-token prediction, and of a model's own first layer, which may be inside of a wrapper.
_PREDICTING = r"(?:\w+\.)*(mtp\.|mtp_layers\.|\w+\.eh_proj\.)"
_FIRST_LAYER = r"(?:(?!mtp\.)\w+\.)*layers\.0\."


def kind_of(folder: str | Path) -> str:
    """The kind of content, as used in a sentence: one of the names above, or that of another kind of head.

    `CAUSAL_LM` is what remains if nothing indicates a head; loading shows whether all its weights are there.

    Raises:
        ValueError: There is no checkpoint, or it is damaged.
    """
    folder = Path(folder)
    for file in ("medusa_lm_head", "hydra_lm_head"):
        if any(folder.glob(f"{file}.*")):
            return _NAMES[file.partition("_")[0]]
    config = read_config(folder)
    shapes = {name.removeprefix("model."): shape for name, shape in read_shapes(folder).items()}
    described = config.get("speculators_config") or {}
    if not isinstance(described, dict):
        raise ValueError(
            f"'{folder / 'config.json'}': speculators_config must be an object, got {described!r}: download the checkpoint "
            "again"
        )
    declared = config.get("speculators_model_type") or described.get("algorithm")
    return (
        _by_tensor_names(shapes)
        or _by_declared_type(declared)
        or _by_config(config)
        or _by_tensor_shapes(shapes)
        or (EAGLE3 if config.get("draft_vocab_size") is not None else CAUSAL_LM)
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`; `ValueError` if it is missing or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = " The folder holds an adapter: merge it into its model and save that." if adapter else ""
        missing = (
            "config.json is missing"
            if folder.is_dir()
            else "there is no such folder, and names of the hub are not looked up"
        )
        raise ValueError(f"no checkpoint in '{folder}': {missing}.{hint or _GIVE}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not JSON ({error}): download the checkpoint again") from error
    if not isinstance(config, dict):
        raise ValueError(f"'{path}' is not a JSON object: download the checkpoint again")
    return config


def read_tensors(folder: Path, names: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint, on the CPU.

    Args:
        folder: Folder of the checkpoint.
        names: Tensors to read; None reads all.

    Raises:
        ValueError: There are no tensors, or a file is damaged.
    """
    tensors: dict[str, torch.Tensor] = {}
    files = _weight_files(folder)
    if not files:
        raise ValueError(f"no checkpoint in '{folder}': neither {_SAFETENSORS} nor {_PICKLE} is there")
    for path in files:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as file:
                    wanted = [name for name in file.keys() if names is None or name in names]  # noqa: SIM118
                    tensors |= {name: file.get_tensor(name) for name in wanted}
            except (SafetensorError, OSError) as error:
                raise _damaged(path, error) from error
        else:
            read = _read_pickle(path, "cpu")
            tensors |= {name: tensor for name, tensor in read.items() if names is None or name in names}
    return tensors


def fingerprint(folder: str | Path) -> str:
    """Hash of a checkpoint's content: its configurations and weights, whatever their files' times.

    Raises:
        ValueError: An index names files that are missing.
        OSError: A file cannot be read.
    """
    folder = Path(folder)
    described = [folder / name for name in ("config.json", "generation_config.json")]
    digest = hashlib.sha256()
    for path in [*filter(Path.is_file, described), *_weight_files(folder)]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_finite(tensors: dict[str, torch.Tensor], what: str) -> None:
    """Raise `ValueError` if a tensor holds NaN or infinity; `what` begins the message."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.element_size() > 1 and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{what} holds NaN or infinity in '{name}' (as {str(tensor.dtype).removeprefix('torch.')}): take another "
                "checkpoint of it"
            )


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a folder; only the headers of safetensors files are read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder):
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as file:
                    shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise _damaged(path, error) from error
        else:
            shapes |= {name: tuple(tensor.shape) for name, tensor in _read_pickle(path, "meta").items()}
    return shapes


def _weight_files(folder: Path) -> list[Path]:
    """The files with a checkpoint's weights: one, or those in an index; empty if there are none."""
    for name in (_SAFETENSORS, _PICKLE):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise _damaged(index, error) from error
            missing = [file for file in files if not (folder / file).is_file()]
            if missing:
                raise ValueError(f"'{folder}' lacks {', '.join(missing)}: download the checkpoint again")
            return [folder / file for file in files]
    return []


def _read_pickle(path: Path, device: str) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise _damaged(path, error) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"'{path}' holds no state dict (names and tensors): save the module's state_dict() there")
    return tensors


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"'{path}' is damaged ({' '.join(str(error).split())}): download the checkpoint again")


def _by_tensor_names(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """Kind by tensor names, before the configuration: P-EAGLE heads are also published as EAGLE-3."""
    for pattern, kind in _TENSORS.items():
        if any(re.match(pattern, name) for name in shapes):
            return kind
    return None


def _by_declared_type(declared: Any) -> str | None:
    """Kind by the declared type in the `speculators` layout, whose list of types is open."""
    if not declared:
        return None
    named = _by_name(declared)
    if named is not None:
        return named
    return _MLP if declared == "mlp" else f"a speculator of the kind '{declared}'"


def _by_config(config: dict[str, Any]) -> str | None:
    for field, kind in _FIELDS.items():
        if any(name.startswith(field) and value is not None for name, value in config.items()):
            return kind
    architectures = config.get("architectures")
    names = [*(architectures if isinstance(architectures, list) else []), config.get("model_type")]
    named = next(filter(None, map(_by_name, names)), None)
    # DFlash 2 and DSpark heads have this field as well.
    return named or (DFLASH if config.get("dflash_config") is not None else None)


def _by_name(name: Any) -> str | None:
    plain = re.sub(r"[-_]", "", str(name).lower())
    return next((kind for part, kind in _NAMES.items() if part in plain), None)


def _by_tensor_shapes(shapes: dict[str, tuple[int, ...]]) -> str | None:
    """Kind by tensor shapes, for heads without a declared type: how they read the policy's hidden states."""
    fuse = shapes.get("fc.weight")
    if fuse is not None:
        hidden, read = fuse[0], fuse[-1]
        query = next((shape[-1] for name, shape in shapes.items() if name.endswith("self_attn.q_proj.weight")), None)
        if query == 2 * hidden:  # attention reads the embedding beside the feature
            return EAGLE3
        if "hidden_norm.weight" in shapes:
            return DFLASH
        return _EAGLE1 if read == 2 * hidden else "a head that reads the policy's hidden states"
    if "d2t" in shapes:
        return EAGLE3
    # Whole models can contain such layers too.
    predicts = any(re.match(_PREDICTING, name) for name in shapes)
    return MTP if predicts and not any(re.match(_FIRST_LAYER, name) for name in shapes) else None
