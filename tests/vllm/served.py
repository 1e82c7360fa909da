"""The policy of the tests with a server, requests to it, and trainers that generate with it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import tiny_bigram
from tests.trainers import WORDS, build_trainer, with_special_tokens, word_tokenizer
from tests.vllm_server import call, free_port, post

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


def learned_s(address: str, begun: bool = True) -> float:
    """Seconds that a server's drafters learned in idle time since the last report.

    Args:
        address: The server.
        begun: Wait until they have begun.
    """
    until, found = time.monotonic() + LIMIT_S, 0.0
    while True:
        found += float(call(address, "atlas_report")["idle_learning_s"])
        if found or not begun:
            return found
        assert time.monotonic() < until, "they do not learn"
        time.sleep(0.01)


def check_idle_learning(address: str) -> None:
    """They learn while the server waits, after enough tokens, until something arrives, which does not wait for the end."""
    wanted = tokens_of(complete(address, 99, n=1)[0])
    texts = [[tokens_of(choice) for choice in complete(address, seed)] for seed in range(5)]  # 2,400 tokens
    assert learned_s(address) > 0
    assert tokens_of(complete(address, 99, n=1)[0]) == wanted
    learned_s(address, begun=False)  # what they had learned before it arrived
    assert learned_s(address, begun=False) == 0
    assert [[tokens_of(choice) for choice in complete(address, seed)] for seed in range(5)] == texts
    assert learned_s(address) > 0
    call(address, "atlas_policy_updated")
    report = call(address, "atlas_report")
    assert 0 < report["refresh_s"] < report["generate_s"]
    assert learned_s(address, begun=False) == 0, "the rollouts are an older policy's now"


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
