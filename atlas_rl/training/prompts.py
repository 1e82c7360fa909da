"""Reads prompts from a file or a dataset and checks each before any work; errors name the line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

_FORMS = (
    "--data takes a .jsonl file (objects with a field `prompt`), a .txt file (one prompt per line), or a folder that "
    "datasets saved"
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    Attributes:
        where: Place in the file, for messages.
        token_ids: Its tokens.
    """

    where: str
    token_ids: list[int]


def read_prompts(path: Path, tokenizer: Any) -> list[Prompt]:
    """Prompts as token ids; messages and texts go through the chat template if the tokenizer has one.

    Raises:
        ValueError: No prompts, an unknown file type, or an invalid prompt; the message names the line.
    """
    if path.is_dir():
        rows = _dataset_rows(path)
    elif not path.is_file():
        raise ValueError(f"no prompts at '{path}': {_FORMS}")
    elif path.suffix.lower() not in (".jsonl", ".txt"):
        raise ValueError(f"'{path}' is a file of the type '{path.suffix}': {_FORMS}")
    else:
        rows = _file_rows(path)
    if not rows:
        raise ValueError(f"'{path}' holds no prompts")
    return [Prompt(where, _token_ids(value, tokenizer, where)) for where, value in rows]


def check_prompts(prompts: Sequence[Prompt], vocab_size: int, max_context: int | None) -> None:
    """Raise `ValueError` for a prompt that the policy cannot run.

    Args:
        prompts: All prompts.
        vocab_size: The policy's vocabulary size.
        max_context: Longest prompt, in tokens; None if the policy has no limit.
    """
    for prompt in prompts:
        ids = prompt.token_ids
        if not ids:
            raise ValueError(f"{prompt.where}: the prompt has no tokens")
        bad = next((token for token in ids if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise ValueError(
                f"{prompt.where}: the tokenizer gives token {bad}, outside the policy's vocabulary of {vocab_size} tokens"
            )
        if max_context is not None and len(ids) > max_context:
            raise ValueError(
                f"{prompt.where}: the prompt has {len(ids)} tokens, more than the policy's context of {max_context}"
            )


def _file_rows(path: Path) -> list[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8 ({error})") from error
    # Not `splitlines`, which also splits at characters that JSON allows within a string.
    lines = [(f"'{path}', line {number}", line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(where, line) for where, line in lines if line]
    return [(where, _field(line, where)) for where, line in lines] if path.suffix.lower() == ".jsonl" else list(lines)


def _field(line: str, where: str) -> Any:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not a JSON object with a field `prompt` ({error})") from error
    if not isinstance(row, dict) or "prompt" not in row:
        raise ValueError(f"{where}: not a JSON object with a field `prompt`")
    return row["prompt"]


def _dataset_rows(path: Path) -> list[tuple[str, Any]]:
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as error:
        raise ValueError(f"'{path}' is a folder, and reading it needs datasets: pip install datasets") from error
    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' is no folder saved by datasets: {_FORMS}") from error
    if not isinstance(dataset, Dataset):
        raise ValueError(f"'{path}' holds the splits {', '.join(dataset)}: give the folder of one of them")
    if "prompt" not in dataset.column_names:
        raise ValueError(f"'{path}' has no column `prompt`, only {', '.join(dataset.column_names)}")
    return [(f"'{path}', row {number}", value) for number, value in enumerate(dataset["prompt"])]


def _token_ids(prompt: Any, tokenizer: Any, where: str) -> list[int]:
    if not isinstance(prompt, str) and not _are_messages(prompt):
        raise ValueError(f"{where}: a prompt is a text or a list of messages with role and content, got {prompt!r:.80}")
    if tokenizer.chat_template is None:
        if not isinstance(prompt, str):
            raise ValueError(f"{where}: the tokenizer has no chat template for messages: give the prompt as a text")
        return list(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{where}: the chat template refuses the prompt ({' '.join(str(error).split())})") from error
    return list(encoded["input_ids"])


def _are_messages(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(map(_is_message, prompt))


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
