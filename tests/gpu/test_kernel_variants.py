"""Triton compiles a kernel anew for constants, types, and numbers that are 1 or multiples of 16: once, while a batch drains.

A variant takes 0.3 to 3 s to compile, while everybody waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from atlas_kernels.draft_head_triton import draft_head_triton
from atlas_kernels.head_call import DraftHeadWeights, HeadCall
from atlas_kernels.noise import Stream
from atlas_kernels.nvfp4_triton import linear_triton
from atlas_kernels.rejection_triton import rejection_triton
from atlas_kernels.rows import PackedRows
from atlas_kernels.truncate_triton import truncate_triton
from atlas_kernels.truncated_head_triton import draft_head_triton as truncated_head_triton
from atlas_kernels.truncation import Truncation
from atlas_kernels.verify_triton import verify_triton
from atlas_rl.decode import compile_kernels
from atlas_rl.decode.loop import DecodeLoop
from atlas_rl.vllm.draw import compile_draw, draw
from tests.engines import engine_of
from tests.gpu import engines as arms
from tests.models import tiny_llama
from tests.pretend_cuda import PretendCuda

VOCAB, SIZE = 151_936, 256
BATCHES = (64, 63, 48, 33, 32, 17, 16, 15, 8, 3, 2, 1)
DRAFTS = (0, 1, 3, 5)  # per request
VOCABULARIES = (611, 1024, 1480, 3021, 4096, 5555, 8192)  # a drafter's grows


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    """A pretended H100 on which kernels are launched and write nothing."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="the kernels need Triton")
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *arguments, **named: None)
    with PretendCuda() as cuda:
        yield cuda


def builds(device: PretendCuda) -> list[str]:
    return sorted(event.what.removeprefix("Triton ") for event in device.events if event.kind == "build")


def ints(count: int, offset: int = 0) -> torch.Tensor:
    """int64 `[count]`, in memory that need not be aligned: a part of one upload."""
    return torch.zeros(count + offset, dtype=torch.int64, device="cuda")[offset:]


def packed(batch: int, drafts: int) -> PackedRows:
    rows, offset = batch * (1 + drafts), batch % 2
    logits = torch.empty(rows, VOCAB, dtype=torch.bfloat16, device="cuda")
    starts = ints(batch + 1, offset)
    return PackedRows(logits, ints(rows, offset), starts, ints(rows, offset), ints(rows, offset), 0.8, None)


def by_rejection(batch: int, drafts: int) -> None:
    rows = packed(batch, drafts)
    for tokens in VOCABULARIES:
        probs = torch.empty(len(rows.logits), tokens, device="cuda")
        rejection_triton(rows, probs, ints(tokens))


def drafted(batch: int, drafts: int, whole_bytes: int = 0, truncation: Truncation | None = None) -> None:
    for tokens in VOCABULARIES if drafts else ():
        shapes = {"input_gates": (tokens + 1, 3 * SIZE), "state_gates": (3 * SIZE, SIZE), "state_bias": (3 * SIZE,)}
        shapes |= {"outputs": (tokens, SIZE), "bias": (tokens,)}
        made = {name: torch.empty(shape, dtype=torch.bfloat16, device="cuda") for name, shape in shapes.items()}
        weights, offset = DraftHeadWeights(token_ids=ints(tokens), **made), batch % 2
        state = torch.empty(batch, SIZE, device="cuda")
        per_row = (ints(batch, offset) for _ in range(3))
        call = HeadCall(weights, state, *per_row, drafts, 0.8, Stream.TARGET, False, truncation)
        if truncation is None:
            draft_head_triton(call, whole_bytes=whole_bytes)
        else:
            truncated_head_triton(call)


def four_bits(batch: int, drafts: int) -> None:
    x = torch.empty(batch * (1 + drafts), SIZE, dtype=torch.bfloat16, device="cuda")
    weight = torch.empty(1024, SIZE // 2, dtype=torch.uint8, device="cuda")
    scales = torch.empty(1024, SIZE // 16, dtype=torch.uint8, device="cuda")
    linear_triton(x, weight, scales, torch.ones((), device="cuda"))


def truncated(batch: int, drafts: int) -> None:
    logits = torch.empty(batch * (1 + drafts), VOCAB, device="cuda")
    truncate_triton(logits, Truncation(7 + drafts, 0.5 + 1 / batch / 4, 0.01), 0.8, logits)


CALLS: dict[str, tuple[Callable[[int, int], None], list[str]]] = {
    "verify": (lambda batch, drafts: verify_triton(packed(batch, drafts)), ["choose_splits", "finish"]),
    "one-hot rejection": (
        lambda batch, drafts: rejection_triton(packed(batch, drafts), None, None),
        ["choose_splits", "finish_rejection"],
    ),
    "rejection": (by_rejection, ["choose_splits", "finish_rejection", "residual_splits"]),
    "draft head": (drafted, ["advance", "finish_draft", "score"]),
    "draft head at once": (lambda batch, drafts: drafted(batch, drafts, 1 << 40), ["draft_whole"]),
    "truncation": (truncated, ["truncate_rows"]),
    # A vocabulary is a multiple of 16, whose rows are read 16 bytes at a time, or it is not.
    "truncated draft head": (
        lambda batch, drafts: drafted(batch, drafts, truncation=Truncation(9, 0.9)),
        ["advance", "choose_among_splits", "finish_draw", "score", "truncate_rows", "truncate_rows"],
    ),
    "four bits": (four_bits, ["linear_rows"]),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_batch_that_drains_compiles_each_kernel_once(call: str, device: PretendCuda) -> None:
    """Whatever its size, the drafts and their vocabulary; wherever its few numbers per row lie in memory."""
    run, kernels = CALLS[call]
    for batch in BATCHES:
        for drafts in DRAFTS:
            run(batch, drafts)
    assert builds(device) == kernels


@pytest.mark.parametrize("verification", ["invariant", "rejection"])
def test_verification_is_compiled_before_the_first_step_and_it_is_said(
    verification: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compile_kernels, "_compiled", set())
    monkeypatch.setattr(compile_kernels, "_WORTH_SAYING_S", 0.0)
    with PretendCuda() as cuda:
        monkeypatch.setattr(DecodeLoop, "run", cuda.sectioned(DecodeLoop.run, "run"))
        engine = engine_of(cuda.move(tiny_llama(seed=11)), verification=verification, speculation=False, audit_share=0)
        for options in (
            {"temperature": 0.7},
            {"temperature": 0},
            {"top_k": 5, "temperature": 0.7},
            {"temperature": 0.6},
        ):
            engine.generate([[5, 9, 2], [3]], max_new_tokens=3, eos_token_ids=[17], seed=0, **options)
            assert not [event.what for event in cuda.events if event.kind == "build" and event.section == "run"]
    of_layers = {"norm_row", "rotate_token", "gated_numbers", "store_token"}  # compiled when the policy was probed
    built = builds(cuda)
    assert of_layers <= set(built)
    assert len([name for name in built if name not in of_layers]) == {"invariant": 5, "rejection": 13}[verification]
    said = [record.message for record in caplog.records if "GPU kernels" in record.message]
    assert len([line for line in said if "compiled its GPU kernels" in line]) == 3  # not for the second temperature


@pytest.mark.parametrize(
    ("arm", "verification"),
    [
        ("recurrent", "invariant"),
        ("recurrent", "rejection"),
        ("eagle3", "invariant"),
        ("eagle3", "rejection"),
        ("draft_lm", "rejection"),
        ("fp4_self", "invariant"),
    ],
)
def test_drafters_are_compiled_before_the_first_step(
    arm: str, verification: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In every form of sampling; of those that come again, and in the next call, nothing is compiled."""
    monkeypatch.setattr(compile_kernels, "_compiled", set())
    monkeypatch.setattr(compile_kernels, "_WORTH_SAYING_S", 0.0)
    with PretendCuda() as cuda:
        monkeypatch.setattr(DecodeLoop, "run", cuda.sectioned(DecodeLoop.run, "run"))
        policy = cuda.move(arms.policy(torch.bfloat16))
        engine = arms.engine_of(policy, arms.ARMS[arm](cuda.move), verification=verification)
        said: list[int] = []
        for options in (*arms.SAMPLINGS.values(), {"temperature": 0.9}):
            caplog.clear()
            outputs = arms.generate(engine, max_new_tokens=4, num_generations=1, **options)
            said.append(sum("compiled its GPU kernels" in record.message for record in caplog.records))
            assert [event.what for event in cuda.events if event.kind == "build" and event.section == "run"] == []
        assert arms.num_drafted(outputs) > 0
    assert said[-1] == 0
    assert min(said[:3]) > 0


def test_a_step_of_vllm_is_compiled_before_there_is_one() -> None:
    """Whatever its requests are, and however many."""
    with PretendCuda() as cuda:
        compile_draw(512, torch.device("cuda"))
        assert builds(cuda) == ["choose_splits", "finish"]
        for batch in (1, 2, 16, 17):
            for drafts in (0, 3):
                counts = np.full(batch, drafts)
                logits, keys = torch.zeros(batch * (1 + drafts), 512, device="cuda"), np.zeros(batch, np.uint64)
                tokens, greedy = np.zeros(batch * drafts, np.int64), np.arange(batch) % 2 > 0
                draw(logits, tokens, counts, keys, counts + 5, greedy, drafts > 0)
        assert len(builds(cuda)) == 2
