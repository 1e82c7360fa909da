"""What a decode step may cost the host: waits, launches, compilations and copies, on a pretended GPU."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from atlas_kernels.draft_head import draft_head
from atlas_kernels.head_call import DraftHeadWeights
from atlas_kernels.layer import rms_norm, rotate, store
from atlas_kernels.verify import verify
from atlas_rl.policy.base import Segments
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.vllm.draw import draw
from tests.gpu.counts import STEP, counts_of, sectioned
from tests.gpu.engines import ARMS, DEPTH, SAMPLINGS, autocast, engine_of, generate, policy
from tests.models import tiny_llama, tiny_qwen3
from tests.pretend_cuda import WAITS, PretendCuda

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("probed_once")


@cache
def counts_with(arm, sampling="sampled"):
    return counts_of(arm, max_new_tokens=6, **SAMPLINGS[sampling])


# Waits of the host per step: the upload, the download and the clock's; a drafter that draws token by token adds its own.
WAITS_OF = {"plain": 3, "history": 3, "recurrent": 3, "eagle3": 3 + DEPTH, "draft_lm": 3 + DEPTH, "fp4_self": 3 + DEPTH}


def launches_of_a_forward(model):
    with PretendCuda() as device, sectioned(device):
        engine = engine_of(device.move(model))
        generate(engine, 1, max_new_tokens=3, eos_token_ids=())
        device.events.clear()
        device.entered.clear()
        generate(engine, 1, max_new_tokens=5, eos_token_ids=())
        return device.count("launch", "triton", section="target") / device.entered["target"]


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3])
def test_launches_of_a_layer(make):
    """Seven are products, one is attention. As transformers writes a layer of Llama, there are some 58."""
    few, many = (launches_of_a_forward(make(vocab=128, layers=layers).bfloat16()) for layers in (1, 2))
    assert many - few <= 20


def test_launches_of_a_layer_under_autocast():
    few, many = (launches_of_a_forward(autocast(tiny_llama(vocab=128, layers=layers))) for layers in (1, 2))
    assert many - few <= 20


# Launches per step beside the target's forward.
LAUNCHES_CAPTURED = {"sampled": 11, "truncated": 15}  # of them one for the draft; the others keep states for the head
LAUNCHES_OF = {"plain": 40, "history": 40, "recurrent": 40, "eagle3": 150, "draft_lm": 400, "fp4_self": 400}
CASES = [
    ("plain", "sampled"),
    ("plain", "truncated"),
    ("plain", "penalty"),
    ("history", "sampled"),
    ("recurrent", "sampled"),
    ("recurrent", "truncated"),
    ("eagle3", "greedy"),
    ("eagle3", "sampled"),
    ("eagle3", "truncated"),
    ("draft_lm", "greedy"),
    ("draft_lm", "sampled"),
    ("draft_lm", "truncated"),
    ("draft_lm", "penalty"),
    ("fp4_self", "sampled"),
]


@pytest.mark.parametrize(("arm", "sampling"), CASES)
def test_waits_and_launches_of_a_step(arm, sampling):
    counts = counts_with(arm, sampling)
    assert counts.waits <= WAITS_OF[arm], counts.table
    assert counts.beside <= LAUNCHES_OF[arm]


@pytest.mark.parametrize("sampling", ["sampled", "truncated"])
def test_launches_of_a_step_whose_draft_is_captured(sampling):
    """Of one shape the first two drafts of the call are not, nor are those near the end, which are shorter.

    Verification is part of the captured step unless logits are truncated first: tests/gpu/test_captured_verification.py.
    """
    options = {"max_new_tokens": 24, "verification": "invariant", **SAMPLINGS[sampling]}
    plain, captured = counts_of("recurrent", **options), counts_of("recurrent", graphs=True, **options)
    assert captured.beside <= LAUNCHES_CAPTURED[sampling]
    assert captured.beside < plain.beside - 5
    assert captured.waits <= plain.waits


def test_the_recorded_counts_are_within_the_budgets():
    """Of every arm, form of sampling and form of verification."""
    recorded = json.loads((ROOT / "benchmarks" / "results" / "gpu_emulated.json").read_text())
    rows = {row["path"]: row for row in recorded["rows"]}
    assert set(rows) == {f"{arm}, {path}" for arm in ARMS for path in (*SAMPLINGS, "rejection")}
    for path, row in rows.items():
        arm = path.partition(",")[0]
        assert row["waits_per_step"] <= WAITS_OF[arm], path
        assert row["launches_beside_target_per_step"] <= LAUNCHES_OF[arm], path


def test_attention_is_planned_once_per_run():
    assert counts_with("plain").num_plans <= 1


def test_attention_without_cudnn_plans_nothing():
    """What the emulation takes for the remedy."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        assert counts_of("plain", max_new_tokens=4).num_plans == 0


def test_the_cache_holds_what_autocast_computes_in(cuda):
    generate(engine_of(cuda.move(autocast(policy()))), max_new_tokens=4)
    assert not [event for event in cuda.of("launch", section=STEP) if event.what == "sdpa autocast"]


def test_weights_are_not_cast_in_every_forward(cuda):
    engine = engine_of(cuda.move(autocast(policy())))
    generate(engine, 1, max_new_tokens=4)  # tells what autocast computes in, where a real policy's probe does
    cuda.events.clear()
    generate(engine, 1, max_new_tokens=4)
    assert not [event for event in cuda.of("launch", section=STEP) if event.what == "cast of a weight"]


def test_rows_are_copied_by_one_launch_and_one_upload(cuda):
    runner = InProcessRunner(cuda.move(policy()))
    cache = runner.new_cache(8, 32)
    with runner.session(cache):
        one = np.array([5])
        runner.forward(Segments(np.arange(5), 0, 0 * one, one), np.array([4]))
        runner.reserve(4, 5)
        cuda.events.clear()
        runner.copy_rows(0, [1, 2, 3], 5)
    assert cuda.count("launch", "triton") <= 1, cuda.table("launch", "triton")
    assert cuda.count(*WAITS, "h2d_async") <= 1, cuda.table()


def test_a_refresh_reads_nothing_by_a_mask(cuda):
    engine = engine_of(cuda.move(policy()), ARMS["recurrent"](cuda.move))
    engine.generate([[3, 8, 1]], max_new_tokens=4, eos_token_ids=())
    with cuda.section("refresh"):
        engine.policy_updated()
    assert not [event for event in cuda.of("sync", section="refresh") if "mask" in event.what], cuda.table()


def test_verify_reads_nothing_back(cuda):
    logits = torch.randn(6, 300, device="cuda")
    ids, starts = torch.zeros(6, dtype=torch.int64, device="cuda"), torch.tensor([0, 3, 6], device="cuda")
    with cuda.forbidding(*(kind for kind in WAITS if kind != "build")):
        verify(logits, ids, starts, ids, ids)


def test_vllm_draws_a_step_in_few_launches(cuda):
    logits, keys = torch.randn(4, 128, device="cuda"), np.arange(2, dtype=np.uint64)
    draw(logits, np.zeros(2, np.int64), np.ones(2, np.int64), keys, np.full(2, 9), np.zeros(2, bool), False)
    assert cuda.count("launch", "triton") <= 20
    assert cuda.count("d2h", "sync") <= 1


def test_ranks_in_vllm_are_counted_on_the_device(cuda):
    on_host, keys = torch.randn(4, 128), np.arange(2, dtype=np.uint64)
    noise = np.zeros(2, np.int64), np.ones(2, np.int64), keys, np.full(2, 9), np.zeros(2, bool)
    drawn = draw(on_host.to("cuda"), *noise, False, ranked=True)
    assert cuda.count("launch", "triton") <= 25
    assert cuda.count("d2h", "sync") <= 1
    there = drawn.token_ids >= 0
    scores = on_host.numpy()[drawn.index[there]]
    chosen = np.take_along_axis(scores, drawn.token_ids[there][:, None], axis=1)
    assert drawn.ranks[there].tolist() == (scores >= chosen).sum(axis=1).tolist()


BATCH, VOCAB, KNOWN, SIZE = 64, 151_936, 3021, 1024


def verified(batch, device):
    logits = torch.empty(batch, VOCAB, device=device)
    ids = torch.empty(batch, dtype=torch.int64, device=device)
    verify(logits, ids, torch.empty(batch + 1, dtype=torch.int64, device=device), ids, ids)


def drafted(batch, device):
    shapes = {"input_gates": (KNOWN + 1, 3 * SIZE), "state_gates": (3 * SIZE, SIZE), "state_bias": (3 * SIZE,)}
    shapes |= {"outputs": (KNOWN, SIZE), "bias": (KNOWN,)}
    weights = {name: torch.empty(shape, dtype=torch.bfloat16, device=device) for name, shape in shapes.items()}
    weights["token_ids"] = torch.empty(KNOWN, dtype=torch.int64, device=device)
    ids = torch.empty(batch, dtype=torch.int64, device=device)
    draft_head(DraftHeadWeights(**weights), torch.empty(batch, SIZE, device=device), ids, ids, ids, 4)


def through_a_layer(batch, device):
    x, angles = (torch.empty(batch, *shape, dtype=torch.bfloat16, device=device) for shape in ((8, 64), (64,)))
    ids, cache = (
        torch.empty(batch, dtype=torch.int64, device=device),
        torch.empty(batch, 100 + batch, 8, 64, device=device),
    )
    rms_norm(x, torch.empty(64, dtype=torch.bfloat16, device=device), 1e-5)
    rotate(x, x, angles, angles)
    store(cache, cache, x.float(), x.float(), ids, ids)


@pytest.mark.parametrize("call", [verified, drafted, through_a_layer])
def test_a_batch_that_drains_compiles_little(call):
    """Beyond what is compiled for the whole batch."""
    with PretendCuda(kernels="blank") as cuda:
        call(BATCH, "cuda")
        cuda.events.clear()
        for batch in range(BATCH - 1, 0, -1):
            call(batch, "cuda")
        assert cuda.count("build") <= 3, cuda.table("build")
