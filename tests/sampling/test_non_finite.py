"""Numbers that are not finite: a policy's stop the call by name, a drafter's are the drafter's, and masks are no numbers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from atlas_kernels.draft_head import draft_head
from atlas_kernels.head_call import DraftHeadWeights
from atlas_rl.core import SamplingParams
from atlas_rl.policy.logits import NonFiniteLogits
from atlas_rl.sampling.processing import entropies, process
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.drawing import Drawing, NonFiniteDraft, draft_of
from atlas_rl.speculators.history.speculator import HistorySpeculator
from tests.engines import (
    SETTINGS,
    VOCAB,
    draft_model,
    engine_of,
    fixed,
    generate,
    policy,
    processed_logprobs,
    reference,
    state_of,
)
from tests.verification import case

NAN, INF = math.nan, math.inf
LEAST = torch.finfo(torch.float32).min
SAMPLINGS: dict[str, dict[str, Any]] = SETTINGS | {"greedy": {"temperature": 0.0}}


# -------------------------------------------------------------------------------------------------- the policy's own fault


@contextmanager
def changed(model: PreTrainedModel, change: Callable[[PreTrainedModel], Any]) -> Iterator[None]:
    """Inside, `change` has been made to the model's weights."""
    before = copy.deepcopy(model.state_dict())
    try:
        with torch.no_grad():
            change(model)
        yield
    finally:
        model.load_state_dict(before)


def all_weights(value: float) -> Callable[[PreTrainedModel], Any]:
    return lambda model: [parameter.fill_(value) for parameter in model.parameters()]


def head_row(value: float) -> Callable[[PreTrainedModel], Any]:
    return lambda model: model.lm_head.weight[7].fill_(value)


@contextmanager
def logits_changed(
    model: PreTrainedModel, change: Callable[[torch.Tensor], Any], after: int = 0
) -> Iterator[list[int]]:
    """Inside, `change` is made to the logits of every forward but the first `after`; yields a count of forwards."""
    calls = [0]

    def hook(module: Any, arguments: Any, output: Any) -> None:
        calls[0] += 1
        if calls[0] > after:
            change(output.logits)

    handle = model.register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


WEIGHTS = {
    "a row of the head is NaN": head_row(NAN),
    "a row of the head is infinite": head_row(INF),
    "every weight is NaN": all_weights(NAN),
    "every weight is infinite": all_weights(INF),
}
ENGINES: dict[str, Callable[[], Any]] = {
    "plain": lambda: engine_of(speculation=False),
    "plain, rejection": lambda: engine_of(speculation=False, verification="rejection"),
    "default": lambda: engine_of(),
    "draft LM, rejection": lambda: engine_of(draft_model=draft_model(), verification="rejection"),
}


def assert_refuses(engine: Any, says: str = "policy's logits are not finite", **options: Any) -> None:
    reports = len(engine.reports)
    with pytest.raises(NonFiniteLogits, match=says):
        generate(engine, **options)
    assert len(engine.reports) == reports


@pytest.mark.parametrize("fault", WEIGHTS)
@pytest.mark.parametrize("kind", ENGINES)
def test_weights_that_are_not_finite_stop_the_call_and_the_next_good_one_runs(kind: str, fault: str) -> None:
    before = state_of(policy())
    for first_good in (True, False):
        engine = ENGINES[kind]()
        if first_good:
            generate(engine)
        with changed(policy(), WEIGHTS[fault]):
            assert_refuses(engine)
            assert_refuses(engine, temperature=0.0)
        output = generate(engine)
        if kind != "draft LM, rejection":  # whose tokens depend on what is drafted
            assert output.completion_ids == generate(ENGINES[kind]()).completion_ids
    assert state_of(policy()) == before


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", ["plain", "default", "draft LM, rejection"])
def test_every_way_of_sampling_notices(kind: str, sampling: str) -> None:
    engine = ENGINES[kind]()
    for value, says in ((NAN, "NaN"), (INF, r"\+inf")):
        with logits_changed(policy(), lambda logits, value=value: logits[..., 5].fill_(value)):
            assert_refuses(engine, says, **SAMPLINGS[sampling])
    with logits_changed(policy(), lambda logits: logits.fill_(-INF)):
        assert_refuses(engine, "-inf for every token", **SAMPLINGS[sampling])


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("make", [lambda: engine_of(speculation=False), lambda: fixed(HistorySpeculator(), 4)])
def test_it_is_noticed_in_the_step_in_which_it_happens(make: Callable[[], Any], after: int) -> None:
    """One request of the batch is enough, in the prefill or in a later step. If it drafted, its own text is tried again."""
    engine = make()
    generate(engine)
    with logits_changed(policy(), lambda logits: logits[0, 0, 3].fill_(NAN), after) as calls:
        assert_refuses(engine)
    assert after + 1 <= calls[0] <= after + 2
    assert generate(engine).completion_ids == reference().completion_ids


# ------------------------------------------------------------------------------------------------------------------ masks

ALLOWED = [3, 17, 21, 40]


def mask_by(value: float) -> Callable[[torch.Tensor], Any]:
    excluded = torch.ones(VOCAB, dtype=torch.bool)
    excluded[ALLOWED] = False
    return lambda logits: logits.masked_fill_(excluded, value)


def tokens_of(output: Any) -> set[int]:
    return {token for completion in output.completion_ids for token in completion}


@pytest.mark.parametrize("value", [-INF, LEAST, float(torch.finfo(torch.bfloat16).min), -65504.0])
@pytest.mark.parametrize("temperature", [0.0, 0.05, 0.5, 1.0, 2.0])
def test_policies_that_mask_generate_at_every_temperature(value: float, temperature: float) -> None:
    options = {"temperature": temperature}
    with logits_changed(policy(), mask_by(value)):
        outputs = [
            generate(make(), **options)
            for make in (
                lambda: engine_of(speculation=False, audit_share=1.0),
                lambda: engine_of(draft_model=draft_model(), audit_share=1.0),
                lambda: fixed(DraftLM(policy(), VOCAB), 3),
            )
        ]
        for output in outputs:
            report = output.report
            assert output.completion_ids == outputs[0].completion_ids
            assert tokens_of(output) <= set(ALLOWED)
            assert np.isfinite(np.concatenate(output.logprobs)).all()
            assert report.entropy is not None
            assert -1e-3 <= report.entropy <= math.log(len(ALLOWED)) + 1e-3
            assert report.num_audited_tokens or not report.speculation
            assert math.isfinite(report.audit_score_variance_nats2)
            assert math.isfinite(report.audit_score_nats)
            assert not report.warnings
        expected = processed_logprobs(
            policy(), outputs[0].prompt_ids[0], outputs[0].completion_ids[0], options if temperature else {}
        )
    own = expected[range(len(expected)), outputs[0].completion_ids[0]]
    assert outputs[0].logprobs[0] == pytest.approx(own.tolist(), abs=1e-4)


def test_a_mask_in_a_lower_precision() -> None:
    model = copy.deepcopy(policy()).bfloat16()
    with logits_changed(model, mask_by(float(torch.finfo(torch.bfloat16).min))):
        output = generate(engine_of(model), temperature=0.3)
    assert tokens_of(output) <= set(ALLOWED)
    assert math.isfinite(output.report.entropy or NAN)


ROWS = {
    "wide": lambda x: x,
    "mostly -inf": lambda x: x.masked_fill(torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.9, -INF),
    "all but one": lambda x: torch.full_like(x, -INF).index_copy_(1, torch.tensor([9]), x[:, 9:10]),
    "the type's least": lambda x: x.masked_fill(torch.arange(x.shape[1]) % 3 > 0, LEAST),
    "ties": lambda x: x.round().masked_fill(x < 0, -INF),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    "options",
    [
        *SETTINGS.values(),
        {"temperature": 0.05},
        {"top_k": VOCAB, "top_p": 1e-6},
        {"top_k": 30, "top_p": 0.999},
        {"min_p": 1.0},
        {"temperature": 2.0, "min_p": 1e-6, "repetition_penalty": 3.0},
    ],
)
def test_masked_logits_are_processed_as_by_transformers(rows: str, options: dict[str, float]) -> None:
    logits = ROWS[rows](4 * torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(0)))
    prefixes = torch.tensor([[row % VOCAB, (row + 9) % VOCAB, 9] for row in range(len(logits))])
    steps = LogitsProcessorList()
    if "repetition_penalty" in options:
        steps.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    steps.append(TemperatureLogitsWarper(float(options.get("temperature", 1.0))))
    if "top_k" in options:
        steps.append(TopKLogitsWarper(int(options["top_k"])))
    if "top_p" in options:
        steps.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        steps.append(MinPLogitsWarper(options["min_p"]))
    expected = steps(prefixes, logits.clone())
    sampling = SamplingParams(max_new_tokens=1, **options)
    ours = process(logits.clone(), sampling, prefixes if sampling.repetition_penalty != 1 else None)
    if rows == "ties":  # which of equal tokens stay is left to a sort that is not stable there
        ours, expected = (each.sort(dim=-1).values for each in (ours, expected))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("value", [-INF, LEAST])
@pytest.mark.parametrize("shift", [0.0, 3e6, -1e30])
def test_entropies_of_masked_and_of_far_away_rows(truncated: bool, value: float, shift: float) -> None:
    logits = 3 * torch.randn(6, 200, generator=torch.Generator().manual_seed(2)) + shift
    logits[:, 50:] = value
    logits[0, 1:] = value
    exact = logits.double().log_softmax(dim=-1)
    expected = -(exact.exp() * exact.masked_fill(exact.exp() == 0, 0.0)).sum(dim=-1)
    probs = logits.softmax(dim=-1)
    tokens = probs.argmax(dim=-1)
    logprobs = probs.gather(1, tokens[:, None])[:, 0].log()
    ours = entropies(logits, probs, tokens, logprobs, truncated)
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-4)


# --------------------------------------------------------------------------------------------------------------- the range


@pytest.mark.parametrize("temperature", [1e-40, 1e-45, 5e-324, 1e-30, 1e39, INF, NAN, -1.0])
def test_a_temperature_that_float32_cannot_divide_by_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature must be 0 \(greedy\) or in \[1e-20, 1e\+20\], got"):
        SamplingParams(max_new_tokens=1, temperature=temperature)


@pytest.mark.parametrize("penalty", [1e-40, 1e40, INF, NAN, 0.0, -2.0])
def test_a_penalty_that_float32_cannot_hold_is_refused(penalty: float) -> None:
    with pytest.raises(ValueError, match=r"repetition_penalty must be in \[1e-10, 1e\+10\] \(1 is off\), got"):
        SamplingParams(max_new_tokens=1, repetition_penalty=penalty)


@pytest.mark.parametrize("options", [{"temperature": 1e-20}, {"temperature": 1e-6}, {"temperature": 1e20}])
@pytest.mark.parametrize("penalty", [1e-10, 1.0, 1e10])
def test_the_ends_of_the_ranges_generate(options: dict[str, float], penalty: float) -> None:
    output = generate(engine_of(), max_new_tokens=4, repetition_penalty=penalty, **options)
    assert np.isfinite(np.concatenate(output.logprobs)).all()
    assert -1e-3 <= (output.report.entropy or 0.0) <= math.log(VOCAB) + 1e-3


# ---------------------------------------------------------------------------------------------------------------- drafters


@pytest.mark.parametrize("couples_noise", [False, True])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01}])
@pytest.mark.parametrize("row", [NAN, INF, -INF])
def test_draft_logits_are_the_drafters_fault(couples_noise: bool, options: dict[str, float], row: float) -> None:
    _, _, sequences, requests = case([1, 1], SamplingParams(max_new_tokens=8, **options), with_probs=False)
    logits = torch.zeros(2, 300)
    logits[1, 7] = row
    if row == -INF:
        logits[1] = row
    one = np.ones(2, np.int64)
    for name, token_ids in (("a_head", torch.arange(300)), ("a_lm", None)):
        device = torch.device("cpu")
        drawing = Drawing(name, sequences, requests, one, device, couples_noise=couples_noise, token_ids=token_ids)
        assert 0 <= int(drawing.draw(logits.clone())[1]) < 300  # the drafter runs on before anybody looks
        with pytest.raises(NonFiniteDraft, match=f"draft logits of '{name}' are not finite"):
            drawing.finish(one)
    assert not issubclass(NonFiniteDraft, NonFiniteLogits)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("weight", ["outputs", "bias", "state_gates"])
def test_a_draft_head_gone_nan_is_told_by_its_kernel_too(implementation: Any, weight: str) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton")
    tensors = {
        "input_gates": torch.zeros(21, 24),
        "state_gates": torch.zeros(24, 8),
        "state_bias": torch.zeros(24),
        "outputs": torch.zeros(20, 8),
        "bias": torch.zeros(20),
        "token_ids": torch.arange(20),
    }
    tensors[weight][3] = NAN
    zero = torch.zeros(2, dtype=torch.int64)
    drawn = draft_head(
        DraftHeadWeights(**tensors), torch.ones(2, 8), zero, zero, zero, 3, implementation=implementation
    )
    tokens, max_probs = drawn.indices.numpy(), drawn.confidence.numpy()
    with pytest.raises(NonFiniteDraft, match="a_head"):
        draft_of("a_head", tokens, max_probs, np.full(2, 3), np.zeros(0, np.int64), None)


def test_a_draft_lm_gone_nan_is_not_called_the_policy(caplog: pytest.LogCaptureFixture) -> None:
    broken = copy.deepcopy(draft_model())
    drafter = DraftLM(broken, VOCAB)
    with torch.no_grad():
        all_weights(NAN)(broken)
    output = generate(fixed(drafter, 3))
    assert output.completion_ids == reference().completion_ids
    assert output.report.drafter_faults == {"draft_lm": 1}
    assert "draft logits of 'draft_lm'" in caplog.text
