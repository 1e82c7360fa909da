"""`atlas-rl vllm-serve`: the command line of `vllm serve` with our proposer and safe defaults for trainers."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from atlas_rl.checks import shown
from atlas_rl.speculators.static_heads import check_head
from atlas_rl.vllm import internals
from atlas_rl.vllm.backend import CPU_CACHE_BYTES
from atlas_rl.vllm.checks import check_environment, speculative_config
from atlas_rl.vllm.graphs import compilation_config
from atlas_rl.vllm.internals.transfer import BACKENDS, GLOO, NCCL

EXTENSION = "atlas_rl.vllm.server.AtlasWorkerExtension"
_OURS = ("--speculative-config", "--worker-extension-cls")
_GRAPHS = ("--compilation-config", "--cudagraph-capture-sizes", "--max-cudagraph-capture-size", "--enforce-eager")
_OF_TRL = {"--vllm-model-impl": "--model-impl", "--log-level": "--uvicorn-log-level"}
"""Flags of `trl vllm-serve` that vLLM calls otherwise."""
_SWITCHES_OF_TRL = ("--enforce-eager", "--enable-prefix-caching", "--trust-remote-code")
"""Flags of `trl vllm-serve` that take True or False behind them, and of vLLM that take nothing."""


def serve_command(
    model: str,
    flags: Sequence[str],
    draft_model: Path | None = None,
    environment: Mapping[str, str] | None = None,
    *,
    idle_learning: bool | None = None,
) -> tuple[list[str], dict[str, str]]:
    """The command that serves a policy, and the environment variables that it needs.

    Args:
        model: Folder or name of the policy.
        flags: Flags of `vllm serve` or `trl vllm-serve`; they override those added here.
        draft_model: Folder of an EAGLE-3 or DFlash head, the static speculator.
        environment: Environment variables to read; None for those of the process.
        idle_learning: Whether drafters learn while the server has nothing to do. None for yes on GPUs and no on CPUs, whose
            cores the trainer may be using.

    Raises:
        ValueError: vLLM is missing or of an unknown version, or a flag does not work with the drafters or a trainer.
    """
    internals.check_version()
    check_environment()
    environment = os.environ if environment is None else environment
    given = _in_words_of_vllm(flags)
    names = {_name(flag) for flag in given if flag.startswith("--")}
    for name in _OURS:
        if name in names:
            raise ValueError(
                f"{name} is set by this command, which is there for it: leave it out, or run vllm serve itself"
            )
    added = ["--speculative-config", json.dumps(speculative_config()), "--worker-extension-cls", EXTENSION]
    added += _weight_transfer(given, names)
    added += [] if "--logprobs-mode" in names else ["--logprobs-mode", "processed_logprobs"]
    added += [] if "--max-logprobs" in names else ["--max-logprobs", "-1"]
    added += _memory_and_graphs(given, names, environment)
    given, options = _with_own_options(given, draft_model, idle_learning)
    added += ["--additional-config", json.dumps(options)] if options else []
    variables = {"VLLM_SERVER_DEV_MODE": "1"}  # weights and reports go through vLLM's development endpoints
    if "--enable-lora" in names:
        variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    return [*_entry(model), *added, *given], variables


def serve(
    model: str, flags: Sequence[str], draft_model: Path | None = None, *, idle_learning: bool | None = None
) -> None:
    """Replace this process with vLLM's server command. Arguments and errors as for `serve_command`.

    A folder without a head is refused here, with a `ValueError`: the server would say so in the middle of its log.
    """
    command, variables = serve_command(model, flags, draft_model, idle_learning=idle_learning)
    if draft_model is not None:
        check_head(draft_model)
    line = shlex.join(command)
    print("atlas-rl vllm-serve:", *(f"{name}={value}" for name, value in variables.items()), line, file=sys.stderr)
    sys.stderr.flush()
    os.execve(command[0], command, os.environ | variables)


def _entry(model: str) -> list[str]:
    """The entry point of `vllm serve MODEL`. vLLM's own looks up its version, which fails for the CPU wheel's name."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]


def _in_words_of_vllm(flags: Sequence[str]) -> list[str]:
    """Translate flags of `trl vllm-serve` into vLLM's."""
    found: list[str] = []
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            found.append(flag)
            continue
        name = _name(flag)
        spelled = _OF_TRL.get(name, name) + flag[len(name) :]  # a flag and its normalised name are equally long
        if name in _SWITCHES_OF_TRL and "=" not in flag and rest and rest[0].lower() in ("true", "false"):
            on = rest.pop(0).lower() == "true"
            spelled = name if on else f"--no-{name.removeprefix('--')}"
        found.append(spelled)
    return found


def _name(flag: str) -> str:
    """`--some-flag` from `--some_flag=value` or `--some-flag.key`, as vLLM reads it."""
    return flag.partition("=")[0].partition(".")[0].replace("_", "-")


def _value(given: Sequence[str], name: str) -> str | None:
    """The value after the last flag of this name; None if the flag or its value is missing."""
    found = None
    for i, flag in enumerate(given):
        if flag.startswith("--") and _name(flag) == name and "." not in flag.partition("=")[0]:
            found = flag.partition("=")[2] if "=" in flag else (given[i + 1] if i + 1 < len(given) else None)
    return found


def _weight_transfer(given: Sequence[str], names: set[str]) -> list[str]:
    """The weight-transfer backend for this machine; a given one must be one of ours."""
    name = "--weight-transfer-config"
    if name not in names:
        return [name, json.dumps({"backend": NCCL if torch.cuda.is_available() else GLOO})]
    value = _value(given, name) or ""
    try:
        backend = json.loads(value).get("backend")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{name} takes a JSON object such as {json.dumps({'backend': NCCL})!r}, got {value!r}"
        ) from error
    if backend not in BACKENDS:
        raise ValueError(
            f"{name} has the backend {shown(backend)}, which does not tell the drafters of new weights: take one of "
            f"{list(BACKENDS)}, or leave the flag out"
        )
    return []


def _memory_and_graphs(given: Sequence[str], names: set[str], environment: Mapping[str, str]) -> list[str]:
    """Flags for graphs of our steps on CUDA, or for a cache that leaves the trainer memory on CPUs. Given flags win."""
    if torch.cuda.is_available():
        if names & set(_GRAPHS):
            return []
        most = _value(given, "--max-num-seqs")
        return [
            "--compilation-config",
            json.dumps(compilation_config(int(most) if most and most.isdecimal() else None)),
        ]
    if "--kv-cache-memory-bytes" in names or "VLLM_CPU_KVCACHE_SPACE" in environment:
        return []
    return ["--kv-cache-memory-bytes", str(CPU_CACHE_BYTES)]


def _with_own_options(
    given: Sequence[str], draft_model: Path | None, idle_learning: bool | None
) -> tuple[list[str], dict[str, Any]]:
    """Flags without `--additional-config`, and its content with our options; ValueError if a static head is given twice."""
    kept, options = _without_additional_config(given)
    own = dict(options.pop("atlas_rl", {}))
    if draft_model is not None:
        if not draft_model.is_dir():
            raise ValueError(f"--draft-model {draft_model}: there is no such folder")
        if "draft_model" in own:
            raise ValueError("give the static head once: --draft-model, or atlas_rl in --additional-config")
        own["draft_model"] = str(draft_model)
    if idle_learning is not None:
        own["idle_learning"] = idle_learning
    elif torch.cuda.is_available() and internals.no_spare_time(_num_replicas(given)) is None:
        own.setdefault("idle_learning", True)
    return kept, {**options, "atlas_rl": own} if own else options


def _num_replicas(given: Sequence[str]) -> int:
    """Data-parallel replicas that the flags ask for."""
    name = "--data-parallel-size"
    size = _value([name + flag[3:] if flag.partition("=")[0] == "-dp" else flag for flag in given], name)
    return int(size) if size and size.isdecimal() else 1


def _without_additional_config(given: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Flags without `--additional-config`, and its content."""
    name = "--additional-config"
    value = _value(given, name)
    if value is None:
        return list(given), {}
    try:
        options = dict(json.loads(value))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} takes a JSON object, got {value!r}") from error
    kept: list[str] = []
    rest = list(given)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or _name(flag) != name:
            kept.append(flag)
        elif "=" not in flag:
            rest.pop(0)
    return kept, options
