"""The engine's options. Defaults work for any policy, batch and machine; options are for experiments."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from atlas_rl.checks import equals, flag, instance, instances, number, one_of, path, reject_unknown, whole, wrong
from atlas_rl.controller.base import Controller
from atlas_rl.speculators.base import Speculator


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Options of `AtlasRolloutEngine`.

    Attributes:
        speculation: False decodes without drafts: the baseline, with the same tokens.
        verification: `invariant` (drafter-invariant sampling) or `rejection`.
        draft_model: The static speculator: "mtp", the layer for multi-token prediction of the policy's own checkpoint, or
            "mtp:FOLDER", that of another folder; "fp4", a four-bit copy of the policy (a folder of such a name is "./fp4");
            the folder of an EAGLE-3 or DFlash head, or of a causal LM with the policy's tokenizer; or a loaded causal LM.
        speculators: Speculators to use instead of the defaults (history index, recurrent head, and the static one if
            given).
        controller: Controller to use instead of `GoodputController`.
        max_batch_size: Most requests decoded together; None: as many as memory allows.
        output_dir: Folder for `rollouts.jsonl`, one report per line, with the engine that wrote it (`engine`, a random
            name) and its process (`rank`); None writes no file.
        trace: Append one line per decode step to `controller.jsonl` in `output_dir` (with several ranks, one file per
            rank): the drafters asked, and the expected and actual tokens and seconds.
        console: Print one line per report.
        spare_importance_sampling: In process the sampled logprobs are the trainer's own, so its importance-sampling
            correction multiplies by one and costs a forward pass. True checks this on the first step and then
            switches the correction off; False leaves it on.
        audit_share: Share of the tokens that is also put through a plain forward pass, to check that samples and logprobs
            come from the policy (`audit/auditor.py`); in [0, 1], 0 disables it. Prompts of audited completions
            count, so with small steps only one completion in several steps is audited.
        backend: `in_process`, `vllm`, or `auto`: vLLM for a trainer with `use_vllm=True`, and for a model that is a
            checkpoint's folder or name, or a `vllm.LLM`; else in process.
        clock: Function that returns seconds since some fixed moment, for the times in reports and the controller's costs.

    Raises:
        ValueError: A value that no option takes.
    """

    speculation: bool = True
    verification: str = "invariant"
    draft_model: nn.Module | str | Path | None = None
    speculators: Sequence[Speculator] | None = None
    controller: Controller | None = None
    max_batch_size: int | None = None
    output_dir: str | Path | None = None
    trace: bool = False
    console: bool = True
    spare_importance_sampling: bool = True
    audit_share: float = 0.01
    backend: str = "auto"
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        one_of("verification", self.verification, ("invariant", "rejection"))
        one_of("backend", self.backend, ("auto", "in_process", "vllm"))
        for name in ("speculation", "trace", "console", "spare_importance_sampling"):
            self._take(name, flag(name, getattr(self, name)))
        _check_drafting(self)
        if self.max_batch_size is not None:
            self._take("max_batch_size", whole("max_batch_size", self.max_batch_size, 1, hint="or None"))
        if self.output_dir is not None:
            path("output_dir", self.output_dir, "a folder")
        share = number("audit_share", self.audit_share, "in [0, 1] (0 never audits)", lambda share: 0 <= share <= 1)
        self._take("audit_share", share)
        if not callable(self.clock):
            raise wrong(
                "clock", "a function without arguments that returns seconds, such as time.perf_counter", self.clock
            )
        if self.backend == "vllm" and self.verification != "invariant":
            raise ValueError("the vLLM backend verifies by drafter-invariant sampling: leave verification='invariant'")
        if self.backend == "vllm" and (self.trace or self.max_batch_size is not None):
            raise ValueError(
                "trace and max_batch_size belong to the in-process backend: vLLM has max_num_seqs for the latter"
            )
        if self.trace and (self.output_dir is None or self.controller is not None):
            raise ValueError("trace=True needs output_dir, the folder it writes to, and the engine's own controller")

    def _take(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> EngineConfig:
        """The config of keyword options; the `ValueError` for an unknown option names the nearest one."""
        reject_unknown(options, ["model", "tokenizer", *(field.name for field in fields(cls))], "AtlasRolloutEngine")
        return cls(**options)


def _check_drafting(config: EngineConfig) -> None:
    """Raise `ValueError` for an invalid draft model, speculators or controller, or a combination that cannot work."""
    if config.controller is not None:
        instance("controller", config.controller, Controller, "a Controller or None")
    if config.draft_model is not None and not isinstance(config.draft_model, nn.Module):
        _check_draft_folder(config.draft_model)
    if config.speculators is None:
        return
    if config.draft_model is not None:
        raise ValueError(
            "give either draft_model or speculators. Leave out draft_model and add its drafter to the speculators: "
            "Eagle3Speculator(...) for an EAGLE-3 head, DFlashSpeculator(...) for a DFlash head, MtpSpeculator(...) for an "
            "MTP layer, Fp4SelfSpeculator(...) for the four-bit copy, DraftLM(...) for a causal LM"
        )
    speculators = instances("speculators", config.speculators, Speculator)
    names = [speculator.name for speculator in speculators]
    if len(set(names)) < len(names):
        raise ValueError(f"speculators need different names, got {names}")


def mtp_folder(given: Any) -> str | None:
    """Folder of the checkpoint whose MTP layer `draft_model` asks for, "" for the policy's own; None if it asks for none."""
    asks = isinstance(given, str) and (given == "mtp" or given.startswith("mtp:"))
    return given[len("mtp:") :] if asks else None


def _check_draft_folder(given: Any) -> None:
    """Raise `ValueError` unless it is "mtp", "fp4" or a local folder: nothing is downloaded."""
    if equals(given, "mtp") or equals(given, "fp4"):
        return
    wanted = 'a loaded causal LM, "mtp", "fp4", or the folder of an EAGLE-3 or DFlash head or of a causal LM'
    folder = mtp_folder(given)
    if path("draft_model", given, wanted).is_dir() if folder is None else folder and Path(folder).is_dir():
        return
    raise ValueError(
        f"draft_model: no checkpoint in {str(given if folder is None else folder)!r}, which is no folder of this machine. "
        "Names of the hub are not looked up: download the checkpoint and give its folder. A four-bit copy of the policy "
        "itself is draft_model='fp4', and the MTP layer of its own checkpoint is 'mtp'"
    )
