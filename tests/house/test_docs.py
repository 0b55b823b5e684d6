"""What the documents show is true of the program: commands, examples, error messages."""

import ast
import importlib.util
import json
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
import pytest
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override

from mlx_ring.cli.commands import cli
from mlx_ring.cluster.hosts.host_file import read_hostfile
from mlx_ring.config.compose import compose_run
from mlx_ring.data.sources import open_dataset
from mlx_ring.errors import ConfigError
from mlx_ring.models import build_model
from mlx_ring.models.losses import build_loss
from mlx_ring.models.requirements import check_outputs

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
NAMES = [document.name for document in DOCUMENTS]
PREFIX = re.compile(r"(?:error|mlx-ring): (.+)")
NOT_TYPED = "…"  # stands for whatever the reader has


def blocks(document: Path, language: str) -> list[str]:
    """The code blocks of a document that are of this language."""
    found = re.findall(rf"^```{language}\n(.*?)^```", document.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert all("```" not in block for block in found)
    return found


# Commands


def commands(document: Path) -> list[list[str]]:
    """The words of every command of the program that its shell blocks show."""
    lines = "\n".join(blocks(document, "sh")).replace("\\\n", " ").splitlines()
    simple = [part for line in lines for part in re.split(r" && ", line)]
    typed = [shlex.split(line, comments=True) for line in simple]
    words = [[word for word in line if word != NOT_TYPED] for line in typed]
    return [line for line in words if {"train.py", "mlx-ring"} & set(line)]


def test_commands_are_found() -> None:
    assert len([line for document in DOCUMENTS for line in commands(document)]) > 40


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_command_would_be_taken(document: Path) -> None:
    for words in commands(document):
        if "train.py" in words:
            at = words.index("train.py")
            check_launcher(words[:at])
            check_train(words[at + 1 :])
        else:
            check_tool(words[words.index("mlx-ring") + 1 :])


def check_launcher(words: list[str]) -> None:
    """What stands before train.py: mlx.launch's options are those that its source names."""
    if "mlx.launch" not in words:
        assert {word for word in words if word.startswith("-")} <= {"--no-sync", "-n"}, words
        return
    specification = importlib.util.find_spec("mlx._distributed_utils.launch")
    assert specification is not None
    assert specification.origin is not None
    source = Path(specification.origin).read_text()
    for word in words[words.index("mlx.launch") + 1 :]:
        assert not word.startswith("-") or word == "--" or f'"{word}"' in source, words


def check_train(words: list[str]) -> None:
    """Hydra takes the options, and the overrides compose; of a sweep, the first value of each."""
    options, unknown = get_args_parser().parse_known_args(words)
    assert unknown == [], words
    if options.help or options.hydra_help:
        return
    compose(*options.overrides, multirun=options.multirun)


@cache  # the same command may stand in several documents, and composing takes a quarter of a second
def compose(*overrides: str, multirun: bool = False) -> None:
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    assert multirun or not any(each.is_sweep_override() for each in parsed), "only -m takes several values"
    single = [first_of(each) if each.is_sweep_override() else str(each.input_line) for each in parsed]
    own_directory = [] if any(each.get_key_element() == "run.dir" for each in parsed) else ["run.dir=run"]
    try:
        compose_run(*single, *own_directory)
    except ConfigError as error:
        pytest.fail(f"{' '.join(overrides)}: {error}")


def first_of(override: Override) -> str:
    value = override.value()
    if isinstance(value, IntervalSweep):
        return f"{override.get_key_element()}={value.start}"
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}"


def check_tool(words: list[str]) -> None:
    """Click takes the words, without running the command; the overrides of `run` are train.py's."""
    command: click.Command = cli
    context = click.Context(cli)
    try:
        while isinstance(command, click.Group):
            name, found, words = command.resolve_command(context, words)
            assert found is not None
            command, context = found, click.Context(found, info_name=name, parent=context)
            context.ignore_unknown_options = False  # which `run` sets, for overrides such as ~model.key
        command.parse_args(context, words)
    except click.UsageError as error:
        pytest.fail(f"{' '.join(words)}: {error.format_message()}")
    if command.name == "run":
        compose(*context.params["overrides"])


# Examples


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_examples_are_what_they_are_shown_as(document: Path, tmp_path: Path) -> None:
    for block in blocks(document, "python"):
        exec(compile(block, str(document), "exec"), {"__name__": "example"})
    for block in blocks(document, "yaml"):
        yaml.safe_load(block)
    for block in blocks(document, "json"):
        (tmp_path / "hosts.json").write_text(block)
        if "hosts" in json.loads(block):
            assert read_hostfile(tmp_path / "hosts.json").hosts


def test_the_tutorials_own_parts_fit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = [block for block in blocks(ROOT / "docs/tutorial.md", "python") if "Dataset" in block]
    (command,) = [words for words in commands(ROOT / "docs/tutorial.md") if "data=custom" in words]
    (tmp_path / "tutorial_parts.py").write_text(program)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    config = compose_run(*(word.replace("my_parts", "tutorial_parts") for word in command[3:]))
    data = open_dataset(config.data, kind="classifier", seed=0, sequence_length=None, files={})
    model = build_model(config.model, input_shape=data.spec.input_shape, num_classes=data.spec.num_classes)
    inputs, targets = map(mx.array, data.train.batch(np.arange(8)))
    check_outputs(model, "custom", inputs, each_position=False, num_classes=data.spec.num_classes)
    assert build_loss(config.trainer.loss)(model(inputs), targets).shape == targets.shape


# Names


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_named_files_are_there(document: Path) -> None:
    """By their whole path or its end; my_parts.py is the reader's to write."""
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", document.read_text("utf-8"))) - {"my_parts.py"}
    folders = ("mlx_ring", "benchmarks", "tests", "docs", "hydra_plugins")
    there = [ROOT / "train.py", *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    assert {name for name in named if not any(path.match(f"*/{name}") for path in there)} == set()


def test_the_layers_shown_are_those_that_are_enforced() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    enforced = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    assert [shown.splitlines() for shown in blocks(ROOT / "docs/architecture.md", "")] == enforced


def test_the_picture_of_the_rooms_shows_all_of_them_in_their_layers() -> None:
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0][
        "layers"
    ]
    picture = (ROOT / "docs/architecture.svg").read_text(encoding="utf-8")
    drawn = re.findall(r'class="name" x="\d+" y="(\d+)">(\w+)<', picture)
    heights = {name: int(height) for height, name in drawn}
    shown = [{name for name in heights if heights[name] == height} for height in sorted({*heights.values()})]
    assert shown == [set(re.findall(r"\w+", layer)) for layer in layers]


# Error messages


def templates() -> list[str]:
    """Every text of the program, with \\0 for what is filled in."""
    found: list[str] = []
    for path in [*(ROOT / "mlx_ring").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
    return found


def says(template: str, quoted: str) -> bool:
    """Whether the fixed parts of a quoted message stand in a text of the program, in that order."""
    position = 0
    for part in quoted.split(NOT_TYPED):
        position = template.find(part, position)
        if position < 0:
            return False
        position += len(part)
    return True


def test_quoted_errors_are_those_of_the_program() -> None:
    shown = "".join(block for document in DOCUMENTS for block in blocks(document, "text"))
    quoted = [found[1] for line in shown.splitlines() if (found := PREFIX.fullmatch(line))]
    assert len(quoted) > 40
    texts = templates()
    assert [message for message in quoted if not any(says(text, message) for text in texts)] == []
