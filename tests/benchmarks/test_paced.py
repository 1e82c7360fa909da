"""A device in virtual time: waits are told, not waited for, and a recorded call comes out as it was."""

from __future__ import annotations

import time

import numpy as np
import pytest

from atlas_rl import AtlasRolloutEngine
from atlas_rl.controller.fixed import FixedController
from atlas_rl.policy.step_graphs import SIZES
from atlas_rl.replay.policy import RecordedPolicy
from atlas_rl.replay.record import Recorded, RecordingSpeculator, recorded_calls
from atlas_rl.speculators.history.speculator import HistorySpeculator
from benchmarks.pace import LEARNED_CALLS, Learned, joined, part_of, setting_of
from benchmarks.paced import Costs, PacedLoop
from benchmarks.virtual_device import Device
from tests.models import tiny_bigram

PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 60, 4], [5, 9, 2]]


def work(seconds: float) -> None:
    """Keep the processor busy for so long."""
    ends = time.thread_time() + seconds
    while time.thread_time() < ends:
        pass


def test_waits_pass_in_virtual_time_only() -> None:
    device = Device()
    device.phase = lambda: "forward"
    began_s, began_here_s = device.clock(), time.perf_counter()
    device.forward(50.0)
    with device.outside():
        work(0.02)
    device.wait()
    passed_s = device.clock() - began_s
    assert time.perf_counter() - began_here_s < 10.0
    assert passed_s == pytest.approx(50.0, abs=0.015)  # what happened outside does not count
    assert device.busy_s == 50.0
    assert device.waited_s["forward"] == pytest.approx(50.0, abs=0.015)


def test_the_device_is_idle_while_the_host_works() -> None:
    device = Device()
    device.forward(0.0)
    work(0.02)
    device.forward(5.0)  # the device waited for the host
    work(0.02)
    device.forward(1.0)  # the host was done before the device
    assert device.gaps_s[1] >= 0.02
    assert device.gaps_s[2] == 0.0


def test_results_that_came_before_other_work_are_not_waited_for_longer() -> None:
    device = Device()
    device.forward(50.0)
    ready_s = device.ready_s
    device.submit(30.0)
    device.wait(ready_s)
    assert device.clock() == pytest.approx(ready_s, abs=0.015)
    device.wait()
    assert device.clock() == pytest.approx(ready_s + 30.0, abs=0.015)


def test_drafters_learn_of_the_first_calls_and_the_others_are_measured(tmp_path) -> None:
    engine = AtlasRolloutEngine(
        model=tiny_bigram(layers=3, seed=11), speculators=[RecordingSpeculator(tmp_path)], console=False
    )
    for seed in range(LEARNED_CALLS + 2):
        engine.generate(PROMPTS, num_generations=3, max_new_tokens=20, eos_token_ids=[17, 40], seed=seed)
        engine.policy_updated()
    learned = Learned.of(tmp_path)
    assert len(learned.recorded.sequences.lengths) == 2 * 3 * len(PROMPTS)


def test_a_padded_step_takes_what_its_size_takes() -> None:
    setting = setting_of("Qwen3-1.7B, H100, in process")
    padded, plain = Costs(setting, SIZES), Costs(setting)
    assert padded.step_s(8, 9, 800) == padded.step_s(8, 12, 800) == plain.forward_s(12, 12, 1200)
    assert padded.step_s(8, 12, 800) < padded.step_s(8, 13, 800) == padded.step_s(16, 16, 1600)
    assert padded.step_s(8, 600, 800) == plain.step_s(8, 600, 800) == plain.forward_s(8, 600, 800)


@pytest.mark.parametrize("drafts", [False, True])
def test_a_recorded_call_comes_out_as_it_was(tmp_path, drafts: bool) -> None:
    engine = AtlasRolloutEngine(
        model=tiny_bigram(layers=3, seed=11), speculators=[RecordingSpeculator(tmp_path)], console=False
    )
    for seed in range(2):
        engine.generate(PROMPTS, num_generations=3, max_new_tokens=20, eos_token_ids=[17, 40], seed=seed)
        engine.policy_updated()
    recorded = joined([Recorded.load(path) for path in recorded_calls(tmp_path)])
    part = part_of(recorded, np.array([3, 4, 5, 14, 20]))
    speculators, controller = {}, FixedController(("history",), "history", 3)
    if drafts:
        speculators = {"history": HistorySpeculator()}
        speculators["history"].bind(RecordedPolicy(part), couples_noise=True)
    loop = PacedLoop(part, speculators, controller, Costs(setting_of("Qwen3-8B, B200"), SIZES))
    loop.run()
    for request in range(5):
        assert loop.sequences.completion(request) == part.sequences.completion(request)
    report = loop.recorder.finish(
        step=0, policy_version=0, mode="standalone", num_prompt_tokens=0, completion_lengths=loop.sequences.lengths
    )
    assert (report.accepted_length > 1) == drafts
    assert 0 < loop.device.busy_s <= report.generate_s
    assert len(loop.steps) == len(loop.device.gaps_s) == report.num_forwards


def test_a_step_is_charged_for_all_that_the_device_waits_for(tmp_path) -> None:
    """Between an outcome and the next forward; the drafts' part of it contains what a late observer observes then."""
    engine = AtlasRolloutEngine(
        model=tiny_bigram(layers=3, seed=11), speculators=[RecordingSpeculator(tmp_path)], console=False
    )
    engine.generate(PROMPTS, num_generations=3, max_new_tokens=20, eos_token_ids=[17, 40], seed=0)
    engine.policy_updated()
    recorded = Recorded.load(recorded_calls(tmp_path)[0])
    history, seen = HistorySpeculator(), []
    history.bind(RecordedPolicy(recorded), couples_noise=True)

    class Noting(FixedController):
        def observe(self, step, *rest):
            seen.append(step)
            return super().observe(step, *rest)

    controller = Noting(("history",), "history", 3)
    loop = PacedLoop(recorded, {"history": history}, controller, Costs(setting_of("Qwen3-8B, B200"), SIZES))
    loop.run()
    assert loop.observing.is_hidden
    assert len(seen) == len(loop.device.gaps_s)
    for step, gap_s in list(zip(seen, loop.device.gaps_s, strict=True))[1:]:  # a call's first wait is for its prompts
        assert 0 < step.draft_s["history"] < step.exposed_s
        assert step.exposed_s < gap_s + 2e-3  # the gap also has the forward's own launch
    exposed_s = np.array([step.exposed_s for step in seen[1:]])
    assert np.median(exposed_s) > 0.5 * np.median(loop.device.gaps_s[1:])
