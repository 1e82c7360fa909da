"""What attaching finds before any training time is spent, and what it accepts, each with a real trainer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from trl import GRPOTrainer

from atlas_rl import AtlasRolloutEngine
from atlas_rl.policy.own_code import own_code
from benchmarks import tiny_policies
from tests.models import tiny_llama
from tests.trainers import DATA, WORDS, arguments, build_trainer, rewards, with_special_tokens, word_tokenizer


def policy() -> Any:
    return with_special_tokens(tiny_llama(vocab=len(WORDS), seed=1, context=64))


def build(
    folder: Path,
    *,
    kind: type = GRPOTrainer,
    model: Any = None,
    tokenizer: Any = None,
    data: Any = DATA,
    **options: Any,
) -> Any:
    from trl import GRPOConfig

    return kind(
        model=model or policy(),
        reward_funcs=rewards,
        args=arguments(GRPOConfig, folder, **({"max_steps": 1} | options)),
        train_dataset=data,
        processing_class=tokenizer or word_tokenizer(),
    )


def attach(trainer: Any) -> AtlasRolloutEngine:
    return AtlasRolloutEngine(console=False).attach(trainer)


class OwnTurn(GRPOTrainer):
    """Generates one token by itself, as TRL allows where no engine is used."""

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        return [[2, 1] for _ in prompt_ids], None


class OwnGenerate(GRPOTrainer):
    """Generates in a method above the engine's."""

    def _generate(self, prompts: Any) -> Any:
        return self.something_else(prompts)

    def something_else(self, prompts: Any) -> Any:
        return [[2, 1] for _ in prompts]


class Delegates(GRPOTrainer):
    """Looks at what the trainer generates, by way of another method."""

    turns = 0

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        type(self).turns += 1
        return self.below(*args, **kwargs)

    def below(self, *args: Any, **kwargs: Any) -> Any:
        return super()._generate_single_turn(*args, **kwargs)


@pytest.mark.parametrize(("kind", "stage"), [(OwnTurn, "_generate_single_turn"), (OwnGenerate, "_generate")])
def test_a_trainer_that_generates_by_itself_is_refused(kind: type, stage: str, tmp_path: Path) -> None:
    trainer = build(tmp_path, kind=kind)
    with pytest.raises(ValueError, match=f"{kind.__name__} generates in a {stage} of its own"):
        attach(trainer)
    assert not trainer.use_vllm


def test_a_method_put_on_the_trainer_is_looked_into(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    own = trainer._generate_single_turn

    def watched(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    trainer._generate_single_turn = watched
    attach(trainer)
    trainer = build(tmp_path)
    trainer._generate_single_turn = lambda prompt_ids, *args: ([[2, 1] for _ in prompt_ids], None)
    with pytest.raises(ValueError, match="of its own"):
        attach(trainer)


class AttachesLate(TrainerCallback):
    """Attaches an engine after the first step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        attach(self.trainer)


def test_a_trainer_that_trains_is_refused_until_it_ends(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    late = AttachesLate(trainer)
    trainer.add_callback(late)
    with pytest.raises(ValueError, match=r"is training: attach before train\(\) or after it"):
        trainer.train()
    assert not trainer.use_vllm
    trainer.remove_callback(late)
    assert trainer.is_in_train, "transformers leaves it set, because the run raised"
    engine = attach(trainer)
    trainer.train()
    assert len(engine.reports) == 1


class AttachesFirst(GRPOTrainer):
    """Attaches an engine when its training is about to begin."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.engine = attach(self)
        return super().train(*args, **kwargs)


def test_a_trainer_may_attach_in_a_train_of_its_own(tmp_path: Path) -> None:
    trainer = build(tmp_path, kind=AttachesFirst)
    trainer.train()
    assert len(trainer.engine.reports) == 1


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_temperature_that_the_loss_divides_by_is_refused(kind: str, tmp_path: Path) -> None:
    trainer = build_trainer(kind, policy(), word_tokenizer(), tmp_path, temperature=0.0)
    with pytest.raises(ValueError, match=r"temperature is 0, and (GRPO|RLOO)Trainer divides by it"):
        attach(trainer)
    assert not trainer.use_vllm


def test_a_trainer_that_delegates_is_served(tmp_path: Path) -> None:
    trainer = build(tmp_path, kind=Delegates)
    engine = attach(trainer)
    trainer.train()
    assert Delegates.turns == 1
    assert len(engine.reports) == 1


@pytest.mark.parametrize("mode", ["sequence_mask", "sequence_truncate"])
def test_trls_own_check_of_vespo_is_made(mode: str, tmp_path: Path) -> None:
    trainer = build(tmp_path, loss_type="vespo", vllm_importance_sampling_mode=mode)
    with pytest.raises(ValueError, match="token_truncate"):
        attach(trainer)
    attach(build(tmp_path, loss_type="vespo", vllm_importance_sampling_mode="token_mask"))
    attach(build(tmp_path, loss_type="vespo", vllm_importance_sampling_correction=False))


def test_an_unknown_correction_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'tokens'"):
        attach(build(tmp_path, vllm_importance_sampling_mode="tokens"))


def activated() -> Any:
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[3])
    return get_peft_model(policy(), config)


def hooked() -> Any:
    model = get_peft_model(policy(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    return model


@pytest.mark.parametrize(("model", "message"), [(activated, "activated LoRA"), (hooked, "forward hook")])
def test_a_policy_that_would_be_lost_is_refused(model: Any, message: str, tmp_path: Path) -> None:
    trainer = build(tmp_path, model=model())
    for backend in ("in_process", "vllm"):
        with pytest.raises(ValueError, match=message):
            AtlasRolloutEngine(console=False, backend=backend).attach(trainer)
    assert not trainer.use_vllm


@pytest.mark.parametrize("max_completion_length", [16, 17, 40])
def test_completions_that_a_policy_cannot_reach_are_found(max_completion_length: int, tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "rope_theta": 1e4}
    rope |= {"factor": 4.0, "original_max_position_embeddings": 16}
    options = {"rope_parameters": rope, "original_max_position_embeddings": 16}
    model = with_special_tokens(tiny_policies.build("phi3", **options))
    training = build_trainer(
        "grpo", model, word_tokenizer(), tmp_path, max_completion_length=max_completion_length, max_steps=1
    )
    engine = AtlasRolloutEngine(console=False)
    if max_completion_length == 16:
        engine.attach(training)
        return
    with pytest.raises(ValueError, match=rf"up to 16 tokens.*may reach {max_completion_length}.*max_completion_length"):
        engine.attach(training)


def test_a_draft_model_that_is_not_there_is_found(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    with pytest.raises((ValueError, OSError)):
        AtlasRolloutEngine(console=False, draft_model=tmp_path / "nothing").attach(trainer)
    assert not trainer.use_vllm


def test_ending_tokens_outside_of_the_vocabulary_are_found(tmp_path: Path) -> None:
    model = policy()
    model.generation_config.eos_token_id = [1, 99]
    with pytest.raises(ValueError, match="ending token 99"):
        attach(build(tmp_path, model=model))


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_tokenizer_without_an_ending_token_trains(kind: str, tmp_path: Path) -> None:
    tokenizer, model = word_tokenizer(), policy()
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = model.config.eos_token_id = -1
    neutral = {"do_sample": True, "num_beams": 1, "top_k": -1, "top_p": None, "min_p": None, "repetition_penalty": None}
    trainer = build_trainer(kind, model, tokenizer, tmp_path, max_steps=1, generation_kwargs=neutral)
    engine = attach(trainer)
    trainer.train()
    assert set(engine.reports[0].completion_lengths) == {12}


def test_a_second_engine_is_told_from_the_first(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    engine = attach(trainer)
    with pytest.raises(ValueError, match="already generates with this engine: attach once"):
        engine.attach(trainer)
    with pytest.raises(ValueError, match="already generates with another engine: build a new trainer"):
        attach(trainer)


def test_an_engine_of_another_policy_is_refused(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    with pytest.raises(ValueError, match=r"model=LlamaForCausalLM.* not the trainer's policy: leave model= out"):
        AtlasRolloutEngine(model=policy(), console=False).attach(trainer)
    assert not trainer.use_vllm
    AtlasRolloutEngine(model=trainer.model, console=False).attach(trainer)


def test_an_engine_of_the_model_inside_a_wrapper_is_the_trainers(tmp_path: Path) -> None:
    model = policy()
    trainer = build_trainer("grpo", model, word_tokenizer(), tmp_path, peft=True)
    AtlasRolloutEngine(model=model, console=False).attach(trainer)


def test_an_attached_engine_says_who_generates(tmp_path: Path) -> None:
    engine = attach(build(tmp_path))
    with pytest.raises(ValueError, match=r"attached to a trainer.*model=trainer.model"):
        engine.generate([[2]], max_new_tokens=1)


@pytest.mark.parametrize("value", [1.5, True, None, "2", -1, [1]])
def test_a_wrong_baseline_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"baseline_every must be .* got {re.escape(repr(value))}"):
        AtlasRolloutEngine(console=False).attach(build(tmp_path), baseline_every=value)


@pytest.mark.parametrize("built", [None, GRPOTrainer, 3])
def test_what_is_no_trainer_is_named(built: Any) -> None:
    with pytest.raises(
        ValueError, match=r"takes an initialised TRL trainer .* got (a NoneType|the class GRPOTrainer|a int)"
    ):
        attach(built)


OF_THE_POLICY = {
    "no_repeat_ngram_size": 1,
    "begin_suppress_tokens": [2, 3],
    "typical_p": 0.2,
    "num_beams": 2,
    "top_h": 0.1,
}


@pytest.mark.parametrize("name", OF_THE_POLICY)
def test_what_the_policys_own_config_asks_for_is_not_lost(name: str, tmp_path: Path) -> None:
    """TRL by itself would have generated so."""
    model = policy()
    setattr(model.generation_config, name, OF_THE_POLICY[name])
    with pytest.raises(ValueError, match=f"the policy's generation_config {{'{name}'.* cannot be honoured in process"):
        attach(build(tmp_path, model=model))


def test_what_the_trainers_own_config_asks_for_is_not_lost(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    trainer.generation_config.min_new_tokens = 3
    with pytest.raises(ValueError, match=r"the trainer's generation_config \{'min_new_tokens': 3\} cannot be honoured"):
        attach(trainer)


@pytest.mark.parametrize("source", ["trainer", "policy", "generation_kwargs"])
def test_suppressed_tokens_are_never_drawn(source: str, tmp_path: Path) -> None:
    """A trainer with a processor suppresses the image token in its own generation_config."""
    suppressed, model = [*range(2, 9)], policy()
    trained: list[int] = []

    def noted(completion_ids: Any, **kwargs: Any) -> list[float]:
        trained.extend(token for row in completion_ids for token in row)
        return [0.0] * len(completion_ids)

    asks = source == "generation_kwargs"
    options: dict[str, Any] = {"generation_kwargs": {"suppress_tokens": suppressed}} if asks else {}
    if source == "policy":
        model.generation_config.suppress_tokens = suppressed
    trainer = build_trainer("grpo", model, word_tokenizer(), tmp_path, reward_funcs=noted, max_steps=1, **options)
    if source == "trainer":
        trainer.generation_config.suppress_tokens = suppressed
    attach(trainer)
    trainer.train()
    assert trained
    assert not set(trained) & set(suppressed)
    assert trainer.vllm_importance_sampling_correction, "the trainer scores with them, and they had a probability"


def test_the_forward_that_trl_puts_into_a_policy_is_no_custom_code(tmp_path: Path) -> None:
    assert not own_code(build(tmp_path).model)


def test_an_option_that_the_trainer_leaves_open_is_the_policys(tmp_path: Path) -> None:
    model, trained = policy(), []

    def noted(completion_ids: Any, **kwargs: Any) -> list[float]:
        trained.extend(completion_ids)
        return [0.0] * len(completion_ids)

    model.generation_config.min_p = 1.0  # the likeliest token only; the trainer's own min_p is None
    trainer = build_trainer("grpo", model, word_tokenizer(), tmp_path, reward_funcs=noted, max_steps=1)
    attach(trainer)
    trainer.train()
    assert len({tuple(row) for row in trained}) <= 2, "one completion for each of two prompts"
    assert len(trained) == 8


def test_ending_tokens_may_be_a_tensor(tmp_path: Path) -> None:
    model = policy()
    model.generation_config.eos_token_id = torch.tensor([1, 3])
    attach(build(tmp_path, model=model))
    trainer = build(tmp_path)
    trainer.eos_token_ids = torch.tensor([[1, 3]])
    with pytest.raises(ValueError, match=r"eos_token_id of the policy's generation_config\) must be .* got tensor"):
        attach(trainer)
