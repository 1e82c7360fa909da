"""The policy of the tests with a server, requests to it, and trainers that generate with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import tiny_bigram
from tests.trainers import WORDS, build_trainer, with_special_tokens, word_tokenizer
from tests.vllm_server import free_port, post

PROMPT = [2, 3, 4]
LIMIT_S = 400


def policy(seed: int, hidden: int = 64) -> Any:
    shape = {"vocab": len(WORDS), "hidden": hidden, "heads": 2, "kv_heads": 2, "context": 128}
    return with_special_tokens(tiny_bigram(**shape, seed=seed, logit_std=3.0))


def saved_policies(factory: pytest.TempPathFactory, *seeds: int) -> list[Path]:
    """Folders of versions of one policy, as a trainer would write them."""
    made = []
    for seed in seeds:
        path = factory.mktemp(f"policy{seed}")
        policy(seed).save_pretrained(path)
        word_tokenizer().save_pretrained(path)
        made.append(path)
    return made


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def complete(address: str, seed: int, **options: Any) -> Any:
    """Completions of `PROMPT`."""
    body = {"model": "policy", "prompt": PROMPT, "max_tokens": 60, "seed": seed, "n": 8}
    return post(address, "/v1/completions", body | {"ignore_eos": True, "logprobs": 1} | options)["choices"]


def tokens_of(choice: Any) -> list[int]:
    return [WORDS.index(word.strip()) for word in choice["logprobs"]["tokens"]]


def logprobs_by(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """What a policy gives each token of a completion, in nats."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits
    each = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return each.gather(1, torch.tensor(tokens)[:, None])[:, 0]


def check_logprobs(model: Any, choice: Any) -> None:
    """A completion of `PROMPT` has the logprobs that this policy gives it."""
    returned = torch.tensor(choice["logprobs"]["token_logprobs"])
    assert torch.allclose(returned, logprobs_by(model, PROMPT, tokens_of(choice)), atol=1e-3)


def build(model: Any, address: str, output: Path, **options: Any) -> Any:
    """A GRPO trainer in server mode."""
    server = {"vllm_mode": "server", "vllm_server_base_url": address, "vllm_group_port": free_port()}
    return build_trainer("grpo", model, word_tokenizer(), output, **(server | options))


def errors_of(trainer: Any) -> list[float]:
    """Has every generation of a trainer compare its logprobs with the trainer's own policy: largest difference in nats."""
    adapter, found = trainer.vllm_generation, []
    generate = adapter.generate

    def compared(*args: Any, **kwargs: Any) -> Any:
        prompts, completions, logprobs, token_ids = generate(*args, **kwargs)
        for prompt, completion, own in zip(prompts, completions, logprobs, strict=True):
            expected = logprobs_by(trainer.accelerator.unwrap_model(trainer.model), prompt, completion)
            found.append((expected - torch.tensor(own)[:, 0]).abs().max().item())
        return prompts, completions, logprobs, token_ids

    adapter.generate = compared
    return found
