"""TRL trainers that generate with vLLM through the engine: the two ways in, weights in sync, and what is refused."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer

from atlas_rl import AtlasRolloutEngine
from atlas_rl.cli import main
from atlas_rl.report.report import StepReport
from tests import vllm_engines  # first: it skips this module where there is no vLLM
from tests.models import tiny_bigram
from tests.other_trainers import byte_tokenizer
from tests.trainers import WORDS, build_trainer, script_options, with_special_tokens, word_tokenizer

__all__ = ["vllm_engines"]


@pytest.fixture(autouse=True)
def small_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL takes vLLM's defaults for a GPU: nothing of that is compiled or reserved for a policy of two layers."""
    from trl.generation import vllm_generation

    small = functools.partial(vllm_generation.LLM, enforce_eager=True, kv_cache_memory_bytes=64 << 20)
    monkeypatch.setattr(vllm_generation, "LLM", small)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer()


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_policy(tmp_path_factory.mktemp("policy"), tokenizer)


def saved_policy(path: Path, tokenizer: Any) -> Path:
    model = tiny_bigram(vocab=len(WORDS), hidden=64, heads=2, kv_heads=2, context=64, seed=1, logit_std=3.0)
    with_special_tokens(model).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def build(kind: str, folder: Path, tokenizer: Any, output: Path, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return build_trainer(kind, model, tokenizer, output, vllm_max_model_length=64, **options)


def difference_to_policy(trainer: Any, engine: AtlasRolloutEngine) -> float:
    """Largest difference in nats between the logprobs that vLLM returns and those of the trainer's own policy."""
    adapter = trainer.vllm_generation
    prompt = [2, 3, 4]
    ids, completions, logprobs, _ = adapter.generate([prompt] * 4, None, 4)
    worst = 0.0
    for completion, own in zip(completions, logprobs, strict=True):
        tokens = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logits = trainer.model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        worst = max(worst, (expected - torch.tensor(own)[:, 0]).abs().max().item())
    assert [*map(list, ids)] == [prompt] * 4
    return worst


@pytest.mark.parametrize(("kind", "peft"), [("grpo", False), ("grpo", True), ("rloo", False)])
def test_attached_trainers_train_and_vllm_follows(
    kind: str,
    peft: bool,
    folder: Path,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    trainer = build(kind, folder, tokenizer, tmp_path, peft=peft, learning_rate=3e-2, max_steps=4)
    engine = AtlasRolloutEngine(backend="vllm", output_dir=tmp_path, console=False)
    assert engine.attach(trainer, baseline_every=1) is engine
    trainer.train()
    assert [report.policy_version for report in engine.reports] == [0, 1, 2, 3]
    for report in engine.reports:
        assert report.num_requests == 8
        assert report.num_tokens == sum(report.completion_lengths)
        assert report.sync_s > 0
        assert (report.baseline_tokens_per_s or 0) > 0
        assert (report.step_s or 0) > report.generate_s
        assert not report.warnings, "tokens must be the same without speculation"
    assert sum(report.num_audited_tokens for report in engine.reports) > 0, "against the trainer's own policy"
    assert sum(sum(report.drafted.values()) for report in engine.reports) > 0
    assert all(set(report.drafted) == {"history", "recurrent"} for report in engine.reports)
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert all({field.name for field in fields(StepReport)} <= set(row) for row in rows)
    assert difference_to_policy(trainer, engine) > 1e-2, "the last update has not been synced yet"
    trainer.vllm_generation.sync_weights()
    assert difference_to_policy(trainer, engine) < 1e-3
    assert engine.policy_version == 4


def test_use_vllm_trainers_are_built_inside_the_engine(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    engine = AtlasRolloutEngine(console=False)
    with engine.prepare_vllm(block_size=64):
        trainer = build("grpo", folder, tokenizer, tmp_path, use_vllm=True, vllm_mode="colocate", max_steps=2)
    assert trainer.vllm_generation.llm.llm_engine.vllm_config.cache_config.block_size == 64
    engine.attach(trainer)  # backend="auto" follows the trainer
    trainer.train()
    assert len(engine.reports) == 2
    with pytest.raises(ValueError, match="already generates with another engine"):
        AtlasRolloutEngine(console=False).attach(trainer)


def test_a_rerun_finds_no_prompt_in_the_prefix_cache_that_its_call_had_to_run(
    folder: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, cached = AtlasRolloutEngine(console=False), []
    with engine.prepare_vllm(block_size=32):
        trainer = build("grpo", folder, tokenizer, tmp_path, use_vllm=True, vllm_mode="colocate")
    engine.attach(trainer, baseline_every=2)
    adapter, llm = trainer.vllm_generation, trainer.vllm_generation.llm
    generate = llm.generate

    def counted(*args: Any, **options: Any) -> Any:
        outputs = generate(*args, **options)
        cached.append([output.num_cached_tokens for output in outputs])
        return outputs

    monkeypatch.setattr(llm, "generate", counted)
    trainer.model.train()
    for _ in range(3):
        adapter.generate([[2, 3, 4] * 12] * 4, None, 4)
    call, rerun, between, another_call, another_rerun = cached
    assert call == rerun == another_call == another_rerun
    assert sum(between) > sum(call), "a call that nobody compares uses the cache"


def test_the_command_builds_the_vllm_that_its_file_asks_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TRL's script ends with its process: it would take the process groups of the other tests' engines along.
    monkeypatch.setattr(GRPOTrainer, "end", lambda trainer: None)
    options = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": 64,
        "max_steps": 2,
        "dtype": "float32",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(script_options(folder, tmp_path / "out", **options)))
    main(["grpo", "--config", str(tmp_path / "run.yaml"), "--no_console"])
    rows = [json.loads(line) for line in (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()]
    assert [row["policy_version"] for row in rows] == [0, 1]
    assert all(set(row["drafted"]) == {"history", "recurrent"} for row in rows)


def last_line_of_refused_command(
    folder: Path, tmp_path: Path, options: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> str:
    """What `atlas-rl grpo` says last, with a file of these options, before it ends as a command with wrong ones does."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(script_options(folder, tmp_path / "out", **options)))
    with pytest.raises(SystemExit) as ended:
        main(["grpo", "--config", str(tmp_path / "run.yaml")])
    assert ended.value.code == 2
    return capfd.readouterr().err.splitlines()[-1]


def test_the_command_names_the_server_that_is_not_up(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may be another machine's: no vLLM of this one has to suit."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    options = {
        "use_vllm": True,
        "vllm_mode": "server",
        "vllm_server_base_url": "http://127.0.0.1:9",
        "vllm_server_timeout": 0,
    }
    last = last_line_of_refused_command(folder, tmp_path, options, capfd)
    assert last.startswith("atlas-rl grpo: no vLLM server is up at http://127.0.0.1:9")
    assert "atlas-rl vllm-serve MODEL" in last


def test_the_command_ends_in_one_line_if_vllm_cannot_be_prepared(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    options = {"use_vllm": True, "vllm_mode": "colocate"}
    last = last_line_of_refused_command(folder, tmp_path, options, capfd)
    assert last.startswith("atlas-rl grpo: ")
    assert "VLLM_USE_V2_MODEL_RUNNER" in last


def test_a_trainer_with_a_vllm_of_its_own_is_told_the_fix(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    trainer = build("grpo", folder, tokenizer, tmp_path, use_vllm=True, vllm_mode="colocate")
    before = trainer.vllm_generation
    with pytest.raises(ValueError, match=r"with engine\.prepare_vllm\(\): trainer = "):
        AtlasRolloutEngine(console=False).attach(trainer)
    assert trainer.vllm_generation is before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": 0.1}, "min_p"),
        ({"generation_kwargs": {"logit_bias": {3: 1.0}}}, "logit_bias"),
        ({"generation_kwargs": {"n": 2}}, "n is set by the engine"),
        ({"generation_kwargs": {"presence_penalty": 9.0}}, "vLLM does not take generation_kwargs .*presence_penalty"),
        ({"generation_kwargs": {"stopword": "a"}}, "vLLM does not take generation_kwargs .*stopword"),
        ({"generation_kwargs": {"structured_outputs": {"regexp": "a"}}}, "vLLM does not take .*regexp"),
    ],
    ids=str,
)
def test_what_vllm_cannot_honour_is_refused_first(
    options: dict[str, Any],
    message: str,
    folder: Path,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    trainer = build("grpo", folder, tokenizer, tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        AtlasRolloutEngine(backend="vllm", console=False).attach(trainer)
    assert not trainer.use_vllm


def test_a_policy_that_was_never_saved_is_refused(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    trainer = build("grpo", folder, tokenizer, tmp_path)
    trainer.model.name_or_path = ""  # as of a policy that was made from a configuration
    with pytest.raises(ValueError, match=r"does not say where it is: save it with save_pretrained"):
        AtlasRolloutEngine(backend="vllm", console=False).attach(trainer)
    assert not trainer.use_vllm


def test_a_grammar_may_be_a_dict(tmp_path: Path) -> None:
    """TRL's own calls of vLLM take one, too."""
    letters, texts = byte_tokenizer(len(WORDS)), list[str]()
    saved_policy(tmp_path / "policy", letters)

    def noted(completions: list[str], **kwargs: Any) -> list[float]:
        texts.extend(completions)
        return [float(len(text)) for text in completions]

    grammar = {"structured_outputs": {"regex": "[ab]{3,6}"}}
    trainer = build(
        "grpo", tmp_path / "policy", letters, tmp_path, reward_funcs=noted, max_steps=1, generation_kwargs=grammar
    )
    AtlasRolloutEngine(backend="vllm", console=False).attach(trainer)
    trainer.train()
    assert len(texts) == 8
    assert all(re.fullmatch("[ab]{3,6}", text) for text in texts)


@pytest.fixture
def sleeping(folder: Path, tokenizer: Any, tmp_path: Path) -> Any:
    """A trainer whose vLLM sleeps between its calls.

    vLLM's executor and scheduler sleep and wake up on a CPU too. Its worker then keeps the weights, with a warning.
    """
    engine = AtlasRolloutEngine(console=False)
    with engine.prepare_vllm(dtype="float32"):
        trainer = build("grpo", folder, tokenizer, tmp_path, use_vllm=True, vllm_mode="colocate")
    engine.attach(trainer)
    trainer.vllm_generation.generation.enable_sleep_mode = True
    return trainer


def asleep(trainer: Any) -> set[str]:
    """What sleeps in the trainer's vLLM."""
    adapter = trainer.vllm_generation
    tags: set[str] = adapter.llm.llm_engine.model_executor.sleeping_tags
    assert adapter.generation._llm_weights_sleeping == ("weights" in tags)
    return set(tags)


def test_an_engine_sleeps_after_a_generation_that_raised(sleeping: Any) -> None:
    adapter = sleeping.vllm_generation
    with pytest.raises(ValueError, match="prompt"):
        adapter.generate([[]], None, 1)
    assert asleep(sleeping) >= {"weights", "kv_cache"}
    adapter.generate([[2, 3]], None, 1)
    assert asleep(sleeping) >= {"weights", "kv_cache"}


def test_a_sync_that_failed_after_waking_up_is_repeated_whole(sleeping: Any) -> None:
    """Its step is the one of the sync before it, so that the trainer asks for none."""
    adapter, engine = sleeping.vllm_generation, sleeping.vllm_generation.engine
    adapter.sync_weights()
    assert difference_to_policy(sleeping, engine) < 1e-3
    weight = sleeping.model.get_output_embeddings().weight
    before, version = weight.detach().clone(), engine.policy_version
    with torch.no_grad():
        weight[3, 0] = float("nan")
    for _ in range(2):  # a second failure is no success either
        with pytest.raises(ValueError, match="not finite"):
            adapter.generate([[2, 3]], None, 1)
        assert asleep(sleeping) >= {"weights", "kv_cache"}
    with torch.no_grad():
        weight.copy_(before * 0.5)
    assert difference_to_policy(sleeping, engine) < 1e-3, "the policy of now, not that of the last sync"
    assert asleep(sleeping) >= {"weights", "kv_cache"}
    assert engine.policy_version == version, "one step has one version"


def test_a_sync_that_failed_is_repeated_before_a_generation(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Without sleep, too: the old weights are restored, and nothing is generated with them."""
    trainer = build("grpo", folder, tokenizer, tmp_path)
    engine = AtlasRolloutEngine(backend="vllm", console=False).attach(trainer)
    adapter, weight = trainer.vllm_generation, trainer.model.get_output_embeddings().weight
    adapter.sync_weights()
    before = weight.detach().clone()
    trainer.state.global_step = 1
    with torch.no_grad():
        weight[3, 0] = float("nan")
    for call in (adapter.sync_weights, lambda: adapter.generate([[2, 3]], None, 1)):
        with pytest.raises(ValueError, match="not finite"):
            call()
    with torch.no_grad():
        weight.copy_(before * 0.5)
    assert difference_to_policy(trainer, engine) < 1e-3
    assert engine.policy_version == 1


def test_a_folder_is_enough_stand_alone(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "LLM", functools.partial(vllm.LLM, enforce_eager=True, dtype="float32"))
    engine = AtlasRolloutEngine(model=folder, tokenizer=tokenizer, backend="vllm", console=False)
    output = engine.generate([[2, 3, 4], [5, 6]], num_generations=3, max_new_tokens=20, seed=4)
    assert all(tokens[-1] == 1 or len(tokens) == 20 for tokens in output.completion_ids), "the tokenizer's ending token"
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = AtlasRolloutEngine(model=policy, tokenizer=tokenizer, speculation=False, console=False)
    expected = plain.generate([[2, 3, 4], [5, 6]], num_generations=3, max_new_tokens=20, seed=4)
    assert output.completion_ids == expected.completion_ids
