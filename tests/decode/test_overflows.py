"""Draft tokens whose embeddings are finite and which overflow inside the policy: whatever is drafted costs time only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from atlas_rl.core import Needs, Sequences, Verified
from atlas_rl.decode import generate as generating
from atlas_rl.policy.logits import NonFiniteLogits
from atlas_rl.sampling.by_kernels import FusedVerifier
from atlas_rl.sampling.verification import VERIFIERS
from benchmarks.tiny_policies import build
from tests.drafters import Interposing
from tests.engines import VOCAB, Mute, engine_of, generate
from tests.families import drafting
from tests.models import FACTORIES

LOUD = 60
PROMPTS = [[5, 9, 2], [7], [3, 3, 8, 1, 4, 11, 2, 9, 5, 6, 20, 21, 22]]
FAMILIES = ("llama", "gemma2", "mistral", "qwen3_5_text", "lfm2")


def policy(family: str, *, sampled: bool = False) -> Any:
    """A policy whose first feed-forward overflows at one token, and at no other."""
    model = FACTORIES[family](seed=11) if family in FACTORIES else build(family, tie_word_embeddings=False)

    def overflow(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        loud = (seen[0] == LOUD).reshape(output.shape[:-1])
        return output.masked_fill(loud[..., None], 1e30) * torch.where(loud, 1e30, 1.0)[..., None]

    seen: list[torch.Tensor] = [torch.zeros(0)]
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.__setitem__(0, args[0]))
    layer = model.model.layers[0]
    (mlp,) = (getattr(layer, name) for name in ("mlp", "feed_forward") if hasattr(layer, name))
    mlp.register_forward_hook(overflow)
    if not sampled:
        masked = torch.arange(VOCAB) == LOUD
        model.get_output_embeddings().register_forward_hook(
            lambda module, args, output: output.masked_fill(masked, -torch.inf)
        )
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("verification", VERIFIERS)
def test_they_change_no_token(family: str, verification: str) -> None:
    """In steps of several requests, whose rows move, and with drafts accepted before them."""
    model = policy(family)
    options: dict[str, Any] = {"prompts": PROMPTS, "temperature": 1.0 if verification == "invariant" else 0.0}
    wanted = generate(engine_of(model, speculation=False, verification=verification), **options)
    output = generate(
        drafting(model, Interposing(wanted.completion_ids, LOUD, share=0.2), 5, verification=verification), **options
    )
    assert output.completion_ids == wanted.completion_ids
    for own, plain in zip(output.logprobs, wanted.logprobs, strict=True):
        assert np.allclose(own, plain, atol=1e-3)
    assert not output.report.drafter_faults
    assert 0.3 < output.report.acceptance_rate < 1


@pytest.mark.parametrize("form", VERIFIERS.values())
@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("queued", [False, True])
def test_verification_by_kernels_notices_them_too(
    form: Any,
    probs: bool,
    penalty: float,
    queued: bool,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """With a penalty it changes the logits of the other requests before it notices; it may be part of the step."""
    if queued:
        request.getfixturevalue("fixed_shapes")
    model = policy("llama")
    options: dict[str, Any] = {"prompts": PROMPTS, "temperature": 0.0, "repetition_penalty": penalty}
    wanted = generate(engine_of(model, speculation=False), **options)
    monkeypatch.setattr(generating, "verifier_on", lambda device, given: FusedVerifier(form(), "reference"))
    output = generate(drafting(model, Interposing(wanted.completion_ids, LOUD, share=0.2, probs=probs), 5), **options)
    assert output.completion_ids == wanted.completion_ids
    for own, plain in zip(output.logprobs, wanted.logprobs, strict=True):
        assert np.allclose(own, plain, atol=1e-3)


def test_a_policy_that_does_sample_one_ends_as_without_drafts() -> None:
    model = policy("llama", sampled=True)
    with torch.no_grad():
        model.lm_head.weight[LOUD] *= 40
    for engine in (
        engine_of(model, speculation=False),
        drafting(model, Interposing([[LOUD] * 30] * 6, LOUD, share=0.2), 3),
    ):
        with pytest.raises(NonFiniteLogits, match="Nothing was returned"):
            generate(engine, prompts=PROMPTS)


class Listening:
    """Keeps the states that each committed token was drawn from, by request and place."""

    needs = Needs(head_inputs=True, layers=(1,))

    def observe(self, sequences: Sequences, verified: Verified) -> None:
        for row, request in enumerate(verified.requests.tolist()):
            count, first = int(verified.num_committed[row]), int(verified.hidden.starts[row])
            for place in range(count):
                states = [verified.hidden.head_inputs, verified.hidden.layers[1]]
                key = request, int(sequences.lengths[request]) - count + place
                self.heard[key] = torch.cat([each[first + place] for each in states])


class LoudListening(Listening, Interposing):
    def __init__(self, completions: list[list[int]]) -> None:
        super().__init__(completions, LOUD, share=0.2)
        self.heard: dict[tuple[int, int], torch.Tensor] = {}


class MuteListening(Listening, Mute):
    def __init__(self) -> None:
        self.heard: dict[tuple[int, int], torch.Tensor] = {}


def test_drafters_get_the_states_of_what_was_accepted() -> None:
    model, mute = policy("llama"), MuteListening()
    wanted = generate(drafting(model, mute, 5), prompts=PROMPTS)
    loud = LoudListening(wanted.completion_ids)
    generate(drafting(model, loud, 5), prompts=PROMPTS)
    assert loud.heard.keys() == mute.heard.keys()
    for key, states in mute.heard.items():
        assert (states - loud.heard[key]).abs().max() < 1e-3
