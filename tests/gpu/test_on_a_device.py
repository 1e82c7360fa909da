"""The engine on a real GPU: the tokens of a CPU, by every arm. Skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from atlas_kernels.noise import Stream
from atlas_kernels.truncation import Truncation
from atlas_rl.controller.fixed import FixedController
from atlas_rl.policy import varlen
from atlas_rl.policy.base import Segments, Taps
from atlas_rl.policy.captures import Captures
from atlas_rl.policy.in_process import InProcessRunner
from atlas_rl.sampling.by_kernels import FusedVerifier
from atlas_rl.sampling.queued import QueuedVerification
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
from atlas_rl.speculators.head_sampling import HeadSampling
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.recurrent.draft_graphs import DraftGraphs
from atlas_rl.speculators.recurrent.head import FoldedHead
from atlas_rl.speculators.recurrent.speculator import RecurrentSpeculator
from benchmarks.tiny_policies import build
from tests.engines import engine_of
from tests.families import made
from tests.gpu.engines import eagle3_head, waits
from tests.models import FACTORIES, tiny_bigram
from tests.recurrent import draft_inputs, random_head

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

VOCAB, PROMPTS = 128, [[5, 9, 2, 7, 7, 1], [3, 8, 1], [9]]


ARMS = {
    "history": lambda device: HistorySpeculator(),
    "recurrent": lambda device: RecurrentSpeculator(),
    "eagle3": lambda device: Eagle3Speculator(eagle3_head().to(device)),
    "draft_lm": lambda device: DraftLM(tiny_bigram(vocab=VOCAB, context=128, layers=1, seed=2).to(device), VOCAB),
    "fp4": lambda device: Fp4SelfSpeculator(),
}
SAMPLING = {
    "sampled": {"temperature": 0.8},
    "greedy": {"temperature": 0.0},
    "truncated": {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2},
}


def completions(arm, device, sampling, model=None, **options):
    policy = (model or (lambda: tiny_bigram(vocab=VOCAB, context=128, seed=2)))().to(device)
    if arm is None:
        options["speculation"] = False
    else:
        speculator = ARMS[arm](device)
        options |= {
            "speculators": [speculator],
            "controller": FixedController([speculator.name], speculator.name, 3),
        }
    engine, found = engine_of(policy, max_batch_size=4, **options), []
    for call in range(2):  # a recurrent head drafts after its first refresh
        output = engine.generate(
            PROMPTS, num_generations=2, max_new_tokens=12, seed=call, eos_token_ids=[17], **SAMPLING[sampling]
        )
        engine.policy_updated()
        found.append(output.completion_ids)
    return found


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("verification", ["invariant", "rejection"])
@pytest.mark.parametrize("arm", [None, *ARMS])
def test_tokens_are_those_of_the_cpu(arm, verification, sampling):
    wanted = completions(arm, "cpu", sampling, verification=verification)
    assert completions(arm, "cuda", sampling, verification=verification) == wanted


@pytest.mark.parametrize("family", sorted(FACTORIES))
def test_every_family(family):
    wanted = completions("history", "cpu", "sampled", FACTORIES[family])
    assert completions("history", "cuda", "sampled", FACTORIES[family]) == wanted


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text", "bamba"])
def test_recurrent_layers(family):
    wanted = completions("history", "cpu", "sampled", lambda: build(family))
    assert completions("history", "cuda", "sampled", lambda: build(family)) == wanted


@pytest.mark.parametrize("family", ["gpt_oss", "gemma4_text, shared keys and values"])
def test_other_kinds_of_attention(family):
    wanted = completions("history", "cpu", "sampled", lambda: made(family))
    assert completions("history", "cuda", "sampled", lambda: made(family)) == wanted
    runner = InProcessRunner(made(family).to("cuda", torch.bfloat16))
    runner.check_reach(4)  # by flash attention, held against plain forwards


def test_wrong_sinks_are_seen(monkeypatch):
    """By the comparison above."""
    monkeypatch.setattr(varlen, "share_of_cells", lambda log_sums, sinks: torch.ones_like(log_sums))
    runner = InProcessRunner(made("gpt_oss").to("cuda", torch.bfloat16))
    with pytest.raises(ValueError, match="logits of a plain forward"):
        runner.check_reach(4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("queries", [1, 3])
def test_flash_attention_reads_rows_as_far_as_they_are_filled(dtype, window, queries):
    """Against the reference in float32; cells behind a row's end hold what no sum may see."""
    generator = torch.Generator("cuda").manual_seed(0)
    keys, values = (torch.randn(5, 300, 2, 64, device="cuda", generator=generator).to(dtype) for _ in "kv")
    lengths = torch.tensor([7, 300, 129, 64], dtype=torch.int32, device="cuda")
    rows = torch.tensor([4, 0, 2, 1], device="cuda")
    for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
        keys[row, length:] = values[row, length:] = float("nan")
    query = torch.randn(4 * queries, 8, 64, device="cuda", generator=generator).to(dtype)
    starts = torch.arange(0, 4 * queries + 1, queries, dtype=torch.int32, device="cuda")
    firsts = torch.nn.functional.pad((rows * 300).int(), (0, 1))
    packing = varlen.Packing(starts, firsts, lengths, queries, 300)
    assert varlen.takes(query, 64)
    found = varlen.flash(query, keys, values, packing, None, window)
    expected = varlen.reference(query.float(), keys.float(), values.float(), packing, None, window)
    for one, other in zip(found, expected, strict=True):  # attention, and the log-sum-exps that sinks take
        assert one.shape == other.shape
        assert (one.float() - other).abs().max() < 2e-2


def steps_of(name, *, captured):
    """Logits and taps of the same ragged steps, each shape three times, with rows that move and a cache that grows."""
    runner = InProcessRunner(FACTORIES[name](seed=3).to("cuda", torch.bfloat16))
    runner._uncaptured = None if captured else "to compare with"
    cache, rng, out = runner.new_cache(8, 128), np.random.default_rng(5), []
    lengths = np.array([5, 17, 2, 30])
    with runner.session(cache):
        tokens = rng.integers(64, size=int(lengths.sum()))
        runner.forward(Segments(tokens, 0, np.zeros(4, np.int64), lengths), np.cumsum(lengths) - 1)
        for turn in range(12):
            counts = np.array([[1, 1, 1, 1], [3, 1, 2, 1]][turn % 2])
            tokens, taps = rng.integers(64, size=int(counts.sum())), Taps(True, (1,))
            logits = runner.forward(Segments(tokens, 0, lengths.copy(), counts), np.arange(len(tokens)), taps)
            out += [logits.clone(), taps.head_inputs.float(), taps.layers[1].float()]
            lengths += counts
            if turn == 8:
                runner.copy_rows(3, [1], int(lengths[3]))
                lengths[1] = lengths[3]
        runner.synchronize()
    return out, cache


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_captured_steps_are_the_steps(name):
    eager, _ = steps_of(name, captured=False)
    replayed, cache = steps_of(name, captured=True)
    if cache.attended == {True}:
        assert cache.steps.refused is None
        assert cache.steps.captured >= 2
    for a, b in zip(eager, replayed, strict=True):
        assert (a - b).abs().max() < 0.15 * max(1.0, float(a.abs().max()) / 4)


@pytest.mark.parametrize("sampling", ["sampled", "greedy"])
@pytest.mark.parametrize("verification", ["invariant", "rejection"])
def test_verification_in_the_graph_of_a_step_decides_as_behind_it(verification, sampling, monkeypatch):
    """The same logits; sums over the vocabulary are split otherwise."""

    def outputs():
        model = tiny_bigram(vocab=VOCAB, context=128, seed=2).to("cuda", torch.bfloat16)
        speculator = HistorySpeculator()
        controller = FixedController([speculator.name], speculator.name, 3)
        engine = engine_of(model, speculators=[speculator], controller=controller, verification=verification)
        options = {"num_generations": 4, "max_new_tokens": 24, "eos_token_ids": [17], **SAMPLING[sampling]}
        found = []
        for seed in range(3):
            found.append(engine.generate(PROMPTS, seed=seed, **options))
            engine.policy_updated()
        return found

    ran, own = [], QueuedVerification.begin_download
    monkeypatch.setattr(QueuedVerification, "begin_download", lambda tail: ran.append(tail) or own(tail))
    together = outputs()
    assert len(ran) > 20
    assert all(output.report.capture_s > 0 for output in together)
    monkeypatch.setattr(FusedVerifier, "tail", lambda *arguments: None)
    for one, other in zip(together, outputs(), strict=True):
        assert one.completion_ids == other.completion_ids
        assert one.report.accepted == other.report.accepted
        for logprobs, behind in zip(one.logprobs, other.logprobs, strict=True):
            assert logprobs == pytest.approx(behind, abs=1e-4)


@pytest.mark.parametrize("truncation", [None, Truncation(top_k=12, top_p=0.9)])
@pytest.mark.parametrize(("state", "tokens"), [(16, 40), (1024, 3021)])  # one launch for all tokens, and some for each
def test_captured_drafts_are_the_drafts(state, tokens, truncation):
    """With other inputs in every draft, and other weights from the fourth one on."""
    sampling = HeadSampling(0.8, truncation, Stream.TARGET, with_probs=truncation is not None)
    ids, states = torch.arange(tokens, device="cuda"), torch.randn(9, 64, device="cuda")
    drafts = {}
    for capture in (True, False):
        graphs, head, drafts[capture] = DraftGraphs(capture=capture), None, []
        for turn in range(6):
            head = FoldedHead(random_head(turn // 3, tokens, hidden=64, state=state).to("cuda"), head)
            inputs = draft_inputs(5, turn, requests=9, tokens=tokens)
            drawn = graphs.run(head, head.packed(ids, torch.bfloat16), states, inputs, 3, sampling)
            drafts[capture].append(
                (drawn.token_ids, drawn.max_probs, None if drawn.probs is None else drawn.probs.cpu())
            )
        assert graphs.captured == capture, graphs.refused
    for (tokens_of, max_probs, probs), (other_tokens, other_max, other) in zip(*drafts.values(), strict=True):
        assert np.array_equal(tokens_of, other_tokens)
        assert np.array_equal(max_probs, other_max)
        assert probs is None or torch.equal(probs, other)


def test_a_capture_that_fails_leaves_nothing_behind(caplog):
    """torch leaves its stream, up to 2.11 also its allocator and its random generator."""
    before, x = torch.cuda.current_stream(), torch.ones(4, device="cuda")
    engine = engine_of(
        waits(tiny_bigram(vocab=VOCAB, context=128, seed=2)).to("cuda", torch.bfloat16), speculation=False
    )
    engine.generate(PROMPTS, max_new_tokens=8, seed=0, eos_token_ids=())
    said = [record.getMessage() for record in caplog.records if "cannot run as a CUDA graph" in record.getMessage()]
    assert len(said) == 1
    assert "in forward of engines.py" in said[0]
    assert torch.cuda.current_stream() == before
    torch.cuda.empty_cache()
    assert torch.nn.functional.dropout(x).isfinite().all()
    assert torch.randn(4, device="cuda").isfinite().all()
    owner = Captures(capture=True)
    assert owner._graph_of(lambda: x.mul_(2)) is not None, owner.refused
    assert x.tolist() == [2.0] * 4


def test_graphs_of_drafts_outlast_those_of_the_policy(monkeypatch):
    """Which go with every call, and take the workspaces of their stream along."""

    def outputs():
        model = tiny_bigram(vocab=VOCAB, context=128, seed=2).to("cuda", torch.bfloat16)
        speculator = RecurrentSpeculator(max_vocab=12)  # so that the vocabulary keeps its size, and the graphs stay
        controller, found = FixedController([speculator.name], speculator.name, 3), []
        engine = engine_of(model, speculators=[speculator], controller=controller)
        for seed in range(5):
            found.append(engine.generate(PROMPTS, num_generations=4, max_new_tokens=24, seed=seed, eos_token_ids=()))
            engine.policy_updated()
            torch.cuda.empty_cache()
        assert not any(output.report.drafter_faults for output in found), found[-1].report.warnings
        return found, speculator._graphs.captured

    captured, number = outputs()
    assert number > 0
    monkeypatch.setattr(DraftGraphs, "can_capture", property(lambda self: False))
    plain, none = outputs()
    assert none == 0
    assert [output.completion_ids for output in captured] == [output.completion_ids for output in plain]


def test_weights_that_are_changed_in_place_are_those_that_run():
    """An optimizer step between two calls; and each call has graphs of its own."""
    model = tiny_bigram(vocab=VOCAB, context=128, seed=2).to("cuda", torch.bfloat16)
    engine = engine_of(model, speculation=False)

    def tokens():
        options = {"max_new_tokens": 24, "seed": 1, "eos_token_ids": [VOCAB - 1], "temperature": 0.0}
        return engine.generate(PROMPTS, **options).completion_ids

    before = tokens()
    assert tokens() == before
    with torch.no_grad():
        model.get_output_embeddings().weight.neg_()
    engine.policy_updated()
    assert tokens() != before
    with torch.no_grad():
        model.get_output_embeddings().weight.neg_()
    engine.policy_updated()
    assert tokens() == before
