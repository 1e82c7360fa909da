"""Finds settings that would fail during training with the engine attached, before training time is spent."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from itertools import pairwise
from types import CodeType
from typing import Any

from accelerate.utils import is_peft_model

from atlas_rl.checks import whole
from atlas_rl.core import SamplingParams
from atlas_rl.integrations.trl.kinds import Way, kind_of
from atlas_rl.integrations.trl.whole_policy import shards
from atlas_rl.policy.in_process import InProcessRunner

_THEIRS = ("transformers.", "trl.")
_READERS = ("_prepare_inputs", "_generate_and_score_completions")
"""Methods of trainers that read the column 'prompt'."""
_ON_THE_WAY = (
    "get_train_dataloader", "get_eval_dataloader", "_get_dataloader", "_get_train_sampler", "_get_eval_sampler",
    "get_batch_samples", "training_step", "prediction_step", "_generate",
)  # fmt: skip
"""Other methods that may bring or change the rows."""
_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def check_trainer(trainer: Any, baseline_every: int, *, in_process: bool) -> None:
    """Raise `ValueError` for a trainer that no engine, or no engine with this backend, can be attached to."""
    whole("baseline_every", baseline_every, 0, hint="(0 never)")
    kind = kind_of(trainer)
    way = kind.in_process if in_process else kind.vllm
    if way is None:
        raise ValueError(
            f"{type(trainer).__name__} has no vLLM engine that can be replaced: build it with use_vllm=False and "
            "attach AtlasRolloutEngine(), which generates in process"
        )
    if _is_training(trainer):
        raise ValueError(
            "the trainer is training: attach before train() or after it, because drafters are restored, and a trainer that "
            "calls model.generate is served, from the beginning of a run"
        )
    if getattr(trainer, "rollout_func", None) is not None:
        raise ValueError("the trainer has a rollout_func, which would bypass the engine: leave it out and attach")
    if getattr(trainer, "use_transformers_continuous_batching", False):
        raise ValueError("set use_transformers_continuous_batching=False: the engine batches by itself")
    if not in_process:
        _check_merging(trainer)
    _check_way_to_the_engine(trainer, way)
    _check_correction(trainer)
    if kind.scores_as_built and trainer.args.temperature == 0:
        raise ValueError(
            f"temperature is 0, and {type(trainer).__name__} divides by it when it scores completions: set it above 0"
        )
    _check_prompt_column(trainer)


def _is_training(trainer: Any) -> bool:
    """Whether the libraries' `train` calls this. A subclass may attach in its own, before it calls theirs.

    The flag `is_in_train` stays set after a run that raised.
    """
    frame = inspect.currentframe()
    while frame is not None:
        is_theirs = str(frame.f_globals.get("__name__", "")).startswith(_THEIRS)
        if is_theirs and frame.f_code.co_name == "train" and frame.f_locals.get("self") is trainer:
            return True
        frame = frame.f_back
    return False


def check_gathering(trainer: Any) -> None:
    """Raise `ValueError` if all ranks together cannot gather the weights once per generation call.

    Ranks generate different numbers of tokens. A collective in every forward, or in calls of only some ranks, would
    deadlock.
    """
    once = "the engine gathers the policy once per generation call, because ranks need different numbers of forwards"
    splits = _splits_forwards(trainer)
    if splits:
        raise ValueError(
            f"with {splits} every forward of the policy is a collective: {once}. Switch it off, or generate with vLLM"
        )
    sharder = shards(trainer)
    if sharder and kind_of(trainer).calls_the_policy:
        raise ValueError(
            f"{type(trainer).__name__} calls model.generate, for which the engine cannot gather a policy sharded by "
            f"{sharder}: train with DDP or ZeRO-2, or generate with vLLM if docs/trainers.md says that it can"
        )
    if sharder == "DeepSpeed ZeRO-3" and not trainer.args.ds3_gather_for_generation:
        raise ValueError(
            f"ds3_gather_for_generation=False gathers ZeRO-3's shards in every forward: {once}. Leave it at True, or "
            "generate with vLLM if the whole policy does not fit on a device"
        )
    if sharder and getattr(trainer, "tools", None):
        raise ValueError(
            f"with tools each rank makes as many generation calls as its own completions need, and {sharder} needs all "
            "ranks to gather the policy in each of them: train with DDP or ZeRO-2, or generate with vLLM"
        )


def check_tools(trainer: Any, num_ranks: int, setting: str, instead: str) -> None:
    """Raise `ValueError` for tools or environments if ranks have to make every call to vLLM together.

    In TRL's tool loop a rank makes as many calls as its own completions need, with only those prompts that go on. Such
    ranks would wait for each other, or get completions of each other's prompts.

    Args:
        trainer: Its `tools` include those of its environments.
        num_ranks: Number of ranks that make the calls together.
        setting: Why they do, for the message.
        instead: What to do, for the message.
    """
    if num_ranks > 1 and getattr(trainer, "tools", None):
        raise ValueError(
            f"with tools each rank makes as many generation calls as its own completions need, but with {setting} "
            f"{num_ranks} ranks have to make every call together: {instead}"
        )


def _splits_forwards(trainer: Any) -> str:
    """Names what splits a single forward over ranks; empty if nothing does."""
    model, state = trainer.model, trainer.accelerator.state
    layout = getattr(trainer.accelerator, "parallelism_config", None)
    for kind, words in (("tp", "tensor parallelism"), ("cp", "context parallelism"), ("sp", "sequence parallelism")):
        if getattr(layout, f"{kind}_enabled", False):
            return f"{words} (parallelism_config, {kind}_size={getattr(layout, f'{kind}_size')})"
    if (getattr(model, "tp_size", None) or 1) > 1:
        return f"tensor parallelism (the policy was loaded with tp_size={model.tp_size})"
    plugin = getattr(state, "deepspeed_plugin", None)
    size = plugin.deepspeed_config.get("tensor_parallel", {}).get("autotp_size", 0) if plugin else 0
    if size > 1:
        return f"DeepSpeed's tensor parallelism (autotp_size={size})"
    distributed = getattr(getattr(model, "config", None), "distributed_config", None)
    if getattr(distributed, "enable_expert_parallel", False):
        return "expert parallelism (distributed_config)"
    return ""


def check_policy_in_process(trainer: Any, sampling: SamplingParams) -> None:
    """Raise `ValueError` for a policy, ending tokens or prompts that the engine cannot run in process.

    A policy whose weights are whole is probed at once. A policy that DeepSpeed or FSDP will shard is not on a device
    yet.
    """
    runner = InProcessRunner(trainer.model, is_placed=not shards(trainer))
    for token in sampling.eos_token_ids:
        if token >= runner.vocab_size:
            raise ValueError(
                f"the ending token {token} lies outside the policy's vocabulary of {runner.vocab_size} tokens: correct "
                "eos_token_id of the policy's generation_config, or the tokenizer's"
            )
    for dataset in _datasets(trainer):
        _check_prompts(dataset)
    if is_whole(trainer):
        with runner.session(runner.new_cache(1, 1)):
            pass
        # A prompt has at least one token, and the last drawn token is not run.
        runner.check_reach(min(sampling.max_new_tokens, runner.max_context or sampling.max_new_tokens))


def is_whole(trainer: Any) -> bool:
    """Whether the policy's weights are whole and on the device where the trainer runs them."""
    if trainer.is_deepspeed_enabled or shards(trainer):
        return False
    return all(parameter.device.type == trainer.accelerator.device.type for parameter in trainer.model.parameters())


def _check_way_to_the_engine(trainer: Any, way: Way) -> None:
    """Raise `ValueError` if the trainer generates in a method of its own that never calls the engine."""
    for stage, following in pairwise(way):
        method = getattr(trainer, stage, None)
        if method is not None and not _mentions(method, trainer, {stage, following}):
            raise ValueError(
                f"{type(trainer).__name__} generates in a {stage} of its own, which never asks the engine: let it call "
                f"super().{stage}(...), or do not attach"
            )


def _mentions(method: Any, trainer: Any, wanted: set[str]) -> bool:
    """Whether a method's code, or a sibling method that it calls or wraps, mentions one of the names."""
    functions, seen = [_function(method)], set()
    while functions:
        function = functions.pop()
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        names = set(_names(code))
        if names & wanted:
            return True
        cells = [_content(cell) for cell in function.__closure__ or ()]
        if any(getattr(content, "__name__", None) in wanted for content in cells):
            return True
        beside = [_function(getattr(type(trainer), name, None)) for name in names]
        own = function.__globals__["__name__"]
        functions += [each for each in beside if getattr(each, "__globals__", {}).get("__name__") == own]
        functions += [_function(content) for content in cells if callable(content)]
    return False


def _function(method: Any) -> Any:
    while isinstance(method, functools.partial):
        method = method.func
    method = getattr(method, "__func__", method)
    return inspect.unwrap(method) if callable(method) else None


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _check_merging(trainer: Any) -> None:
    """Raise `ValueError` for adapters that TRL cannot merge to send the policy to vLLM."""
    if shards(trainer) == "FSDP1" and is_peft_model(trainer.model):
        raise ValueError(
            "TRL cannot merge adapters into a policy that FSDP1 shards, so vLLM would not get them: train with FSDP2 "
            "(fsdp_config version 2) or without adapters, or generate in process"
        )


def _check_correction(trainer: Any) -> None:
    """TRL's checks of the importance-sampling correction, which its constructor makes only with `use_vllm=True`.

    Raises:
        ValueError: The loss does not work with the correction's mode, or the mode does not exist.
    """
    if not getattr(trainer, "vllm_importance_sampling_correction", False):
        return
    mode, loss = trainer.vllm_importance_sampling_mode, getattr(trainer, "loss_type", None)
    known = _CORRECTIONS[:2] if loss == "vespo" else _CORRECTIONS
    if mode not in known:
        of_loss = f" with loss_type={loss!r}" if loss == "vespo" else ""
        raise ValueError(
            f"vllm_importance_sampling_mode is {mode!r}; a trainer that generates with an engine needs one of "
            f"{list(known)}{of_loss}, or vllm_importance_sampling_correction=False"
        )


def _check_prompt_column(trainer: Any) -> None:
    """Raise `ValueError` for a dataset without prompts, which TRL would find when it generates.

    A subclass or a collator may read the rows in another way, and an environment may bring the prompts.
    """
    readers = [getattr(trainer, name, None) for name in (*_READERS, "data_collator")]
    others = [getattr(trainer, name) for name in _ON_THE_WAY if hasattr(trainer, name)]
    are_trls = all(str(getattr(each, "__module__", "")).startswith("trl.") for each in readers)
    are_theirs = all(str(getattr(each, "__module__", "")).startswith(_THEIRS) for each in others)
    if not (are_trls and are_theirs) or getattr(trainer, "environment_factories", None):
        return
    for dataset in _datasets(trainer):
        columns = getattr(dataset, "column_names", None)
        if isinstance(columns, list) and hasattr(dataset, "__len__") and len(dataset) and "prompt" not in dataset[0]:
            raise ValueError(
                f"{type(trainer).__name__} reads the column 'prompt', and the dataset has {columns}: rename one, such as "
                f"dataset.rename_column({columns[0]!r}, 'prompt')"
            )


def _datasets(trainer: Any) -> list[Any]:
    """The datasets that `train` reads. It evaluates only if it is told to."""
    args = trainer.args
    evaluates = args.eval_strategy != "no" or getattr(args, "eval_on_start", False)
    return [trainer.train_dataset, *([getattr(trainer, "eval_dataset", None)] if evaluates else [])]


def _check_prompts(dataset: Any) -> None:
    """Raise `ValueError` for a dataset whose first row has images."""
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or not hasattr(dataset, "__len__") or not len(dataset):
        return
    if any(column in columns and dataset[0][column] for column in ("image", "images")):
        raise ValueError("prompts with images cannot be generated in process: use TRL's own engine for them")
