"""`atlas-rl train-speculator`: everything that can be wrong is found before the policy is loaded, and named by its line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from atlas_rl import AtlasRolloutEngine, progress
from atlas_rl.cli import main
from atlas_rl.policy.view import InProcessView
from atlas_rl.replay.record import Recorded
from atlas_rl.speculators.dflash.checkpoint import load_dflash
from atlas_rl.speculators.eagle3.checkpoint import load_eagle3
from tests.models import FACTORIES, tiny_bigram, tiny_llama
from tests.train_command import NUM_WORDS, command, refused, save_policy, write_prompts


@pytest.fixture
def policy(tmp_path):
    return save_policy(tmp_path / "policy", tiny_bigram(layers=4, seed=11))


@pytest.fixture
def nothing_loads(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the policy was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)


OPTIONS = {
    "layer 99": (["--layers", "1", "99"], "--layers names layer 99: the policy has 4"),
    "layer -1": (["--layers", "-1"], "--layers names layer -1"),
    "a layer twice": (["--layers", "1", "1"], "--layers names a layer twice"),
    "no epochs": (["--epochs", "0"], "--epochs must be at least 1"),
    "no width": (["--intermediate-size", "0"], "--intermediate-size must be at least 1"),
    "temperature": (["--temperature", "-1"], "--temperature must be"),
    "temperature nan": (["--temperature", "nan"], "--temperature must be"),
    "learning rate": (["--learning-rate", "0"], "--learning-rate must be"),
    "seed": (["--seed", "-1"], "--seed must be"),
    "too few prompts": (["--generate-batch", "8"], "too few prompts: 8 make one call of --generate-batch 8"),
    "no model": (
        ["--model", "nowhere"],
        "no checkpoint in 'nowhere': there is no such folder, and names of the hub are not looked up. Give a folder",
    ),
    "no data": (["--data", "nowhere.jsonl"], "no prompts at 'nowhere.jsonl'"),
}


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("case", OPTIONS)
def test_options_are_checked_first(policy, tmp_path, capsys, case):
    options, message = OPTIONS[case]
    assert message in refused(capsys, command(policy, tmp_path, *options))
    assert not (tmp_path / "head").exists()


def test_a_lost_continuation_is_made_again_under_its_number(policy, tmp_path):
    main(command(policy, tmp_path))
    files = sorted((tmp_path / "head" / "work" / "rollouts").glob("call_*.safetensors"))
    texts = [Recorded.load(file).sequences.token_ids for file in files]
    assert len(files) == 4
    files[1].unlink()
    main(command(policy, tmp_path))
    assert sorted(files[0].parent.glob("call_*.safetensors")) == files
    for file, text in zip(files, texts, strict=True):
        assert np.array_equal(Recorded.load(file).sequences.token_ids, text)


GOOD = '{"prompt": "w1 w2"}\n'
FILES = {
    "an array": ("a.json", json.dumps([{"prompt": "w1"}, {"prompt": "w2"}]), "is a file of the type '.json'"),
    "a table": ("a.csv", "prompt\nw1\n", "is a file of the type '.csv'"),
    "no type": ("a", "w1\n", "is a file of the type ''"),
    "an array in lines": ("a.jsonl", '[{"prompt": "w1"}]\n', "line 1: not a JSON object with a field `prompt`"),
    "no JSON": ("a.jsonl", GOOD + "\n\n" + "w1\n", "line 4: not a JSON object"),
    "no prompt": ("a.jsonl", GOOD + '{"text": "w1"}\n', "line 2: not a JSON object with a field `prompt`"),
    "a number": ("a.jsonl", GOOD + '{"prompt": 3}\n', "line 2: a prompt is a text or a list of messages"),
    "null": ("a.jsonl", GOOD + '{"prompt": null}\n', "line 2: a prompt is a text"),
    "no messages": ("a.jsonl", GOOD + '{"prompt": []}\n', "line 2: a prompt is a text or a list of messages"),
    "odd messages": ("a.jsonl", GOOD + '{"prompt": [{"text": "w1"}]}\n', "line 2: a prompt is a text or a list of"),
    "messages, no template": (
        "a.jsonl", GOOD + '{"prompt": [{"role": "user", "content": "w1"}]}\n', "line 2: the tokenizer has no chat template"
    ),
    "an empty prompt": ("a.jsonl", GOOD + GOOD + '{"prompt": ""}\n', "line 3: the prompt has no tokens"),
    "a long prompt": ("a.txt", "w1\n\n" + "w1 " * 129, "line 3: the prompt has 129 tokens, more than the policy's"),
    "nothing": ("a.txt", "\n \n", "holds no prompts"),
    "one prompt": ("a.txt", "w1\n", "too few prompts: 1"),
    "no UTF-8": ("a.txt", b"w1\xff\n", "is not UTF-8"),
}  # fmt: skip


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("case", FILES)
def test_prompts_are_checked_by_line(policy, tmp_path, capsys, case):
    name, text, message = FILES[case]
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refused(capsys, command(policy, tmp_path, data=path))


@pytest.mark.usefixtures("nothing_loads")
def test_tokens_outside_the_vocabulary_are_named_by_line(tmp_path, capsys):
    policy = save_policy(tmp_path / "policy", tiny_llama(vocab=60))
    path = tmp_path / "a.txt"
    path.write_text("w1\nw2\nw61\n")
    line = refused(capsys, command(policy, tmp_path, data=path))
    assert "line 3: the tokenizer gives token 61, outside the policy's vocabulary of 60" in line


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("template", ["{{ raise_exception('no user here') }}", "{% if %}", "{{ messages[7].content }}"])
def test_a_chat_template_that_raises_is_named_by_line(tmp_path, capsys, template):
    policy = save_policy(tmp_path / "policy", tiny_llama(), template)
    assert "line 1: the chat template refuses the prompt" in refused(capsys, command(policy, tmp_path))


@pytest.mark.usefixtures("nothing_loads")
def test_datasets_are_checked(policy, tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["w1"]}).save_to_disk(tmp_path / "text")
    assert "has no column `prompt`, only text" in refused(capsys, command(policy, tmp_path, data=tmp_path / "text"))
    rows = datasets.Dataset.from_dict({"prompt": ["w1", ""]})
    rows.save_to_disk(tmp_path / "rows")
    assert "row 1: the prompt has no tokens" in refused(capsys, command(policy, tmp_path, data=tmp_path / "rows"))
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    assert "splits train" in refused(capsys, command(policy, tmp_path, data=tmp_path / "splits"))
    assert "no folder saved" in refused(capsys, command(policy, tmp_path, data=tmp_path)).replace("that datasets", "")


@pytest.mark.usefixtures("nothing_loads")
def test_the_output_is_checked(policy, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in refused(capsys, command(policy, tmp_path, "--output", tmp_path / "file"))
    assert "cannot be written to" in refused(capsys, command(policy, tmp_path, "--output", tmp_path / "file" / "below"))
    assert "cannot be written to" in refused(capsys, command(policy, tmp_path, "--work", tmp_path / "file"))
    assert "a causal LM, which the head would overwrite" in refused(
        capsys, command(policy, tmp_path, "--output", policy)
    )


@pytest.mark.usefixtures("nothing_loads")
def test_a_head_is_no_policy(policy, tmp_path, capsys):
    config = {"speculators_model_type": "eagle3", "draft_vocab_size": 8}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    assert "holds an EAGLE-3 head, no causal LM" in refused(capsys, command(tmp_path / "other", tmp_path))


def trained(tmp_path, model, *options, data=None):
    folder = save_policy(tmp_path / "policy", model)
    main(command(folder, tmp_path, *options, data=data))
    head = load_eagle3(tmp_path / "head", InProcessView(model))
    log = json.loads((tmp_path / "head" / "training.json").read_text())
    return head, log


# For Qwen 2, transformers takes Qwen's own tokenizer class whatever was saved: it makes nothing of these words.
@pytest.mark.parametrize("family", sorted(FACTORIES.keys() - {"qwen2"}))
@pytest.mark.parametrize("layers", [1, 2])
def test_policies_of_one_and_two_layers(tmp_path, family, layers):
    head, log = trained(tmp_path, FACTORIES[family](layers=layers))
    assert head.config.layers == tuple(range(layers))
    assert 0 <= log["epochs"][0]["acceptance"][0] <= 1


@pytest.mark.parametrize("shown", [True, False])
def test_bars_move_on_a_terminal_alone_and_results_are_lines_everywhere(shown, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "shown", lambda: shown)
    trained(tmp_path, tiny_llama())
    captured = capsys.readouterr()
    for bar in ("continuations: ", "epoch 1/1: "):
        assert (bar in captured.err) == shown
    assert "continuations 4/4 | " in captured.out
    assert "epoch 1/1 | loss" in captured.out


@pytest.mark.parametrize("prompt", ["w1", "w1 w2"])
def test_completions_of_one_token(tmp_path, capsys, prompt):
    data = tmp_path / "a.txt"
    data.write_text(f"{prompt}\n" * 8)
    if prompt == "w1":  # the head predicts from the third position on, and there is none
        policy = save_policy(tmp_path / "policy", tiny_llama())
        line = refused(capsys, command(policy, tmp_path, "--max-new-tokens", 1, data=data))
        assert "raise --max-new-tokens" in line
    else:
        _, log = trained(tmp_path, tiny_llama(), "--max-new-tokens", 1, data=data)
        assert log["epochs"][0]["acceptance"][0] is not None
        assert log["epochs"][0]["acceptance"][1] is None


def test_completions_that_end_at_once(tmp_path, capsys):
    """The policy ends every completion of a one-token prompt with its first token: said when it is known, in one line."""
    model = tiny_llama()
    model.generation_config.eos_token_id = list(range(64))
    policy = save_policy(tmp_path / "policy", model)
    data = tmp_path / "a.txt"
    data.write_text("w1\nw2\nw3\nw4\n")
    with pytest.raises(SystemExit):
        main(command(policy, tmp_path, data=data))
    assert "no completion reaches the third position" in capsys.readouterr().err


def test_work_of_other_prompts_is_not_taken_for_these(policy, tmp_path, capsys):
    main(command(policy, tmp_path))
    main(command(policy, tmp_path))
    capsys.readouterr()
    other = write_prompts(tmp_path / "other.jsonl", num=6)
    assert "made with other prompts" in refused(capsys, command(policy, tmp_path, data=other))
    assert "made with other temperature" in refused(capsys, command(policy, tmp_path, "--temperature", 0.5))
    assert "made with other layers" in refused(capsys, command(policy, tmp_path, "--layers", 1, 2))
    assert Path(tmp_path / "head" / "model.safetensors").is_file()


def test_lines_are_those_of_the_file_whatever_is_in_a_string(policy, tmp_path, capsys):
    data = tmp_path / "a.jsonl"
    data.write_text('{"prompt": "w1 \u2028 w2"}\r\n\r\n{"prompt": "w1"}\r\nbad\r\n', encoding="utf-8", newline="")
    assert "line 4: not a JSON object" in refused(capsys, command(policy, tmp_path, data=data))


DFLASH = [
    "--kind", "dflash", "--max-new-tokens", "6", "--generate-batch", "2", "--epochs", "1", "--num-layers", "1",
    "--block-size", "3",
]  # fmt: skip


def dflash_command(policy, tmp_path, *options):
    data = write_prompts(tmp_path / "prompts.jsonl")
    given = ["--model", str(policy), "--data", str(data), "--output", str(tmp_path / "head")]
    return ["train-speculator", *given, *DFLASH, *map(str, options)]


def test_a_dflash_head_is_trained_and_drafts(policy, tmp_path, capsys):
    main(dflash_command(policy, tmp_path, "--mask-token-id", 62))
    assert "written" in capsys.readouterr().out
    model = tiny_bigram(layers=4, seed=11)
    config = load_dflash(tmp_path / "head", InProcessView(model)).config
    assert (config.block_size, config.mask_token_id, len(config.spans)) == (3, 62, 1)
    engine = AtlasRolloutEngine(model=model, draft_model=tmp_path / "head", console=False)
    assert engine.generate([[5, 9], [7]], max_new_tokens=8, eos_token_ids=[]).report.drafter_faults == {}
    main(dflash_command(policy, tmp_path, "--mask-token-id", 62))  # over its own output, from what it left
    assert "continuations" not in capsys.readouterr().out


DFLASH_OPTIONS = {
    "no mask token": ([], "name a token that texts hardly contain, --mask-token-id"),
    "a mask token outside": (
        ["--mask-token-id", "64"],
        "--mask-token-id must be one of the policy's 64 tokens, got 64",
    ),
    "a block of one": (["--mask-token-id", "62", "--block-size", "1"], "--block-size must be at least 2"),
    "layer 0": (["--mask-token-id", "62", "--layers", "0", "1"], "--layers names layer 0: a DFlash head reads inputs"),
    "unrolling": (["--unroll", "2"], "--unroll is for --kind eagle3, and this is --kind dflash"),
}


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("case", DFLASH_OPTIONS)
def test_options_of_dflash_are_checked_first(policy, tmp_path, capsys, case):
    options, message = DFLASH_OPTIONS[case]
    assert message in refused(capsys, dflash_command(policy, tmp_path, *options))
    assert "--block-size is for --kind dflash" in refused(capsys, command(policy, tmp_path, "--block-size", 4))


def test_a_policy_of_one_layer_has_nothing_between_layers_to_read(tmp_path, capsys):
    one = save_policy(tmp_path / "one", tiny_llama(layers=1))
    assert "this policy has one layer" in refused(capsys, dflash_command(one, tmp_path, "--mask-token-id", 62))


def test_an_unused_token_or_the_padding_token_marks_positions(tmp_path, capsys):
    folder = save_policy(tmp_path / "policy", tiny_bigram(layers=4, vocab=70, seed=11))
    main(dflash_command(folder, tmp_path))
    assert json.loads((tmp_path / "head" / "config.json").read_text())["dflash_config"]["mask_token_id"] == NUM_WORDS
