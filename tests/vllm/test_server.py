"""`atlas-rl vllm-serve` over loopback: for any OpenAI client, and for TRL trainers in server mode.

One server does for all tests: starting it takes longer than they do. The last one kills it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from atlas_rl import AtlasRolloutEngine
from tests import ROOT, vllm_engines  # first: it skips this module where there is no vLLM
from tests.other_trainers import build_other, byte_tokenizer, trained_rows
from tests.trainers import WORDS, build_trainer, word_tokenizer
from tests.vllm.served import (
    LIMIT_S,
    build,
    check_idle_learning,
    check_logprobs,
    complete,
    errors_of,
    loaded,
    policy,
    saved_policies,
)
from tests.vllm_server import Server, call, free_port, post, serving, streamed

__all__ = ["vllm_engines"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return saved_policies(tmp_path_factory, 1, 2)


@pytest.fixture(scope="module")
def server(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(folders[0], tmp_path_factory.mktemp("server"), "--idle-learning", "on") as running:
        yield running


def test_it_serves_the_policy_learns_from_traffic_and_follows_new_weights(server: Server, folders: list[Path]) -> None:
    address = server.address
    first = [[choice["text"] for choice in complete(address, seed)] for seed in range(8)]
    report = call(address, "atlas_report")
    assert report["num_requests"] == 64
    assert report["num_tokens"] == 64 * 60
    assert sum(report["accepted"].values()) > 0
    assert report["accepted_length"] > 1
    assert [[choice["text"] for choice in complete(address, seed)] for seed in range(8)] == first
    check_logprobs(policy(1), complete(address, 99, n=1)[0])

    answer = call(address, "atlas_load_weights", str(folders[1]), "5")
    assert answer["policy_version"] == 5
    # On a CPU vLLM's worker is a process of its own, which cannot empty the prefix cache; the answer says so.
    post(address, answer["left_to_do"].removeprefix("POST "), {})
    check_logprobs(policy(2), complete(address, 99, n=1)[0])
    assert call(address, "atlas_policy_updated")["policy_version"] == 6
    assert call(address, "atlas_report")["policy_version"] == 6


def test_drafters_learn_while_the_server_waits(server: Server) -> None:
    check_idle_learning(server.address)


def test_so_do_those_of_a_worker_in_the_engines_process(
    folders: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("one process")
    with serving(folders[0], folder, "--idle-learning", "on", workers_apart=False) as running:
        check_idle_learning(running.address)


# --------------------------------------------------------------------------------------------------------- TRL trainers


@pytest.mark.parametrize("peft", [False, True])
def test_a_trainer_in_server_mode_trains_and_the_drafters_follow(
    peft: bool, server: Server, folders: list[Path], tmp_path: Path
) -> None:
    trainer = build(
        loaded(folders[0]), server.address, tmp_path, peft=peft, learning_rate=1e-2, max_completion_length=40
    )
    engine = AtlasRolloutEngine(backend="vllm", output_dir=tmp_path, console=False)
    before = call(server.address, "atlas_status")["policy_version"]
    assert engine.attach(trainer) is engine
    errors = errors_of(trainer)
    trainer.train()

    assert call(server.address, "atlas_status")["policy_version"] == before + 3, "by itself"
    assert [report.policy_version for report in engine.reports] == [0, 1, 2]
    assert len(errors) == 3 * 8
    assert max(errors) < 1e-3, "the server has the trainer's weights"
    for report in engine.reports:
        assert report.num_requests == 8
        assert report.num_tokens == sum(report.completion_lengths)
        assert 0 < report.sync_s + report.refresh_s < report.generate_s < (report.step_s or 0)
        assert report.prefill_s + report.forward_s > 0
        assert not report.warnings
    assert set(engine.reports[0].drafted) == {"history", "recurrent"}
    assert sum(sum(report.accepted.values()) for report in engine.reports) > 0
    assert engine.reports[-1].refresh_s > 0, "drafters learn at an update"
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [row["num_tokens"] for row in rows] == [report.num_tokens for report in engine.reports]
    logged = [row["atlas/accepted_length"] for row in trainer.state.log_history if "atlas/accepted_length" in row]
    assert logged == pytest.approx([report.accepted_length for report in engine.reports])


@pytest.mark.parametrize("kind", ["rloo", "gmpo", "distillation", "sdft", "sdpo", "gold", "iw_opd"])
def test_other_trainers_train_on_what_the_server_generated(
    kind: str, server: Server, folders: list[Path], tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(len(WORDS)) if kind == "gold" else word_tokenizer()
    options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.address, "learning_rate": 1e-2}
    options |= {"vllm_group_port": free_port(), "max_steps": 2}
    every = 2 if kind == "gold" else 1  # steps between two updates of the server
    options |= {"vllm_sync_frequency": every} if kind == "gold" else {}
    engine = AtlasRolloutEngine(console=False)
    with engine.prepare_vllm():
        if kind == "rloo":
            trainer = build_trainer(kind, loaded(folders[0]), tokenizer, tmp_path, **options)
        else:
            trainer = build_other(kind, tmp_path, tokenizer=tokenizer, **options)
    trained = trained_rows(trainer)
    adapter = engine.attach(trainer)._adapter
    before = call(server.address, "atlas_status")["policy_version"]
    generated, generate = [], adapter.generate

    def kept(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step % every == 0:
            check_logprobs(trainer.model, complete(server.address, 7, n=1)[0])
        call(server.address, "atlas_report")  # that request is none of the trainer's
        answer = generate(*args, **kwargs)
        generated.append([(tuple(a), tuple(b)) for a, b in zip(*answer[:2], strict=True)])
        return answer

    adapter.generate = kept
    trainer.train()
    assert call(server.address, "atlas_status")["policy_version"] == before + 2 // every, "by itself"
    assert [sorted(rows) for rows in trained] == [sorted(rows) for rows in generated]
    assert [report.policy_version for report in engine.reports] == [0, 2 - every]
    assert [report.num_requests for report in engine.reports] == [len(rows) for rows in generated]
    assert not any(report.warnings for report in engine.reports)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("iw_opd", r"IWOPDTrainer sets up other parts .*prepare_vllm\(\), with use_vllm=True and vllm_mode='server'"),
        ("online_dpo", r"OnlineDPOTrainer has no vLLM engine that can be replaced"),
        ("sdft", r"use_teacher_server=True asks the server for the logprobs of prompts"),
    ],
)
def test_what_no_server_can_do_for_a_trainer_is_refused(kind: str, message: str, tmp_path: Path) -> None:
    trainer = build_other(kind, tmp_path, vllm_mode="server", vllm_server_base_url="http://127.0.0.1:9")
    trainer.use_teacher_server = kind == "sdft"
    with pytest.raises(ValueError, match=message):
        AtlasRolloutEngine(backend="vllm", console=False).attach(trainer)


def test_a_call_has_a_seed_and_each_prompt_noise_of_its_own(
    server: Server, folders: list[Path], tmp_path: Path
) -> None:
    trainer = build(loaded(folders[0]), server.address, tmp_path, max_completion_length=40)
    AtlasRolloutEngine(backend="vllm", console=False).attach(trainer)
    adapter = trainer.vllm_generation
    adapter.sync_weights()
    prompts = [[2, 3, 4]] * 8  # two groups of four, as when a dataset has a prompt twice
    first = adapter.generate(prompts, None, 4)[1]
    second = adapter.generate(prompts, None, 4)[1]
    assert len({tuple(completion) for completion in first + second}) > 14
    adapter._calls_at_step.clear()  # as in a run that is repeated
    assert adapter.generate(prompts, None, 4)[1] == first


def test_weights_that_are_refused_leave_the_old_ones_and_a_server_that_goes_on(
    server: Server, folders: list[Path], tmp_path: Path
) -> None:
    call(server.address, "atlas_load_weights", str(folders[1]))
    post(server.address, "/reset_prefix_cache?reset_running_requests=true", {})
    version = call(server.address, "atlas_status")["policy_version"]
    foreign = build(policy(3, hidden=32), server.address, tmp_path, max_steps=1)
    AtlasRolloutEngine(backend="vllm", console=False).attach(foreign)
    with pytest.raises(RuntimeError, match=r"weights did not reach the vLLM server at .*update_weights with 500"):
        foreign.train()
    status = call(server.address, "atlas_status")
    assert (status["policy_version"], status["weights_are_whole"]) == (version, True)
    check_logprobs(policy(2), complete(server.address, 7, n=1)[0])

    trainer = build(loaded(folders[0]), server.address, tmp_path, max_steps=1)
    engine = AtlasRolloutEngine(backend="vllm", console=False).attach(trainer)
    trainer.train()
    assert engine.reports[0].num_requests == 8


def test_a_server_whose_policy_somebody_else_changed_is_noticed(
    server: Server, folders: list[Path], tmp_path: Path
) -> None:
    engine = AtlasRolloutEngine(console=False)
    with engine.prepare_vllm():  # the second way in: TRL builds its client, which knows gloo then
        trainer = build(loaded(folders[0]), server.address, tmp_path, use_vllm=True)
    adapter = engine.attach(trainer)._adapter
    assert trainer.vllm_generation is adapter
    adapter.sync_weights()
    call(server.address, "atlas_policy_updated")
    with pytest.raises(RuntimeError, match=r"expected \d+: another client has changed its weights"):
        adapter.generate([[2, 3]] * 4, None, 4)
    adapter._server = replace(adapter._server, server="another")
    with pytest.raises(RuntimeError, match="was restarted and has lost the policy"):
        adapter.generate([[2, 3]] * 4, None, 4)


def test_a_second_trainer_on_a_server_takes_it_over_and_the_first_is_told(
    server: Server, folders: list[Path], tmp_path: Path
) -> None:
    trainers = [build(loaded(folders[0]), server.address, tmp_path, max_steps=1) for _ in range(2)]
    first, second = (AtlasRolloutEngine(backend="vllm", console=False).attach(trainer)._adapter for trainer in trainers)
    for use in (first.sync_weights, lambda: first.generate([[2, 3]] * 4, None, 4)):
        with pytest.raises(RuntimeError, match=r"another trainer has connected .* start a server for each"):
            use()
    trainers[1].train()
    assert second.engine.reports[0].num_requests == 8


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"draft_model": "."}, {}, "draft_model is not an option.*vllm-serve MODEL --draft-model FOLDER"),
        ({"speculation": False}, {}, "speculation=False cannot be set on a server"),
        ({}, {"baseline_every": 2}, "leave baseline_every=0"),
    ],
    ids=str,
)
def test_what_a_server_cannot_honour_is_refused(
    options: dict[str, Any], arguments: dict[str, Any], message: str, folders: list[Path], tmp_path: Path
) -> None:
    trainer = build(loaded(folders[0]), "http://127.0.0.1:9", tmp_path)
    with pytest.raises(ValueError, match=message):
        AtlasRolloutEngine(backend="vllm", console=False, **options).attach(trainer, **arguments)
    assert not trainer.use_vllm


def test_a_server_without_our_extension_is_refused(
    server: Server, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from atlas_rl.integrations.trl.server_client import AtlasClient

    config = AtlasClient(base_url=server.address).get_server_info()
    plain = config | {
        "speculative_config": None,
        "weight_transfer_config": {"backend": "nccl"},
        "parallel_config": config["parallel_config"] | {"worker_extension_cls": ""},
    }
    monkeypatch.setattr(AtlasClient, "_configuration", lambda client: plain)
    trainer = build(loaded(folders[0]), server.address, tmp_path)
    with pytest.raises(
        ValueError, match=r"without our proposer .* worker extension .* start it with `atlas-rl vllm-serve"
    ):
        AtlasRolloutEngine(backend="vllm", console=False).attach(trainer)
    assert not trainer.use_vllm


def test_a_request_lives_through_an_update_that_pauses_it(server: Server, folders: list[Path]) -> None:
    """What TRL's asynchronous trainers do: requests are paused, weights come, requests go on."""
    from atlas_rl.integrations.trl.server_client import AtlasClient

    call(server.address, "atlas_load_weights", str(folders[0]))
    client = AtlasClient(base_url=server.address, group_port=free_port())
    client.init_communicator("cpu")
    moved = loaded(folders[1])
    metadata = [(name, "float32", list(weight.shape)) for name, weight in moved.named_parameters()]
    version = client.status().policy_version
    logprobs, tokens = [], []
    for number, choice in enumerate(streamed(server.address, max_tokens=110)):
        if number == 5:
            client.ask("/pause?mode=keep", {})
            client.update_named_params(metadata, iter([(n, w.detach()) for n, w in moved.named_parameters()]))
            client.ask("/resume", {})
        tokens += [WORDS.index(word.strip()) for word in choice["logprobs"]["tokens"]]
        logprobs += choice["logprobs"]["token_logprobs"]
    assert client.status().policy_version == version + 1
    assert len(tokens) == 110
    wrong = []
    for model in (policy(1), moved):
        with torch.no_grad():
            each = model(torch.tensor([[2, 3, 4, *tokens]])).logits[0, 2:-1].float().log_softmax(-1)
        expected = each.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        wrong.append(((expected - torch.tensor(logprobs)).abs() > 1e-3).tolist())
    changed = wrong[0].index(True)
    assert 5 <= changed < 110, "the first tokens are the old policy's"
    assert not any(wrong[1][changed:]), "and from one token on all are the new one's"
    assert call(server.address, "atlas_report")["num_tokens"] == 110
    client.close_communicator()


@pytest.mark.parametrize("wrapper", ["ddp", "zero3", "fsdp1", "fsdp2", "fsdp2+lora"])
def test_two_ranks_share_a_server(wrapper: str, server: Server, folders: list[Path], tmp_path: Path) -> None:
    """Also where each holds shards of the policy, which TRL gathers to send it."""
    if wrapper == "zero3" and find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: pip install atlas-rl[deepspeed]")
    call(server.address, "atlas_load_weights", str(folders[1]))  # none of the trainer's weights are there already
    post(server.address, "/reset_prefix_cache?reset_running_requests=true", {})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", "tests.vllm.two_ranks", wrapper, str(folders[0]), server.address, str(free_port()), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for rank in ranks:
        assert rank["versions"] == ([0, 1] if rank is ranks[0] else [])
        assert rank["num_compared"] == 2 * 4
        assert rank["error_nats"] < 1e-3
        assert rank["logged"] == ranks[0]["logged"], "every rank logs the report of all"
        assert "another client has changed its weights" in rank["refused"], "on every rank"
    assert ranks[0]["completions"] != ranks[1]["completions"]
    assert ranks[0]["num_requests"] == [8, 8]
    assert ranks[0]["moved"] > 0, "the second call was with other weights"
    for sent_s, sync_s, waited_s in ranks[0]["seconds"]:
        assert 0 < sent_s <= sync_s <= waited_s, "gathering and sending count, and nothing beside waiting for it"


def test_the_example_runs(server: Server, folders: list[Path], tmp_path: Path) -> None:
    script = ROOT / "examples" / "grpo_vllm_server" / "run.py"
    options = ["--model", str(folders[0]), "--server", server.address, "--group-port", str(free_port())]
    options += ["--steps", "2", "--prompts", "1", "--max-new-tokens", "16", "--output-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(script), *options], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [report["policy_version"] for report in reports] == [0, 1]
    assert all(report["num_requests"] == 4 and not report["warnings"] for report in reports)
    assert done.stdout.count("atlas step") == 2


def test_a_server_that_dies_in_a_run_is_a_clear_error(server: Server, folders: list[Path], tmp_path: Path) -> None:
    class Killer(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            server.kill()

    trainer = build(loaded(folders[0]), server.address, tmp_path)
    engine = AtlasRolloutEngine(backend="vllm", console=False).attach(trainer)
    trainer.add_callback(Killer())
    with pytest.raises(ConnectionError, match=r"does not answer .* start it again, and resume the run from its last"):
        trainer.train()
    assert len(engine.reports) == 1
    assert trainer.state.global_step == 1
