"""Shapes of new heads, for policies whose configuration lacks what a plain decoder has."""

from __future__ import annotations

from transformers import BloomConfig, BloomForCausalLM

from atlas_rl.policy.view import InProcessView
from atlas_rl.training.head_shape import head_config


def test_a_policy_without_positions_gets_a_head_with_enough_of_them():
    config = BloomConfig(hidden_size=64, n_layer=4, n_head=4, vocab_size=100)
    assert not hasattr(config, "max_position_embeddings")
    head = head_config(InProcessView(BloomForCausalLM(config)), (1, 2, 3), 10)
    assert head.layer.max_position_embeddings >= 100_000
    assert (head.layer.num_attention_heads, head.layer.intermediate_size) == (4, 256)
