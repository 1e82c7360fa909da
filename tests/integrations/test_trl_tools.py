"""TRL's tool loop and environments, end to end: a policy that calls a tool, gets its answer and goes on."""

from __future__ import annotations

import functools
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
from trl.chat_template_utils import add_response_schema

from atlas_rl import AtlasRolloutEngine
from tests.models import tiny_llama
from tests.trainers import arguments, with_special_tokens

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>'
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
DATA = Dataset.from_list([{"prompt": [{"role": "user", "content": f"What is 3 and {n}?"}]} for n in range(8)])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and a whole tool call as one token, so that a tiny policy calls tools often; Qwen3's chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    base.decoder = decoders.ByteLevel()
    base.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    base.add_tokens([AddedToken(CALL, normalized=False)])
    template = files("trl").joinpath("chat_templates/qwen3.jinja").read_text()
    made = PreTrainedTokenizerFast(
        tokenizer_object=base, pad_token=SPECIAL[0], eos_token=SPECIAL[2], chat_template=template
    )
    return add_response_schema(made)


def policy(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Ends its turn, calls the tool or says a letter, in this order of likelihood."""
    model = tiny_llama(vocab=len(tokenizer), seed=1, context=2048)
    head = nn.Linear(model.config.hidden_size, len(tokenizer))
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight * 0.5)
        head.bias.zero_()
        for token, lift in ((SPECIAL[2], 9.0), (CALL, 8.0), ("a", 6.0)):
            head.bias[tokenizer.convert_tokens_to_ids(token)] = lift
    model.set_output_embeddings(head)
    return with_special_tokens(model, pad=tokenizer.pad_token_id, eos=tokenizer.eos_token_id)


class Calculator:
    """An environment, whose public methods are the tools; it notes the calls in `calls`."""

    def __init__(self, calls: list[tuple[int, int]]) -> None:
        self._calls = calls

    def reset(self, **kwargs: Any) -> None:
        pass

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first.
            b: The second.

        Returns:
            Their sum.
        """
        self._calls.append((a, b))
        return a + b


@pytest.mark.parametrize("way", ["tools", pytest.param("environment", marks=pytest.mark.slow)])
def test_tool_calls_are_answered_and_generation_goes_on(way: str, tokenizer: Any, tmp_path: Path) -> None:
    completions_seen: list[list[dict[str, Any]]] = []
    calls: list[tuple[int, int]] = []

    def rewards(completions: list[list[dict[str, Any]]], **kwargs: Any) -> list[float]:
        completions_seen.extend(completions)
        return [float(len(completion)) for completion in completions]

    calculator = functools.partial(Calculator, calls)
    trainer = GRPOTrainer(
        model=policy(tokenizer),
        reward_funcs=rewards,
        args=arguments(
            GRPOConfig,
            tmp_path,
            max_completion_length=400,
            max_tool_calling_iterations=2,
            max_steps=2,
            learning_rate=1e-4,
        ),
        train_dataset=DATA,
        processing_class=tokenizer,
        **({"tools": [calculator().add]} if way == "tools" else {"environment_factory": calculator}),
    )
    engine = AtlasRolloutEngine(console=False).attach(trainer)
    trainer.train()
    check_conversations(completions_seen)
    roles = [message["role"] for completion in completions_seen for message in completion]
    assert calls == [(3, 4)] * roles.count("tool")
    frequencies = [row["tools/call_frequency"] for row in trainer.state.log_history if "tools/call_frequency" in row]
    assert sum(frequencies) * 8 == pytest.approx(len(calls))
    # One report per training step covers the first generation and those of the tool loop: a request per turn.
    assert len(engine.reports) == 2
    assert sum(report.num_requests for report in engine.reports) == roles.count("assistant") > 2 * 8


def check_conversations(completions: list[list[dict[str, Any]]]) -> None:
    """Some completions call the tool, and the policy goes on after every answer: only a regeneration can have made that."""
    answered = [completion for completion in completions if any(message["role"] == "tool" for message in completion)]
    assert answered
    for completion in answered:
        roles = [message["role"] for message in completion]
        assert all(message["content"] == "7" for message in completion if message["role"] == "tool")
        assert roles[0] == roles[-1] == "assistant"
        assert all(roles[i + 1] in ("assistant", "tool") for i, role in enumerate(roles[:-1]) if role == "tool")
