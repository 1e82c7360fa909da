"""Writes the pages of `docs/` that repeat the code: options, metrics and warnings.

    python -m atlas_rl.pages               # into docs/
    python -m atlas_rl.pages --output DIR

Every sentence of the tables stands in the code: help texts and docstrings, and the list of warnings. A test compares the
pages with what this writes.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from atlas_rl.config import EngineConfig
from atlas_rl.core import SamplingParams
from atlas_rl.docstrings import entries, text
from atlas_rl.engine import AtlasRolloutEngine
from atlas_rl.integrations.trl.script import engine_arguments
from atlas_rl.report.advice import LOGGED, REPORTED, Explained
from atlas_rl.report.report import ORIGIN, StepReport
from atlas_rl.report.sinks import METRIC_FAMILIES, METRICS
from atlas_rl.report.units import unit_of
from atlas_rl.rollout.engine import RolloutEngine

_MADE = "<!-- Made by `python -m atlas_rl.pages`: change the docstrings that it reads, not this file. -->"
_COUNTED = {"warnings": ("number", "How many warnings the report of the step has.")}
"""Figures of which the trainer's log gets the number alone: unit and meaning there."""
_MEMBERS = {"acceptance_at": "POSITION"}  # of a family of metrics; the others have a drafter's name


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the pages."""
    parser = argparse.ArgumentParser(prog="python -m atlas_rl.pages", description="Write the pages made from the code.")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder of the pages [docs]")
    folder = parser.parse_args(arguments).output
    for name, make in PAGES.items():
        (folder / name).write_text(make(), encoding="utf-8")
        print(f"written: {folder / name}")


def options_page() -> str:
    """`docs/options.md`."""
    of_engine = entries(RolloutEngine, "Args")
    rows = [[f"`{name}`", "`None`", of_engine[name]] for name in ("model", "tokenizer")]
    helps = entries(EngineConfig, "Attributes")
    rows += [[f"`{each.name}`", _default(each.default), helps[each.name]] for each in fields(EngineConfig)]
    on_the_command_line = [f"`{each.name}`" for each in fields(engine_arguments(AtlasRolloutEngine))]
    return _page(
        "Options",
        "No option has to be set. A name that does not exist is refused, with the nearest one that does.",
        "## `AtlasRolloutEngine(...)`",
        _table(("option", "default", "meaning"), rows),
        "## `attach(trainer, ...)`",
        _table(("option", "default", "meaning"), _arguments_of(AtlasRolloutEngine.attach, ("baseline_every",))),
        "## `generate(prompts, ...)`",
        "With a trainer, these come from the trainer's configuration.",
        _table(("option", "default", "meaning"), _of_generate()),
        "## `atlas-rl grpo`",
        "The command takes every option of `trl grpo`, in a YAML file (`--config run.yaml`) and on the command line, and "
        f"these: {', '.join(on_the_command_line)}. `output_dir` is the trainer's: reports lie beside its checkpoints. "
        "`engine: trl` generates with TRL alone, to compare with: its figures are in the trainer's log, and it writes no "
        "file for `atlas-rl compare`. For that command `speculation: false` is the baseline.",
        "```yaml\n# run.yaml\nmodel_name_or_path: path/to/policy\ndataset_name: path/to/dataset\n"
        "reward_funcs: [think_format_reward]  # of TRL: needs prompts that are lists of messages\n"
        "output_dir: runs/first\nbaseline_every: 10\n"
        "# bf16: false  # without a GPU: TRL trains in bfloat16 unless told\n```",
        "```bash\natlas-rl grpo --config run.yaml\natlas-rl grpo --config run.yaml --engine trl --output_dir runs/trl\n"
        "accelerate launch --num_processes 2 -m atlas_rl grpo --config run.yaml\n```",
        "The commands `report`, `compare`, `plan`, `doctor` and `train-speculator` list their options with `--help`.",
        "## A vLLM server",
        "`atlas-rl vllm-serve MODEL --draft-model FOLDER` adds the static head; all other flags are vLLM's "
        "([vllm.md](vllm.md#in-a-server)).",
        "## Environment",
        _table(
            ("variable", "meaning"),
            [
                ["`ATLAS_RL_CACHE`", "folder of compiled CPU kernels and of what was measured on this machine "
                 "[`$XDG_CACHE_HOME/atlas_rl`, or `~/.cache/atlas_rl`]"],
                ["`NUMBA_CACHE_DIR`", "folder of compiled CPU kernels alone, as numba knows it"],
            ],
        ),
    )  # fmt: skip


def metrics_page() -> str:
    """`docs/metrics.md`."""
    derived = {name: text(value) for name, value in vars(StepReport).items() if isinstance(value, property)}
    meanings = entries(StepReport, "Attributes") | derived | ORIGIN
    names = [(name, figure) for name, figure in METRICS.items()]
    names += [(f"{family}/{_MEMBERS.get(family, 'DRAFTER')}", each) for family, each in METRIC_FAMILIES.items()]
    logged = []
    for name, figure in names:
        unit, meaning = _COUNTED.get(name, (_single(unit_of(figure)), _first_sentence(meanings[figure])))
        logged.append([f"`atlas/{name}`", unit, f"`{figure}`", meaning])
    fields_of_line = [[f"`{name}`", unit_of(name), meaning] for name, meaning in meanings.items()]
    return _page(
        "Metrics",
        "Every figure comes from the report of a step. With several ranks a report covers all of them: counts add up, and "
        "seconds are those of the slowest rank.",
        "## In the trainer's log",
        "TRL logs these beside its own metrics, so they reach Trackio, TensorBoard, W&B and whatever `report_to` names. "
        "Figures of an evaluation are called `eval_atlas/...`. A figure that is not known is left out. `DRAFTER` is "
        "`history`, `recurrent` or the name of another drafter, `POSITION` is 0, 1, ... within a draft. The next table "
        "says more of each key.",
        _table(("name", "unit", "key", "meaning"), logged),
        "## In `rollouts.jsonl`",
        "One line per step, with these keys. A figure that is not known is `null`. "
        "[report.md](report.md) makes a page of the file.",
        _table(("key", "unit", "meaning"), fields_of_line),
    )


def warnings_page() -> str:
    """`docs/warnings.md`."""
    return _page(
        "Warnings",
        "Three dots stand for what varies. None of these stops a run, and none changes a token.",
        "## In reports",
        "The console prints them below the step's line, the page of a run shows them with what to do, and `warnings` in "
        "`rollouts.jsonl` holds them.",
        _table(("warning", "cause", "what to do"), _explained(REPORTED)),
        "## In the log",
        "Python's `logging` has them, as `atlas_rl: ...`. Some are there to be seen once, and ask for nothing.",
        _table(("warning", "cause", "what to do"), _explained(LOGGED)),
    )


PAGES: dict[str, Callable[[], str]] = {
    "options.md": options_page,
    "metrics.md": metrics_page,
    "warnings.md": warnings_page,
}
"""Files of `docs/` and what writes them."""


def _of_generate() -> list[list[str]]:
    """Options of `generate`; sampling parameters are described as in `SamplingParams`."""
    names = [name for name in inspect.signature(RolloutEngine.generate).parameters if name not in ("self", "unknown")]
    sampling = entries(SamplingParams, "Args")
    of_generate = ("prompts", "num_generations", "max_new_tokens", "eos_token_ids", "seed")
    rows = _arguments_of(RolloutEngine.generate, names)
    return [[option, default, meaning if name in of_generate else sampling[name]]
            for name, (option, default, meaning) in zip(names, rows, strict=True)]  # fmt: skip


def _arguments_of(function: Callable[..., Any], names: Iterable[str]) -> list[list[str]]:
    parameters, texts = inspect.signature(function).parameters, entries(function, "Args")
    return [[f"`{name}`", _default(parameters[name].default), texts[name]] for name in names]


def _default(value: Any) -> str:
    if value in (MISSING, inspect.Parameter.empty):
        return "-"
    named = f"{value.__module__}.{value.__name__}" if callable(value) else repr(value).replace("'", '"')
    return f"`{named}`"


def _single(unit: str) -> str:
    """The unit of one member of a figure with several members."""
    return unit.split(",")[0].split(" by ")[0]


def _first_sentence(meaning: str) -> str:
    return re.split(r"(?<=\.) (?=[A-Z])", meaning)[0]


def _explained(warnings: Iterable[Explained]) -> list[list[str]]:
    return [[each.says, each.cause, each.cure] for each in warnings]


def _page(title: str, *parts: str) -> str:
    return "\n\n".join((f"# {title}", _MADE, *parts)) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, one row a line; special characters are escaped."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
