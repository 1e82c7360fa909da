"""Reads a TRL trainer's sampling options, for either engine.

A trainer keeps the common options as attributes of its own and the rest in `generation_kwargs`, which win over attributes
of the same name. Both engines read them here; they differ in the entries of `generation_kwargs` that they can honour. An
entry that asks for nothing is dropped, whichever of TRL, transformers and vLLM has the name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atlas_rl.core import SamplingParams
from atlas_rl.decode.generate import ending_ids

OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Options that every engine has. The trainer itself sets the number of tokens, the ending tokens and the seed."""

_OFF: Mapping[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
"""What None means, to TRL and to transformers."""

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
        "target_lookbehind",
        "use_cache",
    }
)
"""Options of transformers about how its own loop runs, about beams, or that `max_new_tokens` overrules."""


@dataclass(frozen=True, slots=True)
class TrainerSampling:
    """How a trainer wants its rollouts sampled.

    Attributes:
        params: The options that every engine has.
        extra: The other entries of `generation_kwargs` that ask for something. An engine honours them or refuses them.
    """

    params: SamplingParams
    extra: dict[str, Any]


def read_sampling(trainer: Any, seed: int) -> TrainerSampling:
    """The trainer's present sampling options with `seed`. Raises `ValueError` for a value that is out of its range."""
    given = dict(trainer.args.generation_kwargs or {})
    options = {name: given.pop(name, getattr(trainer, name)) for name in OPTIONS}
    options = {name: _OFF[name] if value is None else value for name, value in options.items()}
    options["top_k"] = max(options["top_k"], 0)  # -1 is off too
    if not given.get("do_sample", True):
        raise ValueError("generation_kwargs has do_sample=False: for greedy decoding set temperature=0 there")
    endings = ending_ids(trainer.eos_token_ids)
    params = SamplingParams(
        max_new_tokens=trainer.max_completion_length, eos_token_ids=tuple(endings), seed=seed, **options
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
                f"generation_kwargs has {name}={extra[name]}, which is not what the trainer has: {of_trainer}"
            )
    return TrainerSampling(params, extra)


def _is_neutral(name: str, value: Any, params: SamplingParams) -> bool:
    """Whether an entry of `generation_kwargs` asks for nothing."""
    if name in ("max_new_tokens", "max_tokens"):
        return value is None or value == params.max_new_tokens
    if name == "eos_token_id":
        # The trainer cuts completions at its own ending tokens, whatever else the loop was told.
        return set(ending_ids(value)) <= set(params.eos_token_ids)
    if name in _NEUTRAL_WHERE_EMPTY and (value is None or value in ([], (), {})):
        return True
    return name in _WITHOUT_EFFECT or (name in _NEUTRAL and bool(value == _NEUTRAL[name]))
