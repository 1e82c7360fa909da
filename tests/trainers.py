"""Tiny TRL trainers: GRPO and RLOO over sixteen words, a few steps on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

WORDS = ["<pad>", "<eos>", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n"]
PAD, EOS = 0, 1
DATA = Dataset.from_list([{"prompt": text} for text in ("a b c", "d e", "f g h i", "c a")] * 4)
TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}

SMALL_AND_QUIET = {
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
SETTINGS = SMALL_AND_QUIET | {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 12,
    "max_steps": 3,
    "beta": 0.0,
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of `WORDS`."""
    base = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="a"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=base, pad_token="<pad>", eos_token="<eos>", unk_token="a", chat_template=template
    )


def with_special_tokens(model: PreTrainedModel, *, pad: int = PAD, eos: int = EOS) -> PreTrainedModel:
    """Tell a model its padding and ending token; returns it."""
    model.config.pad_token_id = model.generation_config.pad_token_id = pad
    model.config.eos_token_id = model.generation_config.eos_token_id = eos
    return model


def rewards(completions: list[str], **kwargs: Any) -> list[float]:
    """Share of `b` among the words."""
    return [completion.split().count("b") / max(1, len(completion.split())) for completion in completions]


def arguments(config_class: type, folder: Path, **options: Any) -> Any:
    """A trainer's configuration: two prompts of four completions per step, nothing saved or printed."""
    return config_class(output_dir=str(folder), **(SETTINGS | options))


def build_trainer(
    kind: str,
    model: PreTrainedModel,
    tokenizer: Any,
    folder: Path,
    *,
    reward_funcs: Any = rewards,
    eval_dataset: Any = None,
    rollout_func: Any = None,
    peft: bool = False,
    **options: Any,
) -> Any:
    """A trainer of `DATA`: "grpo" or "rloo"; `options` are its configuration's."""
    trainer_class, config_class = TRAINERS[kind]
    extra: dict[str, Any] = {"rollout_func": rollout_func} if rollout_func is not None else {}
    if peft:
        extra["peft_config"] = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return trainer_class(
        model=model,
        reward_funcs=reward_funcs,
        args=arguments(config_class, folder, **options),
        train_dataset=DATA,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        **extra,
    )


def passes_of(trainer: Any) -> list[int]:
    """A list that gets the step of every forward pass of a GRPO trainer over its rollouts: the loss, and the correction."""
    steps: list[int] = []
    score = trainer._get_per_token_logps_and_entropies

    def counted(*args: Any, **kwargs: Any) -> Any:
        steps.append(int(trainer.state.global_step))
        return score(*args, **kwargs)

    trainer._get_per_token_logps_and_entropies = counted
    return steps


def script_options(policy: Path, output: Path, **options: Any) -> dict[str, Any]:
    """Options of `atlas-rl grpo` for a saved policy, as a YAML file has them; the dataset is written beside `output`."""
    data = output.parent / "data"
    data.mkdir(exist_ok=True)
    DATA.to_json(data / "train.jsonl")
    given = {"model_name_or_path": str(policy), "dataset_name": str(data), "reward_funcs": ["tests.trainers.rewards"]}
    return given | SETTINGS | {"output_dir": str(output)} | options
