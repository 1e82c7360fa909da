"""`atlas-rl grpo`: TRL's options and YAML files, with the engine attached."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from atlas_rl import AtlasRolloutEngine
from atlas_rl.cli import main
from atlas_rl.config import EngineConfig
from atlas_rl.docstrings import entries
from atlas_rl.integrations.trl.script import engine_arguments, make_parser, trl_script
from tests.models import tiny_llama
from tests.trainers import WORDS, script_options, with_special_tokens, word_tokenizer


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy, a dataset and `run.yaml`."""
    folder = tmp_path_factory.mktemp("run")
    with_special_tokens(tiny_llama(vocab=len(WORDS))).save_pretrained(folder / "policy")
    word_tokenizer().save_pretrained(folder / "policy")
    own = {"max_steps": 2, "learning_rate": "1e-3", "baseline_every": 1, "env": {"ATLAS_RL_TEST_OF_ENV": 1}}
    config = script_options(folder / "policy", folder / "out", **own)
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(autouse=True)
def _env_is_put_back(monkeypatch: pytest.MonkeyPatch, accelerate_anew: None) -> None:
    monkeypatch.setenv("ATLAS_RL_TEST_OF_ENV", "0")


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]


def test_two_steps_are_generated_by_the_engine(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["grpo", "--config", str(run_folder / "run.yaml"), "--audit_share", "0.5", "--no_console"])
    reports = lines_of(run_folder / "out")
    assert [report["step"] for report in reports] == [0, 1]
    assert all(report["drafted"] for report in reports), "drafters were asked"
    assert all(report["baseline_tokens_per_s"] for report in reports), "baseline_every of the YAML file"
    assert all(report["num_audited_tokens"] for report in reports), "audit_share of the command line"
    printed = capsys.readouterr().out
    assert "atlas step" not in printed
    assert f"atlas-rl report {run_folder / 'out'}" in printed
    assert (run_folder / "out" / "model.safetensors").is_file(), "the rest is TRL's script"
    assert os.environ["ATLAS_RL_TEST_OF_ENV"] == "1"


def test_trl_generates_on_demand(run_folder: Path, tmp_path: Path) -> None:
    main(["grpo", f"--config={run_folder / 'run.yaml'}", "--engine", "trl", "--output_dir", str(tmp_path)])
    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / "rollouts.jsonl").exists()


REFUSED = {
    "a typo in a key": ({"draft_modl": "fp4"}, [], "run.yaml: no option 'draft_modl'; did you mean 'draft_model'?"),
    "a typo of TRL's": ({"lerning_rate": 1}, [], "did you mean 'learning_rate'"),
    "a typo in a flag": ({}, ["--baselin-every", "1"], "the command line: no option 'baselin-every'; did you mean"),
    "a typo in a negation": ({}, ["--no_speculaton"], "did you mean 'no_speculation'"),
    "a shortened flag": ({}, ["--draft_mod=fp4"], "did you mean 'draft_model'"),
    "a typo of --config": ({}, ["--confg", "run.yaml"], "no option 'confg'; did you mean 'config'"),
    "a loose word": ({}, ["fp4"], "'fp4' belongs to no option"),
    "accelerate's": ({"num_processes": 2}, [], "accelerate launch --num_processes ... -m atlas_rl grpo"),
    "a value of ours": ({"backend": "cuda"}, [], "backend must be 'auto', 'in_process' or 'vllm', got 'cuda'"),
    "a number of ours": ({}, ["--baseline_every=-1"], "baseline_every must be a whole number of at least 0"),
    "a value that is no number": ({}, ["--audit_share", "few"], "argument --audit_share/--audit-share: invalid float"),
    "a typo before what TRL's classes refuse": ({"bf16": True}, ["--lerning_rate=1"], "did you mean 'learning_rate'"),
    "no policy": ({"model_name_or_path": None}, [], "model_name_or_path is missing"),
    "no data": ({"dataset_name": None}, [], "dataset_name is missing"),
    "no rewards": ({"reward_funcs": None}, [], "reward_funcs is missing"),
    "env that is no mapping": ({"env": "A=1"}, [], "env must be a mapping"),
    "env with a name that is none": ({"env": {"A=B": 1}}, [], "'A=B', which is no name of an environment variable"),
    "env with a number for a name": ({"env": {1: 1}}, [], "1, which is no name of an environment variable"),
    "another engine": ({"engine": "vllm"}, [], "engine must be one of atlas, trl, and the YAML file has 'vllm'"),
    "a choice of TRL's": ({"dtype": "int3"}, [], "dtype must be one of auto, bfloat16"),
    "a bare no": ({"save_strategy": False}, [], "put it in quotes"),
    "two files": ({}, ["--config", "other.yaml"], "--config is given twice"),
    "a lone dash": ({}, ["--", "x"], "belongs to no option"),
    "help in the file": ({"help": True}, [], "run.yaml: no option 'help'"),
    "a policy that is not there": ({"model_name_or_path": "/nowhere/policy"}, [], "there is no '/nowhere/policy'"),
    "a policy that is a number": ({"model_name_or_path": 5}, [], "must be a folder or a name on the hub, got 5"),
    "a dataset that the hub does not give": ({"dataset_name": "nods"}, [], "dataset_name: 'nods' is no folder of this"),
    "data that are not there": ({"dataset_name": "./no/data"}, [], "dataset_name: there is no './no/data'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed, arguments, message = REFUSED[case]
    check_refused(run_folder, tmp_path, capsys, changed, arguments, message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes bfloat16")
def test_bfloat16_without_a_gpu_is_told_whose_choice_it_was(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"bf16": None, "use_cpu": None}
    check_refused(
        run_folder, tmp_path, capsys, asked, [], "grpo: add `bf16: false` (or --bf16 false) to train in float32"
    )


def check_refused(
    run_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, Any],
    arguments: list[str],
    message: str,
) -> None:
    config = yaml.safe_load((run_folder / "run.yaml").read_text()) | {"output_dir": str(tmp_path / "out")} | changed
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({name: each for name, each in config.items() if each is not None})
    )
    with pytest.raises(SystemExit) as ended:
        main(["grpo", "--config", str(tmp_path / "run.yaml"), *arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in said
    assert said.count("\n") == 1
    assert len(said) < 600
    assert not (tmp_path / "out").exists(), "nothing was done"


def test_an_error_of_the_training_keeps_its_traceback(run_folder: Path, tmp_path: Path) -> None:
    config = str(run_folder / "run.yaml")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        main(["grpo", "--config", config, "--output_dir", str(tmp_path), "--reward_funcs", "no_such_module.reward"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--generation_kwargs", '{"num_beams": 2}'], "num_beams"),
    ],
)
def test_options_that_the_engine_refuses_end_in_one_line(
    arguments: list[str], message: str, run_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["grpo", "--config", str(run_folder / "run.yaml"), "--output_dir", str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("atlas-rl grpo: ")
    assert message in last


def test_a_negation_has_a_help_of_its_own() -> None:
    actions = make_parser(trl_script(), AtlasRolloutEngine)._actions
    ours = set(EngineConfig.__dataclass_fields__)
    helps = {flag: each.help for each in actions if each.dest in ours for flag in each.option_strings}
    negated = {flag for flag in helps if flag.startswith("--no_")}
    assert {"--no_console", "--no_speculation", "--no_spare_importance_sampling"} == negated
    assert helps["--no_console"] == "Do not print one line per report."
    assert all(helps[flag] != helps[flag.replace("--no_", "--")] for flag in negated)


FILES = {
    "no file is named": ([], "--config needs a YAML file"),
    "no such file": (["nowhere.yaml"], "nowhere.yaml"),
    "no YAML": (["broken.yaml"], "broken.yaml is no YAML"),
    "no mapping": (["list.yaml"], "must hold a YAML mapping"),
    "an option twice": (["twice.yaml"], "twice.yaml has 'max_steps' twice"),
    "a part of an option twice": (["deep.yaml"], "deep.yaml has 'top_k' twice"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_cannot_be_read(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text("a: [1\nb: 2")
    Path("list.yaml").write_text("- a\n- b\n")
    Path("twice.yaml").write_text("max_steps: 1\nseed: 0\nmax_steps: 2\n")
    Path("deep.yaml").write_text("generation_kwargs: {top_k: 1, top_k: 2}\n")
    arguments, message = FILES[case]
    with pytest.raises(SystemExit):
        main(["grpo", "--config", *arguments])
    assert message in capsys.readouterr().err


def test_help_is_the_configurations_own() -> None:
    # argparse breaks lines at spaces and at hyphens
    shown = "".join(make_parser(trl_script(), AtlasRolloutEngine).format_help().split())
    helps = entries(EngineConfig, "Attributes") | entries(AtlasRolloutEngine.attach, "Args")
    for name in ("draft_model", "backend", "audit_share", "max_batch_size", "trace", "baseline_every"):
        assert "".join(helps[name].split()) in shown
    assert "--per_device_train_batch_size" in shown


def test_every_plain_option_can_be_given() -> None:
    objects = {"speculators", "controller", "clock"}
    made = set(engine_arguments(AtlasRolloutEngine).__dataclass_fields__) - {"engine", "baseline_every"}
    assert made == set(EngineConfig.__dataclass_fields__) - objects - {"output_dir"}
