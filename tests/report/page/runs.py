"""Report files for the tests of the page: written line by line, and by real engines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from atlas_rl import AtlasRolloutEngine
from atlas_rl.report.page.reading import Run
from atlas_rl.report.report import StepReport
from tests.engines import engine_of, generate
from tests.models import tiny_llama
from tests.reports import make_report

OFF = {"drafted": {}, "accepted": {}, "drafted_by_position": (), "accepted_by_position": (), "no_speculation_s": None}
"""Changes that make a report one of a step without speculation."""


def write(folder: Path, lines: Iterable[tuple[str, int, StepReport]]) -> Path:
    """A report file of (engine, rank, report)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"engine": engine, "rank": rank, **report.to_dict()}) for engine, rank, report in lines]
    (folder / "rollouts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def steps(numbers: Iterable[int], **changes: object) -> list[StepReport]:
    return [make_report(**{"step": n, "policy_version": n} | changes) for n in numbers]


def run_of(reports: Iterable[StepReport], name: str = "run") -> Run:
    reports = tuple(reports)
    return Run(name, reports[0].mode, reports, ())


@cache
def real_folder(speculation: bool = True) -> Path:
    """The folder of a real engine that generated a few times."""
    folder = Path(mkdtemp())
    engine = engine_of(output_dir=folder, speculation=speculation, audit_share=0.5)
    for call in range(4):
        generate(engine, seed=call)
        engine.policy_updated()
    return folder


@cache
def grpo_folder() -> Path:
    """The folder of a tiny GRPO run, of which every generation was repeated without speculation."""
    from tests.trainers import WORDS, build_trainer, with_special_tokens, word_tokenizer

    folder = Path(mkdtemp())
    policy = with_special_tokens(tiny_llama(vocab=len(WORDS), seed=1, context=64))
    trainer = build_trainer("grpo", policy, word_tokenizer(), folder)
    AtlasRolloutEngine(output_dir=folder, console=False).attach(trainer, baseline_every=1)
    trainer.train()
    return folder


def long_run(reports: Iterable[StepReport], num_steps: int) -> list[StepReport]:
    """Real reports over and over, as the steps of a long training run with measured reruns and warnings."""
    reports = list(reports)
    found = []
    for n in range(num_steps):
        report = reports[n % len(reports)]
        warned = ("history: asked for drafts during the whole step and proposed none",) if n % 97 == 3 else ()
        plain = report.tokens_per_s * (0.8 + 0.001 * (n % 100)) if n % 20 == 0 else None
        found.append(
            replace(
                report,
                step=n,
                policy_version=n,
                mode="train",
                step_s=2 * report.generate_s,
                warnings=warned,
                baseline_tokens_per_s=plain,
            )
        )
    return found
