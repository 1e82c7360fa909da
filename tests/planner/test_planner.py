"""The planner: what must hold whatever its constants, its table of published figures, and the command."""

import json
import math
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from atlas_rl.cli import main
from atlas_rl.planner.configs import CONFIGS
from atlas_rl.planner.drafters import drafter_model
from atlas_rl.planner.hardware import GPUS, MEASURED, Efficiency, Machine, gpu_named
from atlas_rl.planner.host import ENGINES, NO_HOST, Host, host_of
from atlas_rl.planner.model import load_model, parse_model
from atlas_rl.planner.plan import make_plan
from atlas_rl.planner.published import chain_length, published_rows
from atlas_rl.planner.roofline import Precision, forward
from atlas_rl.planner.speculation import accepted_length, best_draft_tokens, crossover_batch
from benchmarks.planner import fitted_hosts
from tests import ROOT
from tests.planner.configs import MIXTRAL, QWEN3_30B_A3B
from tests.planner.settings import setting

GEMMA_3_1B = {
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
EVERY = {name: CONFIGS[name] for name in ("Llama-3.1-8B", "DeepSeek-V3")} | {"Qwen3-30B-A3B": QWEN3_30B_A3B}
BATCHES = (1, 7, 64, 300)


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (CONFIGS["Llama-3.1-8B"], 8.03e9, 8.03e9),
        (CONFIGS["Llama-3.3-70B"], 70.6e9, 70.6e9),
        (CONFIGS["SmolLM2-135M"], 134.5e6, 134.5e6),
        (QWEN3_30B_A3B, 30.5e9, 3.3e9),
        (MIXTRAL, 46.7e9, 12.9e9),
        (CONFIGS["DeepSeek-V3"], 671e9, 37e9),
        (GEMMA_3_1B, 1.0e9, 1.0e9),
    ],
)
def test_parameters_are_those_of_the_model_cards(config, total, active):
    model = parse_model(config)
    assert model.params == pytest.approx(total, rel=0.02)
    assert model.active_params == pytest.approx(active, rel=0.02)


def test_cache_per_token():
    assert parse_model(CONFIGS["Llama-3.1-8B"]).cached_values(1) * 2 == 131_072  # 128 KiB in BF16, well known
    assert parse_model(CONFIGS["DeepSeek-V3"]).cached_values(1) == 61 * 576
    gemma = parse_model(GEMMA_3_1B)  # 4 global layers of 26
    assert gemma.cached_values(10_000) == 512 * (4 * 10_000 + 22 * 512)


def test_distinct_experts_go_from_those_of_one_token_to_all():
    model = parse_model(QWEN3_30B_A3B)
    assert model.distinct_experts(1) == pytest.approx(8)
    assert 8 < model.distinct_experts(2) < 16
    assert model.distinct_experts(1000) == pytest.approx(128, rel=1e-6)


def test_a_multimodal_config_gives_its_language_model():
    assert parse_model({"model_type": "gemma3", "text_config": GEMMA_3_1B}) == parse_model(GEMMA_3_1B)


@pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("batch", BATCHES)
def test_a_better_machine_is_never_slower(config, batch):
    base = setting(config, "h100", 2)
    gpu, reached = GPUS["h100"], MEASURED
    faster = [
        replace(base.machine, gpu=replace(gpu, bandwidth_bytes_per_s=2 * gpu.bandwidth_bytes_per_s)),
        replace(base.machine, gpu=replace(gpu, flops_per_s={k: 2 * v for k, v in gpu.flops_per_s.items()})),
        replace(base.machine, gpu=replace(gpu, link_bytes_per_s=2 * gpu.link_bytes_per_s)),
        replace(base.machine, efficiency=replace(reached, kernel_s=reached.kernel_s / 2)),
    ]
    for draft_tokens in (0, 3, 12):
        slow_s = base.round_s(batch, draft_tokens)
        assert all(replace(base, machine=machine).round_s(batch, draft_tokens) <= slow_s for machine in faster)


@pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)
def test_more_gpus_are_never_slower_where_communication_is_free(config):
    free = Efficiency(all_reduce_s=0.0, link_share=1e9)
    for batch in BATCHES:
        times_s = [setting(config, num_gpus=n, efficiency=free).round_s(batch, 3) for n in (1, 2, 4, 8, 16)]
        assert times_s == sorted(times_s, reverse=True)
    one, two = (setting(config, num_gpus=n).target_forward(1) for n in (1, 2))
    assert one.communication_s == 0 < two.communication_s


@pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)
def test_more_work_is_never_faster(config):
    base = setting(config)
    for batch in BATCHES:
        tokens_s = [base.target_forward(batch, tokens).total_s for tokens in range(1, 12)]
        assert tokens_s == sorted(tokens_s)
    assert base.target_forward(8).total_s < replace(base, context=8192).target_forward(8).total_s


@pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)
def test_narrower_weights_are_never_slower_nor_larger(config):
    wide = setting(config, "b200")
    for narrow in ("fp8", "fp4"):
        slim = replace(wide, precision=Precision(mlp=narrow, attention=narrow))
        assert slim.memory(1).weights_bytes < wide.memory(1).weights_bytes
        assert all(slim.round_s(batch, 3) <= wide.round_s(batch, 3) for batch in BATCHES)


def test_a_precision_without_matrix_units_saves_bytes_only():
    a100 = gpu_named("A100")
    assert a100.peak_flops_per_s("fp4") == a100.peak_flops_per_s("fp8") == a100.peak_flops_per_s("bf16")
    with pytest.raises(ValueError, match="no figure for fp32"):
        a100.peak_flops_per_s("fp32")


def test_accepted_length_is_the_geometric_sum():
    for accept in (0.0, 0.3, 0.9):
        for k in (0, 1, 7):
            assert accepted_length(accept, k) == pytest.approx((1 - accept ** (k + 1)) / (1 - accept))
            assert chain_length([accept] * k) == pytest.approx(accepted_length(accept, k))
    assert accepted_length(1.0, 4) == 5
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        accepted_length(1.2, 3)


@pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("drafter", ["eagle3", "recurrent", "ngram"])
def test_larger_acceptance_is_never_slower(config, drafter):
    base = setting(config, "b200", 8, drafter)
    for batch in BATCHES:
        best = []
        for accept in (0.0, 0.2, 0.5, 0.8, 0.95):
            k = best_draft_tokens(base, batch, accept, 8)
            best.append(base.tokens_per_s(batch, k, accepted_length(accept, k)))
        assert best == sorted(best)
        assert best[0] == pytest.approx(base.tokens_per_s(batch, 0, 1.0))  # nothing accepted: nothing drafted


def test_a_host_is_paid_per_round_that_drafts_and_per_request():
    alone = setting(CONFIGS["Llama-3.1-8B"])
    base = replace(alone, host=Host(round_s=1.0, request_s=0.1))
    assert base.round_s(4, 0) == alone.round_s(4, 0) == alone.target_forward(4).total_s  # plain decoding has none
    assert base.speedup(4, 0, 1.0) == 1.0
    for batch in BATCHES:
        assert base.round_s(batch, 3) == pytest.approx(alone.round_s(batch, 3) + 1.0 + 0.1 * batch)
    assert make_plan(base, batch=4, accept=0.7).host_s == pytest.approx(1.4)
    with pytest.raises(ValueError, match="--request-overhead-ms must be a number of at least 0, got -1"):
        Host(request_s=-1e-3)


def test_measured_host_times_replace_those_of_the_engine():
    vllm = ENGINES["vllm"]
    assert host_of("vllm") == vllm != ENGINES["sglang"]
    assert host_of("vllm", round_ms=0.5) == Host(round_s=5e-4, request_s=vllm.request_s)
    assert host_of("vllm", request_ms=0.0) == Host(round_s=vllm.round_s)
    assert host_of("none") == Host()


def test_a_free_drafter_takes_no_time_and_no_memory():
    free, head = (setting(CONFIGS["Llama-3.1-8B"], drafter=name) for name in ("ngram", "eagle3"))
    assert free.memory(1).drafter_bytes == 0 < head.memory(1).drafter_bytes
    assert free.round_s(1, 3) == free.target_forward(1, 4).total_s < head.round_s(1, 3)


def test_eagle3_head_has_the_size_of_the_published_one():
    head = drafter_model("eagle3", parse_model(CONFIGS["Llama-3.1-8B"]))
    assert head.params == pytest.approx(0.42e9, rel=0.05)  # fc 50M, attention 67M, MLP 176M, 32k vocabulary 131M


def test_crossover_is_where_the_best_length_becomes_zero():
    base = setting(CONFIGS["Llama-3.1-8B"], drafter="eagle3", context=64)
    found = crossover_batch(base, 0.4, 8) or 0  # 0: there is none, which no batch size may be
    assert found > 1
    assert best_draft_tokens(base, found, 0.4, 8) == 0 < best_draft_tokens(base, found - 1, 0.4, 8)
    assert crossover_batch(base, 0.0, 8) == 1
    assert crossover_batch(base, 0.4, 8, largest=found - 1) is None


def test_memory_adds_up():
    base = setting(CONFIGS["Llama-3.1-8B"])
    one, four = base.memory(1), base.memory(4)
    assert one.total_bytes == one.weights_bytes + one.cache_bytes + one.drafter_bytes
    assert one.weights_bytes == 2 * base.model.params
    assert four.cache_bytes == 4 * one.cache_bytes == 4 * 1024 * 131_072
    halves = replace(base, machine=replace(base.machine, num_gpus=2)).memory(1)
    assert halves.total_bytes == pytest.approx(one.total_bytes / 2)
    # A latent cache is on every GPU in full.
    latent = [setting(CONFIGS["DeepSeek-V3"], num_gpus=n).memory(1).cache_bytes for n in (1, 8)]
    assert latent[0] == latent[1]


def test_the_plan_says_how_large_a_batch_fits():
    base = setting(CONFIGS["Llama-3.1-8B"])
    largest = make_plan(base, batch=1, accept=0.7).max_batch
    assert base.memory(largest).fits
    assert not base.memory(largest + 1).fits
    with pytest.raises(ValueError, match=r"does not fit.*2 GPUs"):
        make_plan(base, batch=largest + 1, accept=0.7)


def test_a_forward_moves_at_least_the_active_weights():
    for config in EVERY.values():
        model = parse_model(config)
        one = forward(model, Precision(), Machine(gpu=GPUS["b200"]), batch=1, context=1)
        assert one.num_bytes >= 2 * (model.active_params - model.embedding_params)
        assert one.flops >= 2 * (model.active_params - model.embedding_params)
        assert one.roofline_s >= one.num_bytes / GPUS["b200"].bandwidth_bytes_per_s


def test_every_gpu_names_its_source():
    assert all(gpu.source.startswith("https://") and name == gpu.name for name, gpu in GPUS.items())
    assert {"a100", "h100", "h200", "b200", "gb200", "l40s"} <= set(GPUS)


def test_published_table_is_the_recorded_one():
    recorded = json.loads((ROOT / "benchmarks" / "results" / "planner.json").read_text())["rows"]
    computed = published_rows()
    assert len(recorded) == len(computed)
    for row, one in zip(recorded, computed, strict=True):
        assert (row["source"], row["published"], row["setting"]) == (one.source, one.published, one.describe())
        assert row["predicted"] == pytest.approx(one.predicted())
        assert row["ratio"] == pytest.approx(row["predicted"] / row["published"])


def test_published_table_is_met_as_well_as_the_docs_say():
    rows = published_rows()
    assert len({row.source for row in rows}) >= 6
    ratios = {row: row.predicted() / row.published for row in rows}
    plain = [ratio for row, ratio in ratios.items() if row.drafter is None and row.num_gpus == 1]
    assert len(plain) == 7
    assert statistics.median(abs(ratio - 1) for ratio in plain) < 0.1
    assert max(abs(ratio - 1) for ratio in plain) < 0.25
    alone = {row: row.predicted(NO_HOST) / row.published for row in rows}
    mtp = [row for row in rows if row.drafter == "mtp"]  # a device's speeds are off by one factor, their ratios are not
    base = next(ratio for row, ratio in alone.items() if row.source == mtp[0].source and row.drafter is None)
    assert all(alone[row] / base == pytest.approx(1, abs=0.15) for row in mtp)


def test_rows_that_calibrate_no_host_are_met_better_with_one():
    held_out = [row for row in published_rows() if row.is_held_out]
    assert len(held_out) == 17
    assert len({row.source for row in held_out}) >= 6

    def error(rows, *host):
        return statistics.median(abs(math.log(row.predicted(*host) / row.published)) for row in rows)

    assert error(held_out) < 0.1 < 0.3 < error(held_out, NO_HOST)
    drafting = [row for row in held_out if row.drafter is not None]
    assert error(drafting) < 0.1 < 0.3 < error(drafting, NO_HOST)


def test_hosts_are_those_fitted_to_the_calibrating_rows():
    fitted = fitted_hosts()
    assert list(fitted) == ["sglang", "vllm"]
    for engine, host in fitted.items():
        assert (host.round_s, host.request_s) == pytest.approx((ENGINES[engine].round_s, ENGINES[engine].request_s))


@pytest.fixture
def llama(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dict(CONFIGS["Llama-3.1-8B"])))
    return str(path)


def test_command(llama, capsys):
    command = ["plan", "--model", llama, "--gpu", "H100", "--batch", "2", "--context", "512", "--accept", "0.79"]
    main(command)
    text = capsys.readouterr().out
    assert "8.0B parameters" in text
    assert "best" in text
    assert "memory per GPU" in text
    main([*command, "--json", "--draft-tokens", "3"])
    result = json.loads(capsys.readouterr().out)
    assert result["chosen"] == 3
    assert result["lengths"][0]["speedup"] == 1.0
    assert result["lengths"][3]["accepted_length"] == pytest.approx(1 + 0.79 + 0.79**2 + 0.79**3)
    assert result["verify"]["total_s"] >= result["target"]["total_s"] > result["draft"]["total_s"] > 0
    main([*command, "--drafter", "ngram", "--json"])
    assert json.loads(capsys.readouterr().out)["draft"] is None
    main([*command, "--drafter", "draft-lm", "--draft-model", str(Path(llama).parent)])
    assert "No speculation" in capsys.readouterr().out  # a draft as large as its target


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--gpu", "h1000"], "known are a100, h100"),
        (["--gpus", "0"], "--gpus must be at least 1, got 0"),
        (["--model", "nowhere"], "give a config.json"),
        (["--accept", "1.5"], "--accept must be from 0 to 1, got 1.5\n"),
        (["--accept", "80"], "--accept must be from 0 to 1, got 80: 80 % is 0.8"),
        (["--accept", "nan"], "--accept must be from 0 to 1, got nan"),
        (["--batch", "100000"], "does not fit"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--context", "-4"], "--context must be at least 1, got -4"),
        (["--max-draft-tokens", "0"], "--max-draft-tokens must be at least 1, got 0"),
        (["--drafter", "medusa"], "known are eagle3"),
        (["--drafter", "mtp"], "no layer for multi-token prediction"),
        (["--drafter", "draft-lm"], "--draft-model"),
        (["--draft-tokens", "99"], "from 0 to 16"),
        (["--round-overhead-ms", "-1"], "--round-overhead-ms must be a number of at least 0, got -1"),
        (["--request-overhead-ms", "-1"], "--request-overhead-ms must be a number of at least 0, got -1"),
        (["--engine", "trt"], "unknown engine 'trt': known are typical, sglang, vllm"),
        (["--round-overhead-ms", "nan"], "--round-overhead-ms must be a number of at least 0, got nan"),
    ],
)
def test_command_says_what_is_wrong(llama, capsys, wrong, message):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--model", llama, "--gpu", "h100", "--accept", "0.8", *wrong])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no field 'model_type'"),
        ('{"model_type": "mamba"}', "unknown architecture 'mamba'.*knows llama"),
        ('{"model_type": "llama", "hidden_size": 8}', "no field 'num_attention_heads'"),
        ("[]", "not a JSON object"),
        ("{", "not JSON"),
    ],
)
def test_bad_configs_are_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_model_of_the_hub_cache_is_found_by_name(tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "models--org--name" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MIXTRAL))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert load_model("org/name") == parse_model(MIXTRAL)


def test_command_needs_neither_torch_nor_transformers(llama):
    code = (
        "import sys; from atlas_rl.cli import main\n"
        f"main(['plan', '--model', {llama!r}, '--gpu', 'h100', '--accept', '0.8'])\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
