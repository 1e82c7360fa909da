"""Tensor parallelism: two ranks of vLLM on one machine draft the same tokens, because one of them drafts for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models import tiny_bigram
from tests.vllm_engines import completions, engine  # first: it skips this module where there is no vLLM

PROMPTS = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    tiny_bigram(vocab=64, hidden=64, heads=2, kv_heads=2, context=128, logit_std=3.0).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def two(folder: Path) -> Any:
    """An engine of two ranks, each with one half of the vocabulary."""
    extension = "atlas_rl.vllm.server.AtlasWorkerExtension"
    return engine(folder, tensor_parallel_size=2, distributed_executor_backend="mp", worker_extension_cls=extension)


def test_two_ranks_generate_what_one_does(folder: Path, two: Any) -> None:
    from vllm import SamplingParams

    params = [SamplingParams(max_tokens=60, seed=seed, ignore_eos=True, detokenize=False) for seed in range(12)]
    prompts = [{"prompt_token_ids": PROMPTS[seed % 3]} for seed in range(12)]

    def run(llm: Any) -> list[list[list[int]]]:
        return [completions(llm.generate(prompts, params, use_tqdm=False)) for _ in range(4)]

    generated = run(two)
    leading, following = two.collective_rpc("atlas_report")
    assert sum(leading["accepted"].values()) > 0
    assert leading["num_tokens"] == 4 * 12 * 60
    assert following["drafted"] == {}, "only rank 0 drafts"
    assert leading["warnings"] == following["warnings"] == []
    assert generated == run(engine(folder))


def test_drafters_read_the_embeddings_of_the_new_policy(two: Any) -> None:
    """Also those of requests that run while the weights are changed by other means."""
    from vllm import SamplingParams

    def scale(worker: Any, by: float) -> None:
        worker.model_runner.get_model().model.embed_tokens.weight.data.mul_(by)

    def seen(worker: Any) -> tuple[float, int, bool] | None:
        """Size of the whole table, and how many rows of it the recurrent drafter has; whether they are equal to it."""
        proposer = worker.model_runner.drafter
        if "recurrent" not in proposer.drafting.speculators:
            return None
        rows, policy = proposer.drafting.speculators["recurrent"].learner._rows, proposer.policy
        same = bool((rows.inputs == policy.rows_of(rows.token_ids)[0]).all())
        return float(policy.input_table.abs().sum()), len(rows.token_ids), same

    def run(max_tokens: int, steps: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True, detokenize=False)
        for number, prompt in enumerate(PROMPTS):
            two.llm_engine.add_request(f"{max_tokens} {number}", {"prompt_token_ids": prompt}, params)
        for _ in range(steps):
            two.llm_engine.step()

    run(8, 10)  # the drafter reads the rows of finished requests
    run(60, 5)
    (before, *_), follower = two.collective_rpc(seen)
    assert follower is None
    for by in (2.0, 0.5):  # and back, for other tests
        two.collective_rpc(scale, args=(by,))
        two.collective_rpc("atlas_policy_updated")
        (after, num_rows, same), _ = two.collective_rpc(seen)
        assert after == pytest.approx(by * before)
        assert num_rows > 0
        assert same
        assert two.llm_engine.has_unfinished_requests()
        before = after
    while two.llm_engine.has_unfinished_requests():
        two.llm_engine.step()
