"""Every code block of the pages is run, or checked against the parser of its command, or says why it is not.

Python blocks of a page run one after the other, in one namespace and a folder of their own. They find a tiny policy, its
tokenizer, prompts, and TRL's trainer with what `...` stands for filled in. Commands are not run: their flags are looked up
(those of vLLM in tests/vllm/test_serve.py, where vLLM is loaded). A block that can be neither stands below
`<!-- not run: REASON -->`.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl
import yaml
from accelerate.commands.launch import launch_command_parser

from atlas_rl import AtlasRolloutEngine, cli
from atlas_rl.integrations.trl.script import make_parser, trl_script
from tests import ROOT
from tests.models import tiny_llama
from tests.pages import PAGES, Block, blocks_of, blocks_of_pages, broken_links, commands_of
from tests.trainers import DATA, WORDS, arguments, build_trainer, rewards, with_special_tokens, word_tokenizer

NOT_CODE = ("", "text", "json")
BLOCKS = [block for block in blocks_of_pages() if block.language not in NOT_CODE]
RUN = [block for block in BLOCKS if not block.reason]
PYTHON_PAGES = list(dict.fromkeys(block.page for block in RUN if block.language == "python"))


def given(options: dict[str, Any]) -> dict[str, Any]:
    """What a block gives, without what it leaves to its reader."""
    return {name: value for name, value in options.items() if value is not ...}


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accelerate_anew: None) -> dict[str, Any]:
    """Names that blocks take for granted; TRL's classes train a tiny policy for a step where a block says `...`."""
    monkeypatch.chdir(tmp_path)
    own_trainer, policy, tokenizer = trl.GRPOTrainer, with_special_tokens(tiny_llama(vocab=16)), word_tokenizer()

    def config(*_: Any, **options: Any) -> Any:
        return arguments(own_config, tmp_path / "trainer", **({"max_steps": 1} | given(options)))

    def trainer(*_: Any, **options: Any) -> Any:
        filled = {"model": policy, "reward_funcs": rewards, "args": config(), "train_dataset": DATA}
        return own_trainer(**(filled | {"processing_class": tokenizer} | given(options)))

    own_config = trl.GRPOConfig
    monkeypatch.setattr(trl, "GRPOTrainer", trainer)
    monkeypatch.setattr(trl, "GRPOConfig", config)
    return {
        "AtlasRolloutEngine": AtlasRolloutEngine,
        "policy": policy,
        "tokenizer": tokenizer,
        "trainer": build_trainer(
            "grpo", with_special_tokens(tiny_llama(vocab=len(WORDS))), tokenizer, tmp_path / "own"
        ),
        "batches": [[[2, 3, 4], [5, 6]], [[2, 3, 4], [5, 6]]],
        "train_on": lambda *_: None,
    }


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_the_python_of_a_page_runs(page: str, namespace: dict[str, Any]) -> None:
    for block in RUN:
        if block.page == page and block.language == "python":
            exec(compile(block.text, block.where, "exec"), namespace)


def flags_in(file: Path) -> set[str]:
    """Flags that a script gives its parser, or has `short_run.add_options` give it."""
    calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    shared = any(isinstance(call.func, ast.Name) and call.func.id == "add_options" for call in calls)
    added = [call.args for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
    own = {arg.value for args in added for arg in args if isinstance(arg, ast.Constant) and arg.value.startswith("-")}
    return own | flags_in(ROOT / "examples/grpo_demo/short_run.py") if shared else own


@cache
def grpo_flags() -> set[str]:
    actions = make_parser(trl_script(), AtlasRolloutEngine)._actions
    return {flag for action in actions for flag in action.option_strings} | {"--config"}


def check_flags(words: list[str], known: set[str]) -> None:
    unknown = [word for word in words if word.startswith("-") and word.split("=")[0] not in known]
    assert not unknown, f"no such option: {unknown}"


def check_atlas_rl(words: list[str]) -> None:
    if words[0] == "grpo":
        check_flags(words[1:], grpo_flags())
    else:
        cli.parse(words)


def check_python(words: list[str]) -> None:
    if words[:2] == ["-m", "pytest"]:
        return
    if words[:2] == ["-m", "atlas_rl"]:
        return check_atlas_rl(words[2:])
    path = words[1].replace(".", "/") if words[0] == "-m" else words[0].removesuffix(".py")
    file = next((each for each in (ROOT / f"{path}.py", ROOT / path / "__main__.py") if each.is_file()), None)
    assert file is not None, f"no such script: {words}"
    check_flags(words[1:][words[0] == "-m" :], flags_in(file) | {"--help"})


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_variable, value = word.partition("=")
        assert re.search(rf"^{name} \?=" if is_variable else rf"^{name}:", makefile, re.MULTILINE), f"no {name}"
        if name == "DEMO_ARGS":
            check_python(["examples/grpo_demo/run.py", *value.split()])


def check_pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"(?:atlas-rl|\.)\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


def check_accelerate(words: list[str]) -> None:
    parsed = launch_command_parser().parse_args(words[1:])
    config = parsed.config_file
    assert config is None or config.startswith("$") or (ROOT / config).is_file(), f"no {config}"
    check_python([*(["-m"] if parsed.module else []), parsed.training_script, *parsed.training_script_args])


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "atlas-rl": check_atlas_rl,
    ".venv/bin/atlas-rl": check_atlas_rl,
    "python": check_python,
    ".venv/bin/python": check_python,
    "make": check_make,
    "pip": check_pip,
    "accelerate": check_accelerate,
}


def check_shell(text: str) -> None:
    for program, *words in commands_of(text):
        assert program in CHECKS, f"nothing checks `{program}`: say why it is not run"
        CHECKS[program](words)


@pytest.mark.parametrize("block", [each for each in RUN if each.language == "bash"], ids=lambda block: block.where)
def test_commands_have_the_flags_that_a_page_gives_them(block: Block) -> None:
    check_shell(block.text)


@pytest.mark.parametrize("block", [each for each in RUN if each.language == "yaml"], ids=lambda block: block.where)
def test_yaml_has_keys_that_exist(block: Block) -> None:
    assert {f"--{name}" for name in yaml.safe_load(block.text)} <= grpo_flags()


@pytest.mark.parametrize(
    "command",
    ["atlas-rl report runs/demo --outputs x", "atlas-rl grpo --engin trl", "python -m benchmarks.table --fast", "make tset",
     "python examples/none.py", "make demo DEMO_ARGS=--fast", "pip install '.[trll]'", "vllm serve x",
     "accelerate launch -m atlas_rl grpo --draft_modl x", "make test && make tset"],
)  # fmt: skip
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        check_shell(command)


def test_every_block_is_run_or_says_why_not() -> None:
    others = [block.where for block in RUN if block.language not in ("python", "bash", "yaml")]
    assert not others, "give it a fence and its language (text for what is no code), or say above why it is not run"
    assert len(RUN) > len(BLOCKS) / 2
    assert {"README.md", "docs/replay.md"} <= set(PYTHON_PAGES)


def test_blocks_are_found() -> None:
    text = "# A\n\n```python\na\n```\n\n<!-- not run: b -->\n```bash\nc\n```\n\n    d\n\n- e\n\n    f\n\ng\n\n    h\n"
    found = [(block.language, block.text.strip(), block.reason) for block in blocks_of("x.md", text)]
    assert found == [("python", "a", ""), ("bash", "c", "b"), ("indented", "d", ""), ("indented", "h", "")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page)


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    names = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    missing = [name for name in names if f"({name}" not in index]
    assert not missing, "add them to docs/README.md"


def test_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs" / "supported.md").read_text(encoding="utf-8")
    wanted = dict(re.findall(r"^\| (\w+) \| `([^`]+)` \|", page, re.MULTILINE))
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    found = dict(re.match(r"([\w.-]+)(.*)", line).groups() for line in [*project["dependencies"], *extras])
    found["Python"] = project["requires-python"]
    assert len(wanted) == 7
    assert wanted == {name: found[name].split(";")[0] for name in wanted}
