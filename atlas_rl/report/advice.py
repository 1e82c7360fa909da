"""What to do about each warning of a report."""

from __future__ import annotations

import re

ADVICE: tuple[tuple[str, str], ...] = (
    (
        r"verified drafts was accepted; its state was lost",
        "If a saved state was loaded, check that it is of this policy and tokenizer. A drafter of your own: check that its "
        "tokens are the policy's. It costs speed only.",
    ),
    (
        r"asked for drafts during the whole step and proposed none",
        "Take this drafter out of `speculators` if it goes on. In the first steps a drafter may have nothing to say yet.",
    ),
    (
        r"memory for the attention cache ran short",
        "Set `max_batch_size` lower, or leave the engine more memory. The tokens are right; the step was slower.",
    ),
    (
        r"logits are not finite",
        "Stop the training: the policy's weights hold NaN or infinity. Go back to a checkpoint and lower the learning "
        "rate, or look for an overflow in half precision.",
    ),
    (
        r"audit: .* have probability 0",
        "Stop and look before training on: compare temperature, top-k, top-p and min-p of engine and trainer, and check "
        "that new weights reach the engine.",
    ),
    (
        r"audit: .* are not the policy's choice",
        "Check that new weights reach the engine. If they do, please report it with the policy's class and versions: the "
        "engine's forward differs from the policy's.",
    ),
    (
        r"audit: returned logprobs differ .*processed_logprobs",
        "Set vLLM's `logprobs_mode='processed_logprobs'`.",
    ),
    (
        r"audit: returned logprobs differ",
        "Check that new weights reach the engine after every update, and that engine and trainer sample alike.",
    ),
    (
        r"audit: the sampled tokens are not drawn from the policy",
        "Stop and look before training on: docs/audit.md says what each finding means. Compare the sampling options of "
        "engine and trainer.",
    ),
    (
        r"raised .*it is off until the next policy update",
        "The log has the traceback. The tokens are right, and the step was slower. For a drafter of your own: repair it; "
        "for one of ours: please report it.",
    ),
    (
        r"its tensors changed between two calls",
        "Use vLLM's sleep level 1, or send new weights after waking, so that the drafters are refreshed.",
    ),
    (
        r"speculation is silently disabled",
        "Compare vLLM's options with docs/vllm.md: something in them keeps vLLM from verifying drafts.",
    ),
    (
        r"accepted length collapsed",
        "Call `policy_updated()` (or `load_weights`) after every optimizer step, so that the drafters follow the policy.",
    ),
    (
        r"completions differ from the rerun without speculation",
        "In float16 and bfloat16 a few are expected. In float32 please report it with the policy's class and versions.",
    ),
    (
        r"tokens for others meanwhile",
        "Give the trainer a server of its own. Its tokens are right; only the figures of drafting and the rate are mixed.",
    ),
)
"""Pairs of a pattern and what to do. The first that is found in a warning holds."""

UNKNOWN = "The sentence names the cause. docs/vllm.md and docs/audit.md explain most of them."


def advice_for(warning: str) -> str:
    """What to do about a warning; `UNKNOWN` for one that is in no list, such as a later version's."""
    return next((advice for pattern, advice in ADVICE if re.search(pattern, warning, re.DOTALL)), UNKNOWN)
