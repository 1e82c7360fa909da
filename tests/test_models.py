"""The tiny models are fit for their purpose: not uniform, and every token of the context matters."""

import pytest
import torch

from tests.models import FACTORIES, SLIDING_WINDOW


def test_distributions_are_neither_flat_nor_one_hot(tiny_model):
    tokens = torch.randint(tiny_model.config.vocab_size, (8, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        log_probs = tiny_model(tokens).logits.log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    assert 1.0 < entropy < 3.8  # uniform: 4.16
    assert 0.15 < log_probs.exp().amax(-1).mean() < 0.8


def test_every_visible_token_and_its_place_matter(tiny_model):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(tiny_model.config.vocab_size, (1, SLIDING_WINDOW), generator=generator)
    changed = tokens.repeat(SLIDING_WINDOW, 1)
    swapped = tokens.flip(1)
    swapped[0, -1] = tokens[0, -1]
    for i in range(SLIDING_WINDOW - 1):
        changed[i, i] = (changed[i, i] + 1) % tiny_model.config.vocab_size
    with torch.no_grad():
        reference = tiny_model(tokens).logits[0, -1].softmax(-1)
        others = tiny_model(torch.cat([changed[:-1], swapped])).logits[:, -1].softmax(-1)
    distance = 0.5 * (others - reference).abs().sum(-1)  # total variation
    assert (distance > 0.01).all(), distance


@pytest.mark.parametrize("name", sorted(FACTORIES))
def test_the_same_seed_builds_the_same_model(name):
    before = torch.random.get_rng_state()
    first, again, other = FACTORIES[name](), FACTORIES[name](), FACTORIES[name](seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(first(tokens).logits, again(tokens).logits)
        assert not torch.allclose(first(tokens).logits, other(tokens).logits)
