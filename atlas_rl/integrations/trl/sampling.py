"""Reads the sampling options of a TRL trainer, for either engine, and of a call of `model.generate`.

A trainer keeps the common options as its own attributes and the rest in `generation_kwargs`, which override attributes
of the same name. Both engines read the options here; they differ in the entries of `generation_kwargs` that they
support. An entry without effect is dropped, whether its name is TRL's, transformers' or vLLM's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import GenerationConfig

from atlas_rl.checks import empty, equals, shown, whole, wrong
from atlas_rl.core import SamplingParams
from atlas_rl.decode.generate import ending_ids, ending_tokens_of

OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Options that every engine has. The trainer itself sets the number of tokens, the ending tokens and the seed."""

_OFF: Mapping[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
"""What None means: off. In `transformers.generate`, an unset `top_k` is 50 instead."""

_NEUTRAL: Mapping[str, Any] = {
    "best_of": 1,
    "diversity_penalty": 0,
    "do_sample": True,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "frequency_penalty": 0,
    "guidance_scale": 1,
    "ignore_eos": False,
    "is_assistant": False,
    "logprobs": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_tokens": 0,
    "n": 1,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "presence_penalty": 0,
    "remove_invalid_values": False,
    "token_healing": False,
    "top_h": 1,
    "typical_p": 1,
}
"""Values of other options, by name, at which they change nothing."""

_NEUTRAL_WHERE_EMPTY = frozenset(
    {
        *_NEUTRAL,
        "allowed_token_ids",
        "bad_words",
        "bad_words_ids",
        "begin_suppress_tokens",
        "constraints",
        "dola_layers",
        "exponential_decay_length_penalty",
        "force_words_ids",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "logit_bias",
        "logits_processors",
        "max_time",
        "prompt_logprobs",
        "seed",
        "sequence_bias",
        "stop",
        "stop_strings",
        "stop_token_ids",
        "structured_outputs",
        "suppress_tokens",
        "watermarking_config",
    }
) - {"do_sample"}
"""Options that None or an empty collection switches off. `do_sample=None` is no sampling."""

_WITHOUT_EFFECT = frozenset(
    {
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_lookbehind",
        "bos_token_id",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "decoder_start_token_id",
        "disable_compile",
        "early_stopping",
        "length_penalty",
        "low_memory",
        "max_cache_len",
        "max_length",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "prefill_chunk_size",
        "prompt_lookup_num_tokens",
        "renormalize_logits",
        "return_dict_in_generate",
        "speculation_type",
        "target_lookbehind",
        "transformers_version",
        "use_cache",
        "use_mtp",
    }
)
"""Options of transformers about how its own loop runs, about beams, or that `max_new_tokens` overrules."""


_SET_BY_THE_TRAINER = frozenset({"do_sample", "eos_token_id", "max_new_tokens", "pad_token_id"})
"""Fields of a policy's `generation_config` that TRL overrules whatever its own options are."""


@dataclass(frozen=True, slots=True)
class TrainerSampling:
    """How a trainer wants its rollouts sampled.

    Attributes:
        params: Options that every engine has.
        extra: Other entries of `generation_kwargs` that have an effect. An engine supports them or raises an error.
    """

    params: SamplingParams
    extra: dict[str, Any]


def left_to_the_policy(trainer: Any) -> dict[str, Any]:
    """Options of the policy's own `generation_config` that the trainer leaves unset.

    `transformers.generate`, with which TRL itself generates, reads such options from there. Names that transformers
    does not know have no effect on it.
    """
    return _set_in(getattr(trainer.model, "generation_config", None))


def beyond_its_attributes(trainer: Any) -> dict[str, Any]:
    """Options of the trainer's own `generation_config` that it has no attribute for; they precede those of the policy.

    TRL gives it to `transformers.generate`. Trainers with a processor suppress the image token there.
    """
    found = _set_in(getattr(trainer, "generation_config", None))
    return {name: value for name, value in found.items() if name not in OPTIONS}


def _set_in(config: Any) -> dict[str, Any]:
    known = {name for name in vars(GenerationConfig()) if name[0] != "_"} - _SET_BY_THE_TRAINER
    return (
        {name: value for name, value in vars(config).items() if name in known and value is not None} if config else {}
    )


def with_suppressed(sampling: TrainerSampling) -> TrainerSampling:
    """Move `suppress_tokens` to the options that are honoured, as they are in process; `ValueError` for wrong values."""
    extra = dict(sampling.extra)
    tokens = extra.pop("suppress_tokens", None)
    return sampling if tokens is None else TrainerSampling(replace(sampling.params, suppress_tokens=tokens), extra)


def read_sampling(trainer: Any, seed: int, of_policy: Mapping[str, Any] | None = None) -> TrainerSampling:
    """The trainer's present sampling options with `seed`.

    Args:
        trainer: Provides options by its `generation_kwargs`, else by its attributes.
        seed: Seed of the noise.
        of_policy: Options by name that apply if the trainer sets none (`left_to_the_policy`, `beyond_its_attributes`).

    Raises:
        ValueError: A value is out of range.
    """
    asked = getattr(trainer.args, "generation_kwargs", None) or {}
    if not isinstance(asked, Mapping):
        raise wrong("generation_kwargs", "a dict of options or None", asked)
    given = {name: _option(trainer, name) for name in OPTIONS} | dict(asked)
    given |= {name: value for name, value in (of_policy or {}).items() if given.get(name) is None}
    options = {name: _OFF[name] if (value := given.pop(name)) is None else value for name in OPTIONS}
    if equals(options["top_k"], -1):
        options["top_k"] = 0  # vLLM's value for off
    _check_do_sample(asked)
    params = SamplingParams(
        max_new_tokens=whole("max_completion_length", _option(trainer, "max_completion_length"), 1),
        eos_token_ids=tuple(_endings(trainer)),
        seed=seed,
        **options,
    )
    extra = {name: value for name, value in given.items() if not _is_neutral(name, value, params)}
    for name, of_trainer in (
        (
            "eos_token_id",
            "the ending tokens are the tokenizer's and those of the policy's generation_config: set it there",
        ),
        ("max_new_tokens", "set max_completion_length"),
        ("max_tokens", "set max_completion_length"),
    ):
        if name in extra:
            raise ValueError(
                f"generation_kwargs has {name}={extra[name]!r}, which is not what the trainer has: {of_trainer}"
            )
    return TrainerSampling(params, extra)


def _option(trainer: Any, name: str) -> Any:
    """Value of an option that is an attribute of the trainer, one of its arguments, or absent."""
    return getattr(trainer, name) if hasattr(trainer, name) else getattr(trainer.args, name, None)


def _endings(trainer: Any) -> list[int]:
    """The trainer's ending tokens, else those of its tokenizer and policy, as in vLLM."""
    if hasattr(trainer, "eos_token_ids"):
        return ending_ids(trainer.eos_token_ids, "the ending tokens (eos_token_id of the policy's generation_config)")
    sources = (trainer.processing_class, getattr(trainer.model, "generation_config", None))
    return list(dict.fromkeys(token for source in sources for token in ending_tokens_of(source)))


def read_generation_config(config: GenerationConfig) -> TrainerSampling:
    """The sampling options of one call of `model.generate`, from the configuration that transformers made for it.

    Args:
        config: A complete configuration: missing options are off. Without `do_sample` the call is greedy, and of
            the options only the penalty applies.

    Raises:
        ValueError: The number of new tokens is missing, or a value is out of range.
    """
    known = {name for name in vars(GenerationConfig()) if name[0] != "_"}
    given = {name: value for name, value in vars(config).items() if name in known and value is not None}
    if "max_new_tokens" not in given:
        raise ValueError("max_new_tokens is not set")
    options = {name: given.pop(name, _OFF[name]) for name in OPTIONS}
    if not given.pop("do_sample", False):
        options = {**_OFF, "repetition_penalty": options["repetition_penalty"], "temperature": 0.0}
    params = SamplingParams(
        max_new_tokens=given.pop("max_new_tokens"),
        eos_token_ids=tuple(ending_ids(given.pop("eos_token_id", None), "eos_token_id of the generation_config")),
        **options,
    )
    given.pop("num_return_sequences", None)  # handled by the caller
    defaults = GenerationConfig._get_default_generation_params()  # includes options that are newer than the lists above
    extra = {
        name: value
        for name, value in given.items()
        if not _is_neutral(name, value, params) and not (name in defaults and equals(value, defaults[name]))
    }
    return TrainerSampling(params, extra)


def _check_do_sample(asked: Mapping[str, Any]) -> None:
    if "do_sample" not in asked or equals(asked["do_sample"], True):
        return
    value = asked["do_sample"]
    means = "transformers takes that for False. " if value is None else ""
    raise ValueError(
        f"generation_kwargs has do_sample={shown(value)}: {means}Leave it out to sample; for greedy decoding set "
        "temperature=0 there"
    )


def _is_neutral(name: str, value: Any, params: SamplingParams) -> bool:
    """Whether an entry of `generation_kwargs` has no effect."""
    if name in ("max_new_tokens", "max_tokens"):
        return value is None or equals(value, params.max_new_tokens)
    if name == "eos_token_id":
        # The trainer cuts completions at its own ending tokens, whatever the generation loop was given.
        return set(ending_ids(value, "eos_token_id of generation_kwargs")) <= set(params.eos_token_ids)
    if name in _NEUTRAL_WHERE_EMPTY and (value is None or empty(value)):
        return True
    return name in _WITHOUT_EFFECT or (name in _NEUTRAL and equals(value, _NEUTRAL[name]))
