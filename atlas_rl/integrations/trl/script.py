"""`atlas-rl grpo`: TRL's own script for GRPO, with its options and its YAML files, and the engine attached.

TRL's `trl.scripts.grpo` decides what is trained and how. Its parser gets one more group of options, made from the
fields of `EngineConfig`. The trainer that the script builds is attached to an engine before it trains.

Torch and TRL are imported after `read_arguments`, because they read the variables in the file's `env` when they are
imported.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, field, fields, make_dataclass
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, get_args, get_type_hints

from atlas_rl.checks import whole
from atlas_rl.docstrings import entries

COMMAND = "atlas-rl grpo"
_PLAIN = (bool, int, float, str)  # types that a command line and a YAML file can hold
_DESCRIPTION = (
    "GRPO by TRL's own script, with the engine attached. The options are those of `trl grpo` and the group atlas_rl. "
    "`--config FILE` reads them from a YAML file; the command line overrides it. Several processes: accelerate launch "
    "-m atlas_rl grpo ..."
)
_ENGINE_HELP = (
    "What generates: `atlas`, or `trl` for TRL's own generation, to compare with. `trl` takes no notice of the other "
    "options of this group."
)
_NEGATED = {
    "speculation": "Decode without drafts: the baseline, with the same tokens.",
    "console": "Do not print one line per report.",
    "spare_importance_sampling": "Leave the trainer's importance-sampling correction on.",
}
"""Help of `--no_NAME`, for each option of ours that is on by default."""


def read_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Arguments with `--config FILE` as TRL's parser expects it, and the file's content. Sets its `env` at once.

    Raises:
        ValueError: The file is not a YAML mapping, names an option twice, or not exactly one file is named.
        OSError: The file cannot be read.
    """
    spread = [part for each in arguments for part in (each.split("=", 1) if each.startswith("--config=") else [each])]
    if "--config" not in spread:
        return spread, {}
    if spread.index("--config") == len(spread) - 1:
        raise ValueError("--config needs a YAML file: --config run.yaml")
    if spread.count("--config") > 1:
        raise ValueError("--config is given twice: one file has all options, and the command line overrides them")
    path = Path(spread[spread.index("--config") + 1])
    config = _read_yaml(path)
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        raise ValueError(f"{path} must hold a YAML mapping of options, such as `learning_rate: 1.0e-6`")
    variables = config.pop("env", {})
    if not isinstance(variables, dict):
        raise ValueError(f"{path}: env must be a mapping of environment variables, got {variables!r}")
    if wrong := [name for name in variables if not isinstance(name, str) or not name or set("=\0") & set(name)]:
        raise ValueError(f"{path}: env has {wrong[0]!r}, which is no name of an environment variable")
    os.environ.update({str(name): str(value) for name, value in variables.items()})
    return spread, config


def _read_yaml(path: Path) -> Any:
    """The content of a YAML file; `ValueError` for invalid YAML or a repeated key.

    YAML forbids repeated keys, but PyYAML silently takes the last one.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            if twice := [key for i, key in enumerate(keys) if key in keys[:i]]:
                raise ValueError(f"{path} has '{twice[0]}' twice: leave one")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error


def prepare(arguments: Sequence[str], config: Mapping[str, Any], new_engine: Callable[..., Any]) -> Callable[[], None]:
    """Check everything, and return a function that trains like TRL's script.

    Args:
        arguments: Arguments of the command line, without the name of the command.
        config: Content of their YAML file.
        new_engine: The engine's class; this folder cannot import it.

    Raises:
        ValueError: An option does not exist (the message has the nearest name), or has an invalid value.
    """
    script = trl_script()
    parser = make_parser(script, new_engine)
    names = {action.dest for action in parser._actions} - {"help"}
    _check_names(config, names, arguments[arguments.index("--config") + 1] if config else "")
    _check_choices(config, parser._actions)
    # TRL's classes check themselves when they are built. A typo or a missing name must be reported before.
    file_at = arguments.index("--config") if "--config" in arguments else len(arguments)
    given, rest = parser.parse_known_args([*arguments[:file_at], *arguments[file_at + 2 :]])
    flags = {flag.lstrip("-") for action in parser._actions for flag in action.option_strings}
    _check_rest(rest, names | {flag for flag in flags if "-" not in flag} - {"h"} | {"config"})
    _check_given({**config, **{name: value for name, value in vars(given).items() if value}})
    *theirs, ours = _made(parser, arguments)
    _check_dataset(theirs)
    options = asdict(ours)
    kind, baseline_every = options.pop("engine"), options.pop("baseline_every")
    whole("baseline_every", baseline_every, 0, hint="(0 never)")
    # Reports are written beside the checkpoints of their run.
    output_dir = next(group.output_dir for group in theirs if hasattr(group, "output_dir"))
    if kind == "trl":
        return lambda: script.main(*theirs)
    engine = new_engine(**options, output_dir=output_dir)

    def train() -> None:
        with _attached(engine, baseline_every):
            script.main(*theirs)
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"A page of this run: atlas-rl report {output_dir}")

    return train


def trl_script() -> Any:
    """TRL's script for GRPO; `ValueError` if TRL is missing."""
    try:
        from trl.scripts import grpo
    except ImportError as error:
        raise ValueError(f"TRL is not installed ({error}). In the checkout: pip install -e '.[trl]'") from error
    return grpo


def make_parser(script: Any, new_engine: Any) -> Any:
    """The parser of TRL's script plus the engine's options; it raises `ValueError` instead of exiting.

    Args:
        script: `trl_script()`.
        new_engine: The engine's class.
    """
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(f"{message}. {COMMAND} --help lists the options")

    types = (*script.make_parser().dataclass_types, engine_arguments(new_engine))
    # Without `allow_abbrev`, a flag is either an option or a typo, like a key of the YAML file.
    parser = Parser(types, prog=COMMAND, description=_DESCRIPTION, allow_abbrev=False)
    for action in parser._actions:  # `HfArgumentParser` gives a negation the help of what it negates
        if action.dest in _NEGATED and any(flag.startswith("--no_") for flag in action.option_strings):
            action.help = _NEGATED[action.dest]
    return parser


def engine_arguments(new_engine: Any) -> type:
    """A dataclass of the engine's options for `HfArgumentParser`; help and defaults come from `EngineConfig`.

    Leaves out options that take objects, and `output_dir`, which is the trainer's.
    """
    from atlas_rl.config import EngineConfig

    helps, hints = entries(EngineConfig, "Attributes"), get_type_hints(EngineConfig)
    of_attach = entries(new_engine.attach, "Args")
    made: list[Any] = [("engine", Literal["atlas", "trl"], _option("atlas", _ENGINE_HELP))]
    for each in fields(EngineConfig):
        hint = hints[each.name]
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        plain = [kind for kind in kinds if kind in _PLAIN]
        if plain and each.name != "output_dir":
            kind = plain[0] | None if NoneType in kinds else plain[0]
            made.append((each.name, kind, _option(each.default, helps.get(each.name, ""))))
    made.append(("baseline_every", int, _option(0, of_attach.get("baseline_every", ""))))
    return make_dataclass("EngineArguments", made, namespace={"_argument_group_name": "atlas_rl"})


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text.replace("%", "%%")})


def _check_names(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise `ValueError` for an unknown option, with the nearest name, or the command that takes it."""
    unknown = [name for name in given if name not in known]
    if not unknown:
        return
    from accelerate.commands.launch import launch_command_parser

    launcher = {action.dest for action in launch_command_parser()._actions} - {"help"} | {"accelerate_config"}
    for name in unknown:
        if name in launcher:
            raise ValueError(
                f"{where} has '{name}', which is for accelerate: accelerate launch --"
                f"{'config_file' if name == 'accelerate_config' else name} ... -m atlas_rl grpo --config run.yaml"
            )
    near = difflib.get_close_matches(unknown[0], sorted(known), n=1)
    hint = f"; did you mean '{near[0]}'?" if near else f". {COMMAND} --help lists the options"
    raise ValueError(f"{where}: no option '{unknown[0]}'{hint}")


def _check_choices(config: Mapping[str, Any], actions: Iterable[Any]) -> None:
    """Raise `ValueError` for an invalid choice in the YAML file, since argparse checks only the command line."""
    for action in actions:
        if action.choices is None or config.get(action.dest) is None:
            continue
        given = config[action.dest]
        for value in given if isinstance(given, list) else [given]:
            if str(value) not in map(str, action.choices):
                choices = ", ".join(map(str, action.choices))
                hint = (
                    " (YAML reads a bare yes or no as true or false: put it in quotes)"
                    if isinstance(value, bool)
                    else ""
                )
                raise ValueError(f"{action.dest} must be one of {choices}, and the YAML file has {value!r}{hint}")


def _check_rest(rest: Sequence[str], known: Collection[str]) -> None:
    """Raise `ValueError` for arguments that no option takes."""
    flags = [each[2:].split("=")[0] for each in rest if each.startswith("--") and each != "--"]
    _check_names(dict.fromkeys(flags), known, "the command line")
    if rest:
        raise ValueError(f"{rest[0]!r} belongs to no option. {COMMAND} --help lists them")


def _made(parser: Any, arguments: Sequence[str]) -> Sequence[Any]:
    """The options as objects of TRL's classes and ours; an error about bfloat16 names the source of the setting."""
    try:
        made: Sequence[Any] = parser.parse_args_and_config(list(arguments))
    except ValueError as error:
        if "bf16" not in str(error):
            raise
        hint = "add `bf16: false` (or --bf16 false) to train in float32; unless told, TRL trains in bfloat16"
        raise ValueError(f"{hint}. {error}") from error
    return made


def _check_given(values: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a run without a policy, rewards or data, before anything is loaded."""
    if not values.get("model_name_or_path"):
        raise ValueError("model_name_or_path is missing: the policy's folder, or its name on the hub")
    if not values.get("dataset_name") and not values.get("datasets"):
        raise ValueError(
            "dataset_name is missing: a dataset's folder, or its name on the hub (or `datasets` in the YAML)"
        )
    for name in ("model_name_or_path", "dataset_name"):
        _check_path(name, values.get(name))
    if not values.get("reward_funcs") and not values.get("reward_model_name_or_path"):
        raise ValueError("reward_funcs is missing: names of TRL's rewards, or dotted paths such as my_rewards.length")


def _check_path(name: str, value: Any) -> None:
    """Raise `ValueError` for a path that does not exist; names of the hub are `name` and `owner/name`."""
    if value is None:
        return
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a folder or a name on the hub, got {value!r}")
    is_path = value.startswith(("/", ".", "~")) or value.count("/") > 1
    if is_path and not Path(value).exists():
        raise ValueError(f"{name}: there is no '{value}' on this machine, and it is no name of the hub")


def _check_dataset(groups: Iterable[Any]) -> None:
    """Raise `ValueError` for a dataset that is neither on this machine nor on the hub, before the policy is loaded."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError

    script = next(group for group in groups if hasattr(group, "dataset_name"))
    if not script.dataset_name or any(getattr(group, "datasets", None) for group in groups):
        return
    try:
        load_dataset_builder(script.dataset_name, name=script.dataset_config)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise ValueError(
            f"dataset_name: '{script.dataset_name}' is no folder of this machine, and the hub does not give it ({error})"
        ) from error


def _give_up(error: Exception) -> NoReturn:
    """Exit with the error in one line, as for other options."""
    print(f"{COMMAND}: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2) from error


def _prepare_vllm(stack: ExitStack, engine: Any, args: Any) -> None:
    """Enter the context in which the trainer is built. A vLLM that runs elsewhere, as a server, is not looked at here."""
    if not args.use_vllm:
        return
    if args.vllm_mode == "server":
        from atlas_rl.integrations.trl.server_client import our_clients

        stack.enter_context(our_clients())
        return
    try:
        stack.enter_context(engine.prepare_vllm())
    except ValueError as error:  # such as a vLLM that is not known
        _give_up(error)


@contextmanager
def _attached(engine: Any, baseline_every: int) -> Iterator[None]:
    """Context in which the trainer that TRL's script builds gets the engine attached."""
    trl: Any = import_module("trl")
    own = trl.GRPOTrainer

    def build(trainer: Any, *args: Any, **options: Any) -> None:
        try:
            with ExitStack() as stack:
                _prepare_vllm(stack, engine, options["args"])
                own.__init__(trainer, *args, **options)
        except ConnectionError as error:  # of our client: the server is not up, or is another program
            _give_up(error)
        try:
            engine.attach(trainer, baseline_every=baseline_every)
        except (ValueError, ConnectionError) as error:  # of an option's value: a traceback would say no more
            _give_up(error)

    trl.GRPOTrainer = type(own.__name__, (own,), {"__init__": build, "__doc__": own.__doc__})
    try:
        yield
    finally:
        trl.GRPOTrainer = own
