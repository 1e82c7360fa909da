"""Requests whose text is forced in part, by a grammar or by a limit of thinking: drafts change nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from atlas_rl.controller.fixed import FixedController, NoSpeculation
from atlas_rl.decode.guard import GuardedController, GuardedSpeculator
from atlas_rl.vllm.internals import drafter_of
from tests.drafters import RandomDrafter, Recalled, Stateless
from tests.models import tiny_bigram
from tests.vllm_engines import completions, engine  # first: it skips this module where there is no vLLM

ALPHABET = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
EOS, K = 0, 4
PATTERNS = [r"(ab|cd){2,9}e", r"[0-9]{3,12}", None, r"x(yz)*w"]
PROMPTS = [[20 + i, 30, 40 + i] for i in range(len(PATTERNS))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    policy = tiny_bigram(vocab=len(ALPHABET), hidden=64, heads=2, kv_heads=2, layers=1, context=128, logit_std=2.0)
    policy.config.eos_token_id = policy.generation_config.eos_token_id = EOS
    policy.save_pretrained(path)
    base = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(ALPHABET)}, merges=[]))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=base, eos_token="<eos>").save_pretrained(path)
    return path


def params(temperature: float) -> list[Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    return [
        SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=30,
            structured_outputs=None if pattern is None else StructuredOutputsParams(regex=pattern),
        )
        for seed, pattern in enumerate(PATTERNS)
    ]


def test_texts_fit_their_grammar_whatever_is_drafted(folder: Path) -> None:
    llm = engine(folder, max_num_seqs=8, skip_tokenizer_init=False)
    plain = engine(folder, max_num_seqs=8, skip_tokenizer_init=False, speculative_config=None)
    proposer: Any = drafter_of(llm)
    proposer.prepare()
    own = proposer.drafting

    def draft_with(speculator: Stateless) -> None:
        controller = GuardedController(FixedController([speculator.name], speculator.name, K), own.faults)
        own.use({speculator.name: GuardedSpeculator(speculator, own.faults)}, controller)

    def ask(one: Any, temperature: float) -> Any:
        return one.generate([{"prompt_token_ids": p} for p in PROMPTS], params(temperature), use_tqdm=False)

    for temperature in (0.0, 1.0):
        own.use({}, NoSpeculation())
        answers = ask(llm, temperature)
        expected = completions(answers)
        for pattern, answer in zip(PATTERNS, answers, strict=True):
            ended = answer.outputs[0].finish_reason == "stop"
            assert pattern is None or not ended or re.fullmatch(pattern, answer.outputs[0].text)
        assert any(answer.outputs[0].finish_reason == "stop" for answer in answers)
        if temperature == 0:
            assert expected == completions(ask(plain, temperature))
        for speculator in (Recalled(zip(PROMPTS, expected, strict=True), K), RandomDrafter()):
            own.take_report()
            draft_with(speculator)
            assert completions(ask(llm, temperature)) == expected
            report = own.take_report()
            assert report.drafter_faults == {}
            assert report.warnings == ()
            if speculator.name == "recalled":
                assert report.accepted["recalled"] > 10


def test_a_limit_of_thinking_applies_at_the_same_token_whatever_is_drafted(folder: Path) -> None:
    """vLLM counts drafts as thinking before they are accepted, so these requests get none; their neighbours do."""
    from vllm import SamplingParams
    from vllm.config import ReasoningConfig

    llm = engine(
        folder,
        max_num_seqs=8,
        skip_tokenizer_init=False,
        reasoning_config=ReasoningConfig(reasoning_start_str="x", reasoning_end_str="yz"),
    )
    proposer: Any = drafter_of(llm)
    proposer.prepare()
    own = proposer.drafting
    start, end = ALPHABET.index("x"), [ALPHABET.index(letter) for letter in "yz"]
    prompts = [[*prompt, start] for prompt in PROMPTS]
    each = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=30, ignore_eos=True, thinking_token_budget=budget)
        for i, budget in enumerate((4, 7, None, None))
    ]

    def ask() -> list[list[int]]:
        return completions(llm.generate([{"prompt_token_ids": p} for p in prompts], each, use_tqdm=False))

    own.use({}, NoSpeculation())
    expected = ask()
    assert [text[budget : budget + 2] for text, budget in zip(expected, (4, 7), strict=False)] == [end, end]
    for speculator in (Recalled(zip(prompts, expected, strict=True), K), RandomDrafter()):
        own.take_report()
        controller = GuardedController(FixedController([speculator.name], speculator.name, K), own.faults)
        own.use({speculator.name: GuardedSpeculator(speculator, own.faults)}, controller)
        assert ask() == expected
        report = own.take_report()
        assert report.drafter_faults == {}
        assert report.drafted[speculator.name] > 0
