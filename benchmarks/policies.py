"""Tests every causal-LM class of the installed transformers in process: tiny policies, compared with plain forwards.

Classes of images and text are among them, and are given text.

    python -m benchmarks.policies                  all classes; minutes; writes the result and the table of docs/policies.md
    python -m benchmarks.policies --only phi3 doge   prints, writes nothing; with --update, it writes the rows of these

Each class is built tiny and generates for rows of different lengths, past its windows and chunks: greedily, and sampled.
Every greedy token must be the likeliest of a plain forward over the text before it, and every sampled token's logprob that
of a plain forward. Then the class is *same*. *Refused* is one for which the engine raises `ValueError`. *Not built* is one
whose tiny configuration or plain forward fails without us. *Wrong* and *crashed* are faults of this library; with one of
them the command ends in error. Each class runs in a process of its own, which is ended after `--limit` seconds
of CPU time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numba
import torch
import transformers
from transformers import PreTrainedModel

import atlas_rl
from atlas_rl import progress
from benchmarks.common import ROOT, environment, write_result
from benchmarks.tiny_policies import CHUNK, POSITIONS, WINDOW, build, model_types, wrapper_types

RESULT, PAGE = ROOT / "benchmarks" / "results" / "policies.json", ROOT / "docs" / "policies.md"
BEGIN, END = "<!-- table: python -m benchmarks.policies -->", "<!-- end of table -->"
_PROMPTS = (3, 2 * WINDOW + 1, CHUNK + 4)  # a short row and two that are longer than windows and chunks
_NEW_TOKENS = 16
_TOLERANCE = 1e-3  # nats, in float32
_CELL = 260  # most characters of a reason in the table
_REMEDIES = (
    "; generate with", ": generate with", ": in process only 'full_attention'", ". Requests here may reach",
    ", so that rows of different lengths cannot",
)  # fmt: skip
# Names in transformers' registry that share one configuration class and therefore one model type.
_REGISTERED = {"gpt2": ("gpt2", "gpt-sw3")}

# Settings that classes share and defaults omit: name, model type, options of its configuration.
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": POSITIONS}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama, yarn rope": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **_ROPE}}),
    "llama, llama3 rope": (
        "llama",
        {"rope_parameters": {
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_ROPE}},
    ),
    "llama, dynamic rope past its positions": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, "max_position_embeddings": 24},
    ),
    "phi3, longrope within its first factors": (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4,
                             **_ROPE}, "original_max_position_embeddings": 64},
    ),
    "phi3, longrope across its switch": (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4,
                             **_ROPE}, "original_max_position_embeddings": 24},
    ),
    "llama4_text, within a chunk": ("llama4_text", {"attention_chunk_size": 64}),
    "phimoe, within its window": ("phimoe", {"sliding_window": 64}),
    "gemma4_text, shared keys and values": ("gemma4_text", {"layer_types": _ALTERNATING, "num_kv_shared_layers": 2}),
    "gemma4_text, keys as values": (
        "gemma4_text",
        {"layer_types": _ALTERNATING, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "global_head_dim": 16},
    ),
    "gemma4_text, experts": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    ),
}  # fmt: skip

WRAPPERS = {
    f"{model_type}, with its images' part" if model_type in model_types() else model_type: model_type
    for model_type in wrapper_types()
}
"""Models of images and text, which are given text: names and model types."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result for one class.

    Attributes:
        name: Model type, or the name of a variant.
        model_class: Class of the policy; None if it was not built.
        outcome: `same`, `refused`, `not built`, `wrong` or `crashed`.
        detail: The reason, as the message of the error or refusal.
    """

    name: str
    model_class: str | None
    outcome: str
    detail: str


def built(name: str) -> PreTrainedModel | Outcome:
    """A policy, or the reason why there is none."""
    model_type, options = VARIANTS.get(name, (name, {}))
    try:
        return build(WRAPPERS.get(name, model_type), wrapper=name in WRAPPERS, **options)
    except Exception as error:  # noqa: BLE001 - whatever another library's class raises
        return Outcome(name, None, "not built", _said(error))


def tried(name: str, model: PreTrainedModel) -> Outcome:
    """Result of comparing a policy with plain forwards."""
    kind = type(model).__name__
    try:
        fault = _fault(model)
    except ValueError as error:
        return Outcome(name, kind, "refused", _said(error))
    except Exception as error:  # noqa: BLE001 - a crash is one of the outcomes
        return Outcome(name, kind, "crashed", f"{type(error).__name__}: {_said(error)}")
    return Outcome(name, kind, "wrong" if fault else "same", fault)


def _fault(model: PreTrainedModel) -> str:
    """Differences from plain forwards; empty if there are none."""
    rows = torch.randint(3, 64, (len(_PROMPTS), max(_PROMPTS)), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [row[:length] for row, length in zip(rows, _PROMPTS, strict=True)]
    for temperature in (0.0, 1.0):
        engine = atlas_rl.AtlasRolloutEngine(model=model, console=False)
        output = engine.generate(prompts, max_new_tokens=_NEW_TOKENS, temperature=temperature, eos_token_ids=[], seed=0)
        for row, (prompt, completion) in enumerate(zip(prompts, output.completion_ids, strict=True)):
            if len(completion) != _NEW_TOKENS:
                return f"row {row} has {len(completion)} tokens of {_NEW_TOKENS}"
            for position, token in enumerate(completion):
                logprobs = _next(model, prompt + completion[:position])
                if temperature == 0 and token != int(logprobs.argmax()):
                    return f"row {row}, greedy token {position} is not the likeliest of a plain forward"
                gap = abs(float(logprobs[token]) - output.logprobs[row][position])
                if temperature > 0 and not gap < _TOLERANCE:
                    return f"row {row}, token {position}: its logprob is off by {gap:.2g} nats"
    return ""


@torch.no_grad()
def _next(model: Any, text: list[int]) -> torch.Tensor:
    return torch.log_softmax(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].float(), dim=-1)


def _said(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:400] or type(error).__name__


def _child(name: str, sender: Connection, limit_s: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings of hundreds of classes
    model = built(name)
    if isinstance(model, PreTrainedModel):
        sender.send(type(model).__name__)
        model = tried(name, model)
    sender.send(model)


def in_process_of_its_own(name: str, limit_s: int) -> Outcome:
    """Run `built` and `tried` in a fork, so that a crash is contained; the fork ends after `limit_s` of CPU time."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_child, args=(name, sender, limit_s))
    process.start()
    sender.close()
    kind = None
    try:
        while not isinstance(received := receiver.recv(), Outcome):
            kind = received
        return received
    except EOFError:
        process.join()
        said = f"ended with code {process.exitcode} (within {limit_s} s of CPU time)"
        return Outcome(name, kind, "crashed" if kind else "not built", said)
    finally:
        process.kill()
        process.join()


def table(result: dict[str, Any]) -> str:
    """The table of docs/policies.md."""
    outcomes, versions = [Outcome(**row) for row in result["policies"]], result["environment"]["versions"]
    counts = Counter(outcome.outcome for outcome in outcomes)
    lines = [
        f"transformers {versions['transformers']}: "
        + ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts))
        + ".",
        "",
        "| policy | class | outcome |",
        "|---|---|---|",
    ]
    order = ("wrong", "crashed", "same", "refused", "not built")
    seen: Counter[str] = Counter()
    for outcome in sorted(outcomes, key=lambda o: (order.index(o.outcome), o.name)):
        names = _REGISTERED.get(outcome.name, (outcome.name,))
        name = names[min(seen[outcome.name], len(names) - 1)]
        seen[outcome.name] += 1
        detail = f": {_cell(outcome)}" if outcome.detail else ""
        lines.append(f"| {name} | {outcome.model_class or ''} | {outcome.outcome}{detail} |")
    return "\n".join(lines)


def _cell(outcome: Outcome) -> str:
    """The finding without the name and the remedy, which are the same in every row."""
    text = outcome.detail.removeprefix(f"{outcome.model_class} ")
    for same_in_every_row in _REMEDIES:
        text = text.split(same_in_every_row)[0]
    return _shortened(text).replace("|", "\\|").replace("<", "&lt;")


def _shortened(text: str) -> str:
    """As many sentences as fit into a cell, or else as many words."""
    if len(text) <= _CELL:
        return text
    head = text[: _CELL + 1]
    return f"{head.rpartition('. ')[0] or head.rpartition(' ')[0]} ..."


def updated(result: dict[str, Any], outcomes: list[Outcome]) -> dict[str, Any]:
    """The recorded result with this run's rows replaced or added; `updates` lists them with their versions."""
    rows = {outcome.name: asdict(outcome) for outcome in outcomes}
    update = {"environment": environment(), "names": list(rows)}
    policies = [rows.get(row["name"], row) for row in result["policies"]]
    policies += [row for name, row in rows.items() if name not in {row["name"] for row in result["policies"]}]
    return {**result, "policies": policies, "updates": [*result.get("updates", []), update]}


def write_page(result: dict[str, Any], page: Path = PAGE) -> None:
    """Write the table into the page."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table(result)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="model types or variants")
    parser.add_argument("--update", action="store_true", help="write the rows of --only into the recorded result")
    parser.add_argument("--limit", type=int, default=60, help="seconds of CPU time per class")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    numba.config.THREADING_LAYER = "workqueue"  # survives a fork, unlike OpenMP
    names, began, outcomes = arguments.only or [*model_types(), *VARIANTS, *WRAPPERS], time.perf_counter(), []
    tried("llama", build("llama"))  # imports and compiles what all classes use
    for name in progress.each(names, "classes", "class"):
        outcomes.append(in_process_of_its_own(name, arguments.limit))
        last = outcomes[-1]
        progress.say(f"{len(outcomes)}/{len(names)} {last.name}: {last.outcome}. {last.detail}")
    if arguments.update:
        result = updated(json.loads(RESULT.read_text(encoding="utf-8")), outcomes)
        write_result(RESULT, result)
        write_page(result)
    elif not arguments.only:
        result = {
            "environment": environment(),
            "seconds": round(time.perf_counter() - began, 1),
            "policies": [asdict(outcome) for outcome in outcomes],
        }
        write_result(RESULT, result)
        write_page(result)
    faults = [outcome.name for outcome in outcomes if outcome.outcome in ("wrong", "crashed")]
    if faults:
        sys.exit(f"wrong or crashed: {', '.join(faults)}")


if __name__ == "__main__":
    main()
