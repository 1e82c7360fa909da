"""vLLM's own dispatcher, run on a CPU, replays full graphs for our steps; and steps are made uniform where it must be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from atlas_rl.controller.fixed import FixedController, NoSpeculation
from atlas_rl.vllm.backend import llm_arguments
from atlas_rl.vllm.checks import NUM_SPECULATIVE_TOKENS as K
from atlas_rl.vllm.graphs import FILLED_TOKENS, capture_sizes, compilation_config, uniform_drafts
from atlas_rl.vllm.internals import drafter_of, runner
from tests.drafters import RandomDrafter
from tests.models import tiny_bigram
from tests.vllm_engines import completions, engine  # first: it skips this module where there is no vLLM

FLASH_ATTENTION_3, FLASH_INFER = "ALWAYS", "UNIFORM_BATCH"  # what these backends support, in vLLM's words


class Dispatcher:
    """vLLM's dispatcher, as a runner with this `compilation_config` makes it.

    Args:
        support: Of the attention backend.
        max_num_seqs: Most requests that run together.
        changed: Of our configuration.
    """

    def __init__(self, support: str, max_num_seqs: int = 256, num_speculative_tokens: int = K, **changed: Any) -> None:
        from vllm.config import CompilationMode
        from vllm.config.compilation import CompilationConfig
        from vllm.v1.attention.backend import AttentionCGSupport
        from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

        own = CompilationConfig(**(compilation_config(max_num_seqs) | changed), mode=CompilationMode.VLLM_COMPILE)
        own.splitting_ops = list(CompilationConfig._attention_ops)  # vLLM's default for every mode
        own.max_cudagraph_capture_size = max(own.cudagraph_capture_sizes)
        self.width = 1 + num_speculative_tokens
        self.mode = own.resolve_cudagraph_mode_and_sizes(AttentionCGSupport[support], support, self.width)
        self.num_graphs = len(own.cudagraph_capture_sizes)
        config: Any = SimpleNamespace(
            compilation_config=own,
            num_speculative_tokens=num_speculative_tokens,
            scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
            lora_config=None,
        )
        self.dispatcher = CudagraphDispatcher(config)
        self.dispatcher.initialize_cudagraph_keys(self.mode, self.width)

    def graph(self, drafts: list[int]) -> tuple[str, int]:
        """The kind of graph of a step whose requests have so many drafts, and the tokens that it is padded to."""
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        counts = [1 + n for n in drafts]
        uniform = GPUModelRunner._is_uniform_decode(max(counts), self.width, sum(counts), len(counts))
        mode, batch = self.dispatcher.dispatch(sum(counts), uniform_decode=uniform)
        return mode.name, batch.num_tokens


@pytest.mark.parametrize("max_num_seqs", [1, 7, 64, 256])
def test_every_step_is_a_full_graph(max_num_seqs: int) -> None:
    dispatcher, rng = Dispatcher(FLASH_ATTENTION_3, max_num_seqs), np.random.default_rng(0)
    for batch in range(1, max_num_seqs + 1):
        steps = [[0] * batch, [K] * batch, [3] * batch, rng.integers(0, K + 1, batch).tolist()]
        for drafts in steps:
            kind, padded = dispatcher.graph(drafts)
            assert kind == "FULL", drafts
            assert padded <= max(batch + sum(drafts) + K, 1.13 * (batch + sum(drafts)))
    assert dispatcher.num_graphs <= 50


def test_vllms_own_choice_is_not_a_full_graph() -> None:
    """The reason for all this: were it no longer so, vLLM could be left alone."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    dispatcher = Dispatcher(FLASH_ATTENTION_3, cudagraph_mode="FULL_AND_PIECEWISE", cudagraph_capture_sizes=sizes)
    assert dispatcher.graph([0] * 8)[0] == "PIECEWISE"
    assert dispatcher.graph([2, 0, 5])[0] == "PIECEWISE"
    assert dispatcher.graph([2] * 200)[0] == "NONE"


def filled(batch: int, drafts: list[int], num_draft_tokens: int = K) -> list[int]:
    room = np.full(batch, 100)
    made = uniform_drafts([[7] * n for n in drafts], np.full(batch, 5), room, num_draft_tokens)
    return [len(draft) for draft in made]


def test_small_steps_are_made_uniform_where_attention_needs_it() -> None:
    dispatcher, rng = Dispatcher(FLASH_INFER), np.random.default_rng(0)
    assert dispatcher.mode.name == "FULL_AND_PIECEWISE"
    for batch in range(1, FILLED_TOKENS // (1 + K) + 1):
        for drafts in ([0] * batch, rng.integers(0, K + 1, batch).tolist()):
            assert dispatcher.graph(filled(batch, drafts))[0] == "FULL"
    assert dispatcher.graph(filled(200, [0] * 200))[0] == "PIECEWISE"
    # With three drafts at most, steps of up to 64 requests.
    narrow = Dispatcher(FLASH_INFER, num_speculative_tokens=3)
    assert narrow.graph(filled(64, [0] * 64, 3))[0] == "FULL"


def test_what_makes_drafts_uniform() -> None:
    drafts, last, room = [[1, 2], [], [3]], np.array([7, 8, 9]), np.array([9, 9, 9])
    assert uniform_drafts(drafts, last, room, 3) == [[1, 2, 2], [8, 8, 8], [3, 3, 3]]
    assert uniform_drafts(drafts, last, room, 0) is drafts
    assert uniform_drafts(drafts, last, np.array([9, 2, 9]), 3) is drafts, "near the end of a context"
    many = [[1]] * 65
    assert uniform_drafts(many, np.zeros(65, np.int64), np.full(65, 9), 3) is many


def test_graphs_hold_every_request_with_all_its_drafts() -> None:
    for max_num_seqs in range(1, 257):
        sizes = capture_sizes(max_num_seqs)
        assert sizes[-1] == max_num_seqs * (1 + K)
        assert all(size % (1 + K) == 0 for size in sizes)
        assert sizes == sorted(set(sizes))


def test_the_users_own_configuration_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "compilation_config" not in llm_arguments(max_num_seqs=8), "there are no graphs on a CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert llm_arguments(max_num_seqs=8)["compilation_config"] == compilation_config(8)
    assert llm_arguments()["compilation_config"]["cudagraph_capture_sizes"][-1] == 4096
    for own in ({"compilation_config": 3}, {"compilation_config": {"cudagraph_mode": "NONE"}}):
        assert llm_arguments(**own)["compilation_config"] == own["compilation_config"]
    assert "compilation_config" not in llm_arguments(cudagraph_capture_sizes=[1, 2])


def test_arguments_of_ones_own_stay_beside_ours() -> None:
    made = llm_arguments("folder", max_num_seqs=8, additional_config={"other": 1})
    assert made["additional_config"] == {"other": 1, "atlas_rl": {"draft_model": "folder"}}
    assert made["max_num_seqs"] == 8
    assert made["speculative_config"]["num_speculative_tokens"] == K


def test_the_flag_of_a_server_is_printed() -> None:
    command = [sys.executable, "-m", "atlas_rl.vllm.graphs"]
    printed = subprocess.run([*command, "64"], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == compilation_config(64)
    refused = subprocess.run([*command, "many"], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "MAX_NUM_SEQS" in refused.stderr


def test_uniform_steps_change_no_token_and_count_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fills a step up is verified by an engine, and is nobody's draft."""
    tiny_bigram(vocab=64, hidden=64, heads=2, kv_heads=2, layers=2, context=128, logit_std=3.0).save_pretrained(
        tmp_path
    )
    from vllm import SamplingParams

    llm = engine(tmp_path, max_num_seqs=8)
    drafter: Any = drafter_of(llm)
    drafter.prepare()
    own = drafter.drafting
    widths: list[int] = []
    step = own.step
    monkeypatch.setattr(own, "step", lambda forward: (widths.append(forward.num_drafted.min()), step(forward))[1])

    def texts(num_drafts: int, uniform: int) -> list[list[int]]:
        monkeypatch.setattr(runner, "_uniform", lambda runner: uniform)
        if num_drafts:
            own.use({"random": RandomDrafter()}, FixedController(["random"], "random", num_drafts))
        else:
            own.use({}, NoSpeculation())
        widths.clear()
        params = [
            SamplingParams(temperature=t, seed=i, max_tokens=100, ignore_eos=True) for i, t in enumerate((1, 0, 1.5))
        ]
        prompts = [{"prompt_token_ids": [i + 1, 2, 3]} for i in range(3)]
        return completions(llm.generate(prompts, params, use_tqdm=False))

    expected = texts(0, 0)
    for num_drafts in (0, 1, 3):
        own.take_report()
        assert texts(num_drafts, 3) == expected
        assert np.mean(np.array(widths) == 3) > 0.8
        report = own.take_report()
        assert report.drafter_faults == {}
        assert len(report.drafted_by_position) == num_drafts
        assert report.num_tokens == 300
