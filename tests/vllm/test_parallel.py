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


def test_two_ranks_generate_what_one_does(folder: Path) -> None:
    from vllm import SamplingParams

    params = [SamplingParams(max_tokens=60, seed=seed, ignore_eos=True, detokenize=False) for seed in range(12)]
    prompts = [{"prompt_token_ids": PROMPTS[seed % 3]} for seed in range(12)]

    def run(llm: Any) -> list[list[list[int]]]:
        return [completions(llm.generate(prompts, params, use_tqdm=False)) for _ in range(4)]

    extension = "atlas_rl.vllm.server.AtlasWorkerExtension"
    two = engine(folder, tensor_parallel_size=2, distributed_executor_backend="mp", worker_extension_cls=extension)
    generated = run(two)
    leading, following = two.collective_rpc("atlas_report")
    assert sum(leading["accepted"].values()) > 0
    assert leading["num_tokens"] == 4 * 12 * 60
    assert sum(following["drafted"].values()) == 0, "only rank 0 drafts"
    assert generated == run(engine(folder))
