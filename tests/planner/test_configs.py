"""Configs with null fields, numbers as text and the like: counted right, or one line that names the field."""

from __future__ import annotations

import json

import pytest

from atlas_rl.cli import main
from atlas_rl.planner.configs import CONFIGS
from atlas_rl.planner.host import ENGINES
from atlas_rl.planner.model import parse_model
from tests.planner.configs import MIXTRAL

DEEPSEEK = CONFIGS["DeepSeek-V3"]
LLAMA_8B = CONFIGS["Llama-3.1-8B"]


@pytest.mark.parametrize(
    ("config", "nulls"),
    [
        (LLAMA_8B, ["text_config", "head_dim", "sliding_window", "layer_types", "use_sliding_window", "num_experts"]),
        (MIXTRAL, ["head_dim", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers", "text_config"]),
        (DEEPSEEK, ["text_config", "tie_word_embeddings"]),
    ],
)
def test_a_field_that_is_null_counts_as_absent(config, nulls):
    bare = {name: value for name, value in config.items() if name not in nulls}
    assert parse_model(config | dict.fromkeys(nulls)) == parse_model(bare)


def test_queries_without_a_latent_come_from_the_hidden_state():
    """DeepSeek-V3's architecture with `q_lora_rank: null`, as Moonlight-16B has it."""
    with_latent, without = parse_model(DEEPSEEK), parse_model({**DEEPSEEK, "q_lora_rank": None})
    hidden, per_query, rank = 7168, 128 * (128 + 64), 1536
    saved = hidden * per_query - (hidden * rank + rank * per_query)
    assert without.attention_params - with_latent.attention_params == saved


def test_a_mixture_without_dense_layers_needs_no_dense_width():
    config = {name: value for name, value in DEEPSEEK.items() if name != "intermediate_size"}
    model = parse_model({**config, "first_k_dense_replace": 0, "intermediate_size": None, "n_shared_experts": None})
    assert model.num_dense_layers == 0
    with pytest.raises(ValueError, match=r"no field 'intermediate_size' \(it is null\)"):
        parse_model({**config, "intermediate_size": None})


@pytest.mark.parametrize("value", ["4096", 4096.5, True, -1, 0, [4096], float("nan")])
@pytest.mark.parametrize(
    ("name", "field"),
    [("Llama-3.1-8B", "hidden_size"), ("Llama-3.1-8B", "num_key_value_heads"), ("DeepSeek-V3", "kv_lora_rank")],
)
def test_a_field_that_is_no_number_is_one_line(tmp_path, capsys, name, field, value):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS[name], field: value}))
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--model", str(tmp_path), "--gpu", "h100", "--gpus", "8", "--accept", "0.8"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"the config's field '{field}' must be a whole number of at least 1, got" in error


@pytest.mark.parametrize("config", [LLAMA_8B, MIXTRAL, DEEPSEEK, CONFIGS["Qwen3-8B"]])
@pytest.mark.parametrize("value", [None, "7", 0, -3, 2.5, [], {}, False])
def test_no_field_of_any_value_ends_in_a_traceback(config, value):
    for field in (*config, "text_config", "sliding_window", "layer_types", "head_dim"):
        try:
            parse_model({**config, field: value})
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("model", "name"), [("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"), ("/nowhere", "OWNER/NAME"), ("a/config.json", "OWNER/NAME")]
)
def test_a_model_that_is_not_here_comes_with_the_command_that_brings_it(model, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["plan", "--model", model, "--gpu", "h100", "--accept", "0.8"])
    assert f"(`hf download {name} config.json` puts it there)" in capsys.readouterr().err


def test_the_help_names_every_engine(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    shown = "".join(capsys.readouterr().out.split())
    assert "".join(f"{', '.join(list(ENGINES)[:-1])}, or {list(ENGINES)[-1]}".split()) in shown
