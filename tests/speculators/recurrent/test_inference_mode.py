"""What the recurrent drafter keeps of a call under a caller's inference mode, later calls can write into."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from atlas_rl.controller.fixed import FixedController
from atlas_rl.policy.view import InProcessView
from atlas_rl.speculators.reduced_vocab import TokenRows
from tests.drafters import recurrent_drafter
from tests.engines import engine_of
from tests.models import tiny_bigram, tiny_llama


def test_rows_made_in_inference_mode_can_be_added_to():
    view = InProcessView(tiny_llama(seed=2))
    with torch.inference_mode():
        rows = TokenRows.empty(64, 32, torch.device("cpu"))
        rows.add(np.array([1, 2, 3]), view)
    rows.add(np.array([5]), view)  # into the spare memory after the first rows
    assert torch.equal(rows.inputs, view.input_table.detach()[[1, 2, 3, 5]])
    with torch.inference_mode():
        rows.reread(view)
    rows.add(np.array([7]), view)
    assert not any(tensor.is_inference() for tensor in (rows.inputs, rows.outputs, rows.biases))
    with torch.no_grad():
        rows.add(np.array([9]), view)
        assert not torch.is_grad_enabled()


def texts(mode):
    """Two calls of one version, of which the second samples tokens that the first did not; the first is in `mode`."""
    drafter = recurrent_drafter()
    engine = engine_of(tiny_bigram(), speculators=[drafter], controller=FixedController(["recurrent"], "recurrent", 3))
    outputs = []
    for call, context in enumerate([mode, nullcontext, nullcontext]):
        with context():
            outputs.append(
                engine.generate([[5, 9, 2]], temperature=2.0, max_new_tokens=8, eos_token_ids=[17], seed=call)
            )
        known = len(drafter.learner._rows.token_ids)
    engine.policy_updated()
    return [output.completion_ids for output in outputs], [output.report.drafter_faults for output in outputs], known


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_call_in_inference_mode_does_not_end_drafting(mode):
    completions, faults, known = texts(mode)
    assert faults == [{}, {}, {}]
    assert known > len(set(completions[0][0]))
    assert (completions, faults, known) == texts(nullcontext)
