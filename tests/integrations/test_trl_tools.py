"""TRL's tool loop and environments, end to end: a policy that calls a tool, gets its answer and goes on."""

from __future__ import annotations

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
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


class Calculator:
    """An environment: its public methods are the tools."""

    def reset(self, **kwargs: Any) -> None:
        self.results: list[int] = []

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first.
            b: The second.

        Returns:
            Their sum.
        """
        self.results.append(a + b)
        return a + b


@pytest.mark.parametrize("way", ["tools", pytest.param("environment", marks=pytest.mark.slow)])
def test_tool_calls_are_answered_and_generation_goes_on(way: str, tokenizer: Any, tmp_path: Path) -> None:
    seen: list[list[dict[str, Any]]] = []
    called: list[tuple[int, int]] = []

    def rewards(completions: list[list[dict[str, Any]]], **kwargs: Any) -> list[float]:
        seen.extend(completions)
        return [float(len(completion)) for completion in completions]

    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first.
            b: The second.

        Returns:
            Their sum.
        """
        called.append((a, b))
        return a + b

    extra: dict[str, Any] = {"tools": [add]} if way == "tools" else {"environment_factory": Calculator}
    trainer = GRPOTrainer(
        model=policy(tokenizer),
        reward_funcs=rewards,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=200,
            max_tool_calling_iterations=2,
            max_steps=2,
            learning_rate=1e-4,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            beta=0.0,
        ),
        train_dataset=DATA,
        processing_class=tokenizer,
        **extra,
    )
    engine = AtlasRolloutEngine(console=False).attach(trainer)
    trainer.train()
    answered = [completion for completion in seen if any(message["role"] == "tool" for message in completion)]
    assert answered
    for completion in answered:
        roles = [message["role"] for message in completion]
        assert all(message["content"] == "7" for message in completion if message["role"] == "tool")
        assert roles[0] == "assistant"
        # Every answer is followed by another turn of the policy, which only a regeneration can have made.
        assert all(roles[i + 1] in ("assistant", "tool") for i, role in enumerate(roles[:-1]) if role == "tool")
        assert roles[-1] == "assistant"
    if way == "tools":
        assert called
        assert set(called) == {(3, 4)}
    frequencies = [row["tools/call_frequency"] for row in trainer.state.log_history if "tools/call_frequency" in row]
    assert max(frequencies) > 0
    # One report per training step covers the first generation and those of the tool loop.
    assert len(engine.reports) == 2
    assert sum(report.num_requests for report in engine.reports) > 2 * 8
