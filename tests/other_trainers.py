"""Tiny trainers of TRL's other kinds that sample, a few steps on a CPU, and the rows that they train on."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from atlas_rl import AtlasRolloutEngine
from tests.models import tiny_bigram
from tests.trainers import DATA, SMALL_AND_QUIET, WORDS, rewards, with_special_tokens, word_tokenizer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""A prompt and its completion, as token ids."""

TEXTS = ("a b c", "d e", "f g h i", "c a")
CHAT = Dataset.from_list(
    [{"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "b b b"}]} for t in TEXTS] * 4
)
PRIVILEGED = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": text}], "privileged_context": "b b b"} for text in TEXTS] * 4
)
GROUPS, LENGTH = {"num_generations": 4}, {"max_completion_length": 12}


def policy(seed: int = 1, vocab: int = len(WORDS)) -> PreTrainedModel:
    """A policy that a drafter can learn, whose context takes every trainer's prompts, and that vLLM runs on CPUs."""
    model = tiny_bigram(vocab=vocab, hidden=64, heads=2, kv_heads=2, context=256, seed=seed, logit_std=2.5)
    return with_special_tokens(model)


def byte_tokenizer(num_tokens: int | None = None) -> PreTrainedTokenizerFast:
    """A token per byte, as GOLD wants it; padding and ending tokens are those of `word_tokenizer`.

    With `num_tokens` it has the space and the first letters only, as many tokens as the policy of `word_tokenizer`.
    """
    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    if num_tokens is not None:
        alphabet = [*alphabet[:2], "Ġ", *ascii_lowercase][:num_tokens]
    base = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=base, pad_token="<pad>", eos_token="<eos>", chat_template=word_tokenizer().chat_template
    )


def _saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedModel:
    """The model, which says where it lies: some trainers load it or its tokenizer from there once more."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.config._name_or_path = model.name_or_path = str(folder)
    return model


def _of_chats(completions: list[Any], **kwargs: Any) -> list[float]:
    return rewards([completion[0]["content"] for completion in completions])


def _whether_b(completions: list[str], **kwargs: Any) -> list[float]:
    return [float("b" in completion.split()) for completion in completions]


@dataclass(frozen=True)
class Kind:
    """One of TRL's trainers: where its classes are, what it is built of, and options of its configuration."""

    module: str
    name: str
    dataset: Dataset
    options: dict[str, Any]
    reward: Callable[..., list[float]] | None = None
    teacher: bool = False
    tokenizer: Callable[[], PreTrainedTokenizerFast] = word_tokenizer


KINDS = {
    "gmpo": Kind("trl.experimental.gmpo", "GMPO", DATA, GROUPS | LENGTH, reward=rewards),
    "distillation": Kind("trl", "Distillation", DATA, LENGTH, teacher=True),
    "server_distillation": Kind("trl.experimental.server_distillation", "ServerDistillation", DATA, LENGTH),
    "sdft": Kind("trl.experimental.sdft", "SDFT", PRIVILEGED, GROUPS | LENGTH | {"distillation_topk": 8}),
    "sdpo": Kind("trl.experimental.sdpo", "SDPO", PRIVILEGED, GROUPS | LENGTH, reward=_of_chats),
    "gold": Kind(
        "trl.experimental.gold",
        "GOLD",
        CHAT,
        LENGTH | {"use_uld_loss": False, "max_length": 64, "lmbda": 1.0},
        teacher=True,
        tokenizer=byte_tokenizer,
    ),
    "iw_opd": Kind("trl.experimental.iw_opd", "IWOPD", CHAT, LENGTH | {"max_length": 64}, teacher=True),
    "online_dpo": Kind("trl.experimental.online_dpo", "OnlineDPO", DATA, {"max_new_tokens": 12}, reward=rewards),
    "gkd": Kind(
        "trl.experimental.gkd", "GKD", CHAT, {"max_new_tokens": 12, "max_length": 64, "lmbda": 1.0}, teacher=True
    ),
    "a2po": Kind(
        "trl.experimental.a2po",
        "A2PO",
        DATA,
        LENGTH | {"num_value_samples": 2, "filter_all_incorrect": False},
        reward=_whether_b,
    ),
}


def build_other(
    kind: str,
    folder: Path,
    *,
    model: Any = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    subclass: Callable[[type], type] = lambda of_trl: of_trl,
    peft: bool = False,
    evaluates: bool = False,
    **options: Any,
) -> Any:
    """A trainer of one of the `KINDS`, four rows per step; `options` are its configuration's."""
    made = KINDS[kind]
    module = importlib.import_module(made.module)
    defaults = SMALL_AND_QUIET | {"per_device_train_batch_size": 4, "max_steps": 2}
    tokenizer, extra = tokenizer or made.tokenizer(), {}
    tokenizer.padding_side = "left"
    if made.reward is not None:
        extra["reward_funcs"] = made.reward
    if made.teacher:
        extra["teacher_model"] = _saved(policy(2, len(tokenizer)), tokenizer, folder / "teacher")
    if peft:
        extra["peft_config"] = LoraConfig(
            r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
    if evaluates:
        extra["eval_dataset"] = made.dataset.select(range(4))
    return subclass(getattr(module, f"{made.name}Trainer"))(
        model=_saved(policy(1, len(tokenizer)), tokenizer, folder / "policy") if model is None else model,
        args=getattr(module, f"{made.name}Config")(output_dir=str(folder), **(defaults | made.options | options)),
        train_dataset=made.dataset,
        processing_class=tokenizer,
        **extra,
    )


def trained_rows(trainer: Any) -> list[list[Pair]]:
    """A list that gets the prompts and completions of every forward that the trainer learns from, as they are masked."""
    seen: list[list[Pair]] = []
    if hasattr(trainer, "ref_model") and hasattr(trainer, "_forward"):  # online DPO has no loss of a batch
        forward = trainer._forward

        def watched(model: Any, prompts: Any, prompt_mask: Any, completions: Any, mask: Any, *args: Any) -> Any:
            if model is not trainer.ref_model:
                seen.append(_pairs(prompts, prompt_mask, completions, mask))
            return forward(model, prompts, prompt_mask, completions, mask, *args)

        trainer._forward = watched
        return seen
    loss = trainer.compute_loss

    def recorded(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if "completion_ids" in inputs:
            parts = [inputs[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")]
        else:
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            kept = inputs.get("logits_to_keep")
            learned = inputs["labels"] != -100 if kept is None else mask.bool() & (mask.cumsum(1) < 0)
            if kept is not None:
                learned[:, -kept:] = mask[:, -kept:].bool()
            parts = [ids, mask.bool() & ~learned, ids, learned]
        seen.append(_pairs(*parts))
        return loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = recorded
    return seen


def expected_rows(engine: AtlasRolloutEngine) -> list[list[Pair]]:
    """A list that gets what every rollout ought to have been: drawn without speculation, from the policy as it is then."""
    calls: list[list[Pair]] = []
    rollout = engine.rollout

    def repeated(model: Any, prompts: Any, sampling: Any, **kwargs: Any) -> Any:
        plain = AtlasRolloutEngine(speculation=False, console=False, audit_share=0.0)
        output = plain.rollout(model, prompts, sampling)
        rows = zip(output.prompt_ids, output.completion_ids, strict=True)
        calls.append([(tuple(prompt), tuple(completion)) for prompt, completion in rows])
        return rollout(model, prompts, sampling, **kwargs)

    engine.rollout = repeated  # type: ignore[method-assign]
    return calls


def _pairs(prompts: Any, prompt_mask: Any, completions: Any, mask: Any) -> list[Pair]:
    rows = zip(prompts, prompt_mask.bool(), completions, mask.bool(), strict=True)
    return [(tuple(p[m].tolist()), tuple(c[n].tolist())) for p, m, c, n in rows]
