"""The command of `atlas-rl vllm-serve`: which flags it adds, and which it refuses. No server is started."""

from __future__ import annotations

import json
from argparse import Namespace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from atlas_rl.cli import main
from tests import vllm_engines  # first: it skips this module where there is no vLLM
from tests.models import tiny_llama
from tests.pages import blocks_of_pages, commands_of

__all__ = ["vllm_engines"]
OF_PAGES = [
    pytest.param(words[1:], id=block.where)
    for block in blocks_of_pages()
    if block.language == "bash" and not block.reason
    for words in commands_of(block.text)
    if Path(words[0]).name == "atlas-rl" and words[1] == "vllm-serve"
]


def command(*flags: str, **options: Any) -> list[str]:
    from atlas_rl.vllm.serve import serve_command

    return serve_command("POLICY", flags, environment={}, **options)[0]


def value(given: list[str], flag: str) -> str:
    assert given.count(flag) == 1, given
    return given[given.index(flag) + 1]


def test_a_trainer_can_rely_on_what_it_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    given = command("--port", "8001")
    assert given[-2:] == ["--port", "8001"]
    assert json.loads(value(given, "--speculative-config"))["model"] == "atlas_rl.vllm.proposer.AtlasProposer"
    assert value(given, "--worker-extension-cls") == "atlas_rl.vllm.server.AtlasWorkerExtension"
    assert value(given, "--logprobs-mode") == "processed_logprobs"
    assert value(given, "--max-logprobs") == "-1"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert json.loads(value(command(), "--weight-transfer-config")) == {"backend": "atlas_gloo"}
    assert value(command(), "--kv-cache-memory-bytes") == str(2 << 30)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    on_cuda = command("--max_num_seqs=32")
    assert json.loads(value(on_cuda, "--weight-transfer-config")) == {"backend": "atlas_nccl"}
    graphs = json.loads(value(on_cuda, "--compilation-config"))
    assert (graphs["cudagraph_mode"], max(graphs["cudagraph_capture_sizes"])) == ("FULL", 32 * 16)
    assert "--kv-cache-memory-bytes" not in on_cuda
    assert "--compilation-config" not in command("--enforce-eager")


def test_what_is_given_is_kept() -> None:
    gloo = json.dumps({"backend": "atlas_gloo"})
    flags = ("--weight-transfer-config", gloo, "--max-logprobs=20", "--kv-cache-memory-bytes", "1000000")
    given = command(*flags)
    assert given[-len(flags) :] == list(flags)
    assert sum("logprobs" in flag and flag.startswith("--max") for flag in given) == 1
    assert given.count("--weight-transfer-config") == 1
    assert command("--weight_transfer_config", gloo) == command("--weight-transfer-config", gloo)


def test_flags_of_trl_are_put_into_words_of_vllm() -> None:
    flags = "--port 1 --vllm_model_impl auto --log_level=debug --enforce_eager True --enable_prefix_caching False"
    assert " ".join(command(*flags.split())).endswith(
        "--port 1 --model-impl auto --uvicorn-log-level=debug --enforce-eager --no-enable-prefix-caching"
    )


def test_the_static_head_goes_beside_other_configuration(tmp_path: Path) -> None:
    given = command("--additional-config", '{"a": 1}', "--port", "1", draft_model=tmp_path)
    assert json.loads(value(given, "--additional-config")) == {"a": 1, "atlas_rl": {"draft_model": str(tmp_path)}}
    assert given[-2:] == ["--port", "1"]


def test_drafters_learn_in_idle_time_where_the_device_is_the_servers_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trainer computes on other GPUs, but perhaps on the same cores."""
    head = str(tmp_path)
    for on_cuda in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda on_cuda=on_cuda: on_cuda)
        assert ("--additional-config" in command()) == on_cuda
        given = command("--additional-config", json.dumps({"atlas_rl": {"draft_model": head}}))
        own = {"draft_model": head, **({"idle_learning": True} if on_cuda else {})}
        assert json.loads(value(given, "--additional-config")) == {"atlas_rl": own}
        for asked in (False, True):
            given = command(draft_model=tmp_path, idle_learning=asked)
            own = {"draft_model": head, "idle_learning": asked}
            assert json.loads(value(given, "--additional-config")) == {"atlas_rl": own}
    for flags, is_one in (
        (["--data-parallel-size", "2"], False),
        (["-dp", "2"], False),
        (["--data_parallel_size=1"], True),
        (["-dp=1"], True),
    ):
        assert ("--additional-config" in command(*flags)) == is_one, "replicas that wait run along with the others"
        given = command(*flags, idle_learning=True)
        assert json.loads(value(given, "--additional-config")) == {"atlas_rl": {"idle_learning": True}}, (
            "it will be said"
        )
    with pytest.raises(ValueError, match="give the static head once"):
        command("--additional-config", json.dumps({"atlas_rl": own}), draft_model=tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("vllm-serve", "which model? It comes first"),
        ("vllm-serve --port 8000 POLICY", "which model? It comes first"),
        ("vllm-serve POLICY --speculative_config {}", "--speculative-config is set by this command"),
        ("vllm-serve POLICY --speculative-config.method ngram", "--speculative-config is set by this command"),
        ("vllm-serve POLICY --worker-extension-cls a.B", "--worker-extension-cls is set by this command"),
        ('vllm-serve POLICY --weight-transfer-config {"backend":"nccl"}', "'nccl', which does not tell the drafters"),
        ("vllm-serve POLICY --weight-transfer-config nccl", "takes a JSON object such as"),
        ("vllm-serve POLICY --draft-model /no/such/folder", "there is no such folder"),
    ],
)
def test_what_is_wrong_is_said_before_vllm_starts(
    line: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.execve", lambda *arguments: pytest.fail(f"started {arguments}"))
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_head_is_said_before_vllm_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.execve", lambda *arguments: pytest.fail(f"started {arguments}"))
    for make, message in (
        (lambda: None, "config.json is missing"),
        (lambda: tiny_llama().save_pretrained(tmp_path), "holds a causal LM, no EAGLE-3 or DFlash head"),
    ):
        make()
        with pytest.raises(SystemExit):
            main(["vllm-serve", "POLICY", "--draft-model", str(tmp_path)])
        assert message in capsys.readouterr().err


def test_it_becomes_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr("os.execve", lambda *arguments: started.append(arguments))
    main(["vllm-serve", "POLICY", "--idle-learning", "on", "--enable-lora", "--max-lora-rank", "8"])
    path, line, environment = started[0]
    assert json.loads(value(line, "--additional-config")) == {"atlas_rl": {"idle_learning": True}}
    assert path == line[0]
    assert "POLICY" in line
    assert line[-3:] == ["--enable-lora", "--max-lora-rank", "8"]
    assert environment["VLLM_SERVER_DEV_MODE"] == environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


@cache
def vllm_parser() -> Any:
    from vllm.entrypoints.cli.serve import make_arg_parser  # imported there by every version, from different modules
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())


def read_by_vllm(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """What vLLM's own parser makes of the command that `atlas-rl vllm-serve ...` becomes."""
    started: list[Any] = []
    monkeypatch.setattr("os.execve", lambda *arguments: started.append(arguments))
    main(words)
    line = started[0][1]
    return vllm_parser().parse_args(
        line[line.index("serve") + 1 :] if "serve" in line else line[line.index("--model") :]
    )


@pytest.mark.parametrize("words", OF_PAGES)
def test_commands_of_the_pages_have_flags_that_vllm_knows(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read = read_by_vllm(words, monkeypatch)
    assert words[1] in (read.model_tag, read.model)


def test_a_flag_that_vllm_does_not_know_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(OF_PAGES) >= 5
    assert read_by_vllm(["vllm-serve", "POLICY", "--tensor-parallel-size", "4"], monkeypatch).tensor_parallel_size == 4
    with pytest.raises(SystemExit):
        read_by_vllm(["vllm-serve", "POLICY", "--tensor-paralel-size", "4"], monkeypatch)


def test_other_commands_still_refuse_unknown_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--port", "1"])
    assert "unrecognized arguments: --port 1" in capsys.readouterr().err
