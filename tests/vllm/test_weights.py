"""New weights, all or nothing: what is refused leaves the old weights in place, shown by a seeded text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from atlas_rl import AtlasRolloutEngine
from atlas_rl.sync.refresh import MAX_VERSION, PolicyTracker
from atlas_rl.vllm.checkpoint import check, describe
from atlas_rl.vllm.internals import drafter_of, runner_of
from tests.models import tiny_bigram
from tests.vllm_engines import completions, engine  # first: it skips this module where there is no vLLM

VOCAB, CONTEXT = 64, 128
PROMPTS = [[2, 3, 4], list(range(2, 42))]
EXTENSION = "atlas_rl.vllm.server.AtlasWorkerExtension"
LAYER = "model.layers.1.self_attn.k_proj.weight"


def policy(seed: int) -> Any:
    return tiny_bigram(vocab=VOCAB, hidden=64, heads=2, kv_heads=2, context=CONTEXT, seed=seed, logit_std=3.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three versions of one policy."""
    paths = [tmp_path_factory.mktemp(f"policy{seed}") for seed in range(3)]
    for seed, path in enumerate(paths):
        policy(seed).save_pretrained(path)
    return paths


@pytest.fixture(scope="module")
def llm(folders: list[Path]) -> Any:
    options = {"enable_prefix_caching": True, "block_size": 32, "worker_extension_cls": EXTENSION}
    return engine(folders[0], max_num_seqs=8, weight_transfer_config={"backend": "atlas_nccl"}, **options)


def text(llm: Any) -> list[list[int]]:
    from vllm import SamplingParams

    each = [SamplingParams(temperature=t, seed=1, max_tokens=20, ignore_eos=True, detokenize=False) for t in (1.0, 0.0)]
    return completions(llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], each, use_tqdm=False))


def load(llm: Any, folder: Path, *version: str) -> Any:
    return llm.collective_rpc("atlas_load_weights", args=(str(folder), *version))[0]


def greedy_text_of(model: Any) -> list[int]:
    plain = AtlasRolloutEngine(model=model, speculation=False, console=False)
    given: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.0, "eos_token_ids": [], "seed": 0}
    return plain.generate([PROMPTS[1]], **given).completion_ids[0]


def _rewritten(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _shard_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:3]}, folder / "model-00001-of-00002.safetensors")
    where = {name: f"model-0000{1 + (i >= 3)}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "no folder"),
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()], "holds no"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no"),
    "truncated": (_truncated, "damaged"),
    "an empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "damaged"),
    "a missing shard": (_shard_missing, "lacks model-00002"),
    "a damaged index": (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "damaged"),
    "wrong shape": (_rewritten(lambda t: t.update({LAYER: torch.zeros(3, 3)})), "of shape"),
    "another order of sizes": (_rewritten(lambda t: t.update({LAYER: t[LAYER].T[:32].contiguous()})), "of shape"),
    "lacks a layer": (_rewritten(lambda t: [t.pop(n) for n in [*t] if n.startswith("model.layers.1.")]), "lacks"),
    "lacks one tensor": (_rewritten(lambda t: t.pop(LAYER)), "lacks"),
    "has another tensor": (_rewritten(lambda t: t.update(extra=torch.zeros(1))), "besides"),
    "integers": (_rewritten(lambda t: t.update({LAYER: t[LAYER].to(torch.int32)})), "of type"),
    "NaN": (_rewritten(lambda t: t[LAYER].view(-1)[5:6].fill_(torch.nan)), "not finite"),
    "infinite": (_rewritten(lambda t: t[LAYER].view(-1)[5:6].fill_(torch.inf)), "not finite"),
    "too large for the engine's type": (
        _rewritten(lambda t: t.update({LAYER: torch.full_like(t[LAYER], 1e300, dtype=torch.float64)})),
        "not finite",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED.keys())
def test_a_checkpoint_that_cannot_be_served_is_refused(
    spoil: Callable[[Path], object], message: str, llm: Any, folders: list[Path], tmp_path: Path
) -> None:
    before, version = text(llm), drafter_of(llm).drafting.tracker.version  # type: ignore[union-attr]
    wrong = tmp_path / "wrong"
    shutil.copytree(folders[1], wrong)
    spoil(wrong)
    with pytest.raises(ValueError, match=message) as refused:
        load(llm, wrong)
    assert "The old weights are served on" in str(refused.value)
    assert text(llm) == before
    assert drafter_of(llm).drafting.tracker.version == version  # type: ignore[union-attr]


def test_a_good_load_is_served_and_can_be_taken_back(llm: Any, folders: list[Path]) -> None:
    first = text(llm)
    loaded = load(llm, folders[1])
    second = text(llm)
    assert second != first
    assert second[1] == greedy_text_of(policy(1))
    version = loaded["policy_version"]
    assert load(llm, folders[0], str(version)) == {"policy_version": version}
    assert text(llm) == first


@pytest.mark.parametrize("version", ["soon", "-1", "1.5", "", "9" * 30, "0" * 40 + "9" * 30, str(MAX_VERSION + 1), "٣"])
def test_a_version_is_read_before_anything_is_done(version: str, llm: Any, folders: list[Path]) -> None:
    before = text(llm)
    for method, args in (("atlas_load_weights", (str(folders[1]), version)), ("atlas_policy_updated", (version,))):
        with pytest.raises(ValueError, match="whole number"):
            llm.collective_rpc(method, args=args)
    assert text(llm) == before


def test_versions_do_not_fall(llm: Any, folders: list[Path]) -> None:
    before, tracker = text(llm), PolicyTracker()
    tracker.version = 7
    assert tracker.checked(None) is None
    assert (tracker.checked("7"), tracker.checked(8), tracker.checked(" 9".strip())) == (7, 8, 9)
    with pytest.raises(ValueError, match="do not fall"):
        tracker.checked("6")
    own: Any = drafter_of(llm)
    now = llm.collective_rpc("atlas_policy_updated", args=(str(own.drafting.tracker.version + 3),))[0]["policy_version"]
    with pytest.raises(ValueError, match="do not fall"):
        load(llm, folders[1], str(now - 1))
    assert text(llm) == before


@pytest.mark.parametrize("method", ["atlas_load_weights", "atlas_policy_updated"])
def test_nothing_of_the_old_policy_is_left_in_the_prefix_cache(method: str, llm: Any, folders: list[Path]) -> None:
    """Under traffic: vLLM's own reset answers that it did nothing while requests run."""
    from vllm import SamplingParams

    load(llm, folders[0])
    text(llm)  # its prompts are cached
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request(f"running {method}", {"prompt_token_ids": PROMPTS[1]}, params)
    for _ in range(10):
        llm.llm_engine.step()
    if method == "atlas_load_weights":
        load(llm, folders[2])
    else:  # by other means
        runner = llm.llm_engine.model_executor.driver_worker.model_runner
        runner.reload_weights(weights_iterator=iter(policy(2).state_dict().items()))
        llm.collective_rpc(method)
    ended = []
    while llm.llm_engine.has_unfinished_requests():
        ended += [output for output in llm.llm_engine.step() if output.finished]
    assert [len(output.outputs[0].token_ids) for output in ended] == [60], "what ran goes on"
    assert text(llm)[1] == greedy_text_of(policy(2))
    load(llm, folders[0])


def _broken_off(weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    yield from list(weights.items())[: len(weights) // 2]
    raise ConnectionError("the trainer is gone")


ITERATORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], type[Exception]]] = {
    "raises": (_broken_off, ConnectionError),
    "raises at once": (lambda w: _broken_off({}), ConnectionError),
    "is empty": (lambda w: [], ValueError),
    "lacks a layer": (lambda w: [(n, t) for n, t in w.items() if "layers.1." not in n], ValueError),
    "lacks the keys": (lambda w: [(n, t) for n, t in w.items() if n != LAYER], ValueError),
    "wrong shape": (lambda w: (w | {LAYER: torch.zeros(3, 3)}).items(), Exception),
    "a name that nobody knows": (lambda w: (w | {"model.nothing.weight": torch.zeros(3)}).items(), Exception),
    "NaN": (lambda w: (w | {LAYER: w[LAYER] * torch.nan}).items(), ValueError),
}


@pytest.mark.parametrize(("spoil", "error"), ITERATORS.values(), ids=ITERATORS.keys())
def test_weights_that_cannot_be_loaded_leave_the_old_ones(
    spoil: Callable[[dict[str, torch.Tensor]], Any], error: type[Exception], llm: Any
) -> None:
    made = AtlasRolloutEngine(model=llm, console=False)
    given: dict[str, Any] = {"max_new_tokens": 20, "eos_token_ids": [0], "num_generations": 2, "seed": 5}
    made.load_weights(policy(0).state_dict().items())
    before = made.generate(PROMPTS, **given).completion_ids
    version = made.policy_version
    with pytest.raises(error):
        made.load_weights(spoil(dict(policy(1).state_dict())))
    assert made.policy_version == version
    assert made.generate(PROMPTS, **given).completion_ids == before
    made.load_weights(policy(1).state_dict().items(), version + 4)
    expected = AtlasRolloutEngine(model=policy(1), speculation=False, console=False).generate(PROMPTS, **given)
    assert made.generate(PROMPTS, **given).completion_ids == expected.completion_ids
    with pytest.raises(ValueError, match="do not fall"):
        made.load_weights(policy(0).state_dict().items(), version)
    assert made.generate(PROMPTS, **given).completion_ids == expected.completion_ids
    made.load_weights(policy(0).state_dict().items())


def test_an_engine_without_room_for_a_copy_refuses_until_a_good_load(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where weights go into the live model one by one."""
    from atlas_rl.vllm.internals import weights

    made, own = AtlasRolloutEngine(model=llm, console=False), drafter_of(llm)
    given: dict[str, Any] = {"max_new_tokens": 5, "eos_token_ids": [0], "seed": 5}
    assert own is not None

    def load_in_place(runner: Any, pairs: Any) -> None:
        for _ in pairs:
            pass

    runner = llm.llm_engine.model_executor.driver_worker.model_runner
    with monkeypatch.context() as patched:
        patched.setattr(weights, "load_in_place", load_in_place)
        patched.setattr(runner, "device", torch.device("meta"))
        with pytest.raises(ConnectionError):
            made.load_weights(_broken_off(dict(policy(1).state_dict())))
    with pytest.raises(ValueError, match="load the policy's weights once more"):
        made.generate(PROMPTS, **given)
    made.load_weights(policy(0).state_dict().items())
    made.generate(PROMPTS, **given)


def test_weights_that_are_not_finite_are_said_at_the_call(llm: Any) -> None:
    made = AtlasRolloutEngine(model=llm, console=False)
    given: dict[str, Any] = {"max_new_tokens": 5, "eos_token_ids": [0], "seed": 5}
    runner = llm.llm_engine.model_executor.driver_worker.model_runner
    norm = runner.get_model().model.norm.weight
    kept = norm.detach().clone()
    norm.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="the policy's logits are not finite"):
        made.generate(PROMPTS, **given)
    norm.data.copy_(kept)
    llm.reset_prefix_cache()
    made.generate(PROMPTS, **given)


def test_undefined_logits_in_the_middle_of_a_prompt_end_no_call(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM runs a long prompt in parts, draws a token after each, and keeps only the last one."""
    llm = engine(folders[0], max_num_seqs=8, max_num_batched_tokens=32, enable_prefix_caching=False)
    made, model = AtlasRolloutEngine(model=llm, console=False), runner_of(llm).get_model()
    given: dict[str, Any] = {"max_new_tokens": 5, "eos_token_ids": [0], "seed": 5}
    expected = made.generate([PROMPTS[1]], **given).completion_ids
    compute, undefined_in = model.compute_logits, [0]
    calls: list[int] = []

    def spoiled(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(len(hidden))
        return compute(hidden) * (torch.nan if len(calls) - 1 in undefined_in else 1.0)

    monkeypatch.setattr(model, "compute_logits", spoiled)
    assert made.generate([PROMPTS[1]], **given).completion_ids == expected
    calls.clear()
    undefined_in[:] = [1]  # the last part, whose token is kept
    with pytest.raises(ValueError, match="the policy's logits are not finite"):
        made.generate([PROMPTS[1]], **given)


def test_precisions_of_trainers_are_taken_for_one_another(folders: list[Path], tmp_path: Path) -> None:
    policy(1).to(torch.bfloat16).save_pretrained(tmp_path)
    check(tmp_path, describe(folders[0]), torch.float32)


def test_the_end_of_a_weight_transfer_tells_the_drafters_and_empties_the_prefix_cache(
    llm: Any, folders: list[Path]
) -> None:
    """`atlas_nccl` but for the wire: its tensors are read from a file, in the place where NCCL would bring them."""
    load(llm, folders[0])
    text(llm)
    status = llm.collective_rpc("atlas_status")[0]
    llm.collective_rpc("start_weight_update")
    assert llm.collective_rpc("atlas_status")[0] == status | {"weights_are_whole": False}
    model = runner_of(llm).get_model()
    model.load_weights(load_file(folders[2] / "model.safetensors").items())
    llm.collective_rpc("finish_weight_update")
    assert llm.collective_rpc("atlas_status")[0] == status | {"policy_version": status["policy_version"] + 1}
    assert text(llm)[1] == greedy_text_of(policy(2)), "no prefix of the old policy is left"


def test_a_rank_that_cannot_load_reads_to_the_end_before_it_tells_the_others(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks take part in gathering each weight: those that read on would wait for one that already tells."""
    from atlas_rl.vllm.internals import weights

    happened, agree = [], weights.agree

    def pairs() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in policy(1).state_dict().items():
            yield name, tensor * torch.nan
        happened.append("read")

    def told(failed: str | None) -> str | None:
        happened.append("told")
        return agree(failed)

    monkeypatch.setattr(weights, "agree", told)
    with pytest.raises(ValueError, match="not finite"):
        weights.load_all_or_nothing(runner_of(llm), pairs())
    assert happened == ["read", "told"]
