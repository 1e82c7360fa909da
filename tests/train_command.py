"""The command `atlas-rl train-speculator` on tiny policies that are saved with a tokenizer of numbered words."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from atlas_rl.cli import main

NUM_WORDS = 64


def save_policy(folder, model, template=None):
    words = {f"w{n}": n for n in range(NUM_WORDS - 1)} | {"[eos]": NUM_WORDS - 1}
    plain = Tokenizer(WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="[eos]")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def write_prompts(path, num=8):
    path.write_text("".join(json.dumps({"prompt": f"w{n} w{n + 1} w{n + 2}"}) + "\n" for n in range(num)))
    return path


def command(policy, tmp_path, *options, data=None):
    data = write_prompts(tmp_path / "prompts.jsonl") if data is None else data
    small = [
        "--max-new-tokens",
        "6",
        "--generate-batch",
        "2",
        "--draft-vocab-size",
        "40",
        "--epochs",
        "1",
        "--unroll",
        "2",
    ]
    given = ["--model", str(policy), "--data", str(data), "--output", str(tmp_path / "head")]
    return ["train-speculator", *given, *small, *map(str, options)]


def refused(capsys, arguments):
    """The one line on stderr of a command that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert "continuations" not in captured.out
    lines = [line for line in captured.err.splitlines() if line.startswith("atlas-rl")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]
