"""The engine on a real GPU: the tokens of a CPU, by every arm. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from atlas_rl.controller.fixed import FixedController
from atlas_rl.speculators.draft_lm import DraftLM
from atlas_rl.speculators.eagle3.config import Eagle3Config
from atlas_rl.speculators.eagle3.head import Eagle3Head
from atlas_rl.speculators.eagle3.speculator import Eagle3Speculator
from atlas_rl.speculators.fp4_self.speculator import Fp4SelfSpeculator
from atlas_rl.speculators.history.speculator import HistorySpeculator
from atlas_rl.speculators.recurrent.speculator import RecurrentSpeculator
from tests.engines import engine_of
from tests.models import FACTORIES, tiny_bigram

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

VOCAB, PROMPTS = 128, [[5, 9, 2, 7, 7, 1], [3, 8, 1], [9]]


def eagle3_head():
    torch.manual_seed(0)
    layer = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2
    )
    head = Eagle3Head(Eagle3Config(layer, 32, (0, 1)))
    head.set_vocabulary(torch.arange(0, VOCAB, 4))
    return head.eval()


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
