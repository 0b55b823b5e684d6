"""The rules that keep the code small, the documents true and the layers apart."""

import ast
import re
import tomllib
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mlx_ring.config.compose import compose_run

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mlx_ring"
MODULES = sorted(PACKAGE.rglob("*.py"))

SENTENCE = "Collective: every rank must call"
FUNCTION_LINES = 50
FILE_LINES = 400
FOLDER_FILES = 12
README_LINES = 150
CHECKOUT = {  # every entry at the top; a new one needs a good reason
    ".ci", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "benchmarks", "conf",
    "constraints.txt", "docs", "hostfiles", "hydra_plugins", "mkdocs.yml", "mlx_ring", "pyproject.toml",
    "tests", "train.py",
}  # fmt: skip
COMPUTES = {  # at most
    "checkpoint/manager.py",
    "communication/communicator.py",
    "training/evaluator.py",
    "training/exact/doctor_checks.py",
    "training/memory_manager.py",
    "training/trainer.py",
}
FILLED = {  # what a group leaves to the user
    "model/custom": {"import_path": "package.module:name"},
    "data/custom": {"import_path": "package.module:name"},
    "data/text": {"path": "folder"},
    "data/tokens": {"path": "tokens.bin"},
}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(node: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [each for each in ast.walk(node) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]


def attributes(node: ast.AST) -> set[str]:
    return {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}


def own_files() -> list[Path]:
    """Files of the checkout that git would not ignore."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()] + [".git"]
    return [
        path
        for path in sorted(ROOT.rglob("*"))
        if path.is_file()
        and not any(fnmatch(part, name) for part in path.relative_to(ROOT).parts for name in ignored)
    ]


# Size


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_functions_fit_a_screen_and_files_hold_one_idea(path: Path) -> None:
    found = functions(tree(path))
    lengths = {each.name: (each.end_lineno or each.lineno) - each.lineno + 1 for each in found}
    assert {name: lines for name, lines in lengths.items() if lines > FUNCTION_LINES} == {}
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FILE_LINES


ROOMS = sorted({path.parent for path in MODULES})


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(ROOT)))
def test_a_folder_holds_one_component(room: Path) -> None:
    files = [path.name for path in room.glob("*.py") if path.name not in ("__init__.py", "__main__.py")]
    assert len(files) <= FOLDER_FILES


@pytest.mark.parametrize(
    "room", [room for room in ROOMS if room.name != "assets"], ids=lambda room: str(room.relative_to(ROOT))
)
def test_every_room_has_a_face(room: Path) -> None:
    """A paragraph that says what the room is, and its public names, all of which are there."""
    face = tree(room / "__init__.py")
    assert len((ast.get_docstring(face) or "").split()) >= (8 if room == PACKAGE else 20)
    module = import_module(".".join(room.relative_to(ROOT).parts))
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_no_file_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc"}
    assert [path for path in own_files() if path.suffix == ".py" and path.stem in drawers] == []


# Who may name what


def test_only_the_communicator_names_mx_distributed() -> None:
    """TID251 says the same, but a file that may compute is free of that rule as a whole."""
    named = {
        path.relative_to(PACKAGE).as_posix() for path in MODULES if "distributed" in attributes(tree(path))
    }
    assert named == {"communication/communicator.py"}


def test_only_few_files_compute() -> None:
    # With `mx.` before it: a model's own `eval()` is another thing.
    computing = {path for path in MODULES if re.search(r"\bmx\.(async_)?eval\(", path.read_text())}
    assert {path.relative_to(PACKAGE).as_posix() for path in computing} <= COMPUTES


def test_every_room_has_its_layer() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    for contract, room in zip(contracts, (PACKAGE, PACKAGE / "cluster"), strict=False):
        named = set(re.findall(r"\w+", " ".join(contract["layers"])))
        rooms = {path.parent.name for path in room.glob("*/__init__.py")}
        assert named == rooms | {path.stem for path in room.glob("*.py") if path.stem != "__init__"}


# Collectives


def collectives() -> set[str]:
    """The methods of Communicator that reach the wire, by themselves or through one another."""
    (communicator,) = [
        node
        for node in tree(PACKAGE / "communication/communicator.py").body
        if isinstance(node, ast.ClassDef) and node.name == "Communicator"
    ]
    uses = {each.name: attributes(each) for each in functions(communicator)}
    reaching = {name for name, used in uses.items() if used & {"distributed", "_call"}}
    while more := {name for name, used in uses.items() if used & reaching} - reaching:
        reaching |= more
    return reaching


def test_what_calls_a_collective_says_so() -> None:
    reaching = collectives()
    public = {name for name in reaching if not name.startswith("_")}
    assert public >= {"all_sum", "all_reduce", "broadcast", "gather_objects", "barrier"}
    silent: list[str] = []
    for path in MODULES:
        base = path.with_name("base.py")  # an override without a docstring has that of its base
        said = (
            {each.name for each in functions(tree(base)) if SENTENCE in _prose(each)}
            if base.exists()
            else set()
        )
        for function in functions(tree(path)):
            if (function.name.startswith("_") and function.name != "__init__") or function.name in said:
                continue
            calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
            direct = any(
                isinstance(call, ast.Attribute)
                and call.attr in public
                and ast.unparse(call.value).endswith("communicator")
                for call in calls
            )
            own = path.stem == "communicator" and function.name in reaching
            if (direct or own) and SENTENCE not in _prose(function):
                silent.append(f"{path.stem}.{function.name}")
    assert silent == []


def _prose(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return " ".join((ast.get_docstring(function) or "").split())


# Configuration


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")))
def test_every_experiment_composes(name: str) -> None:
    config = compose_run(f"experiment={name}", "run.dir=run")
    settings = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/experiment/{name}.yaml"), resolve=False)
    assert isinstance(settings, dict)
    for default in settings.pop("defaults", []):
        ((group, choice),) = default.items()
        assert config.redacted[group.removeprefix("override /")]["name"] == choice
    for group, values in settings.items():
        assert config.redacted[group].items() >= values.items()


@pytest.mark.parametrize(
    "choice",
    sorted(
        f"{path.parent.name}/{path.stem}"
        for path in (ROOT / "conf").glob("*/*.yaml")
        if path.parent.name != "experiment"
    ),
)
def test_every_choice_of_every_group_composes(choice: str) -> None:
    group, name = choice.split("/")
    filled = FILLED.get(choice, {})
    config = compose_run(
        f"{group}={name}", "run.dir=run", *(f"{group}.{key}={value}" for key, value in filled.items())
    )
    written = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/{choice}.yaml"), resolve=False)
    assert isinstance(written, dict)
    assert config.redacted[group] == written | filled
    assert written.get("name", name) == name
    assert sorted(key for key, value in written.items() if value == "???") == sorted(filled)


def test_one_place_says_how_our_programs_are_started() -> None:
    """`own_program` keeps files of the user's, such as random.py, from standing in for Python's own."""
    found = [path.relative_to(PACKAGE).as_posix() for path in MODULES if '"-m"' in path.read_text("utf-8")]
    assert found == ["cluster/hosts/ssh.py"]


# Documents


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_the_readme_names_every_room() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## The rooms of the house\n")[1]
    named = re.findall(r"^\| `(\w+)/` \|", section.split("\n## ")[0], re.MULTILINE)
    assert sorted(named) == [room.name for room in ROOMS if room.parent == PACKAGE]


def test_the_checkout_has_no_other_entries() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in own_files()} == CHECKOUT


def test_nothing_speaks_of_one_machine() -> None:
    """No absolute path of somebody's disk, no host that packages came from."""
    forbidden = re.compile(
        r"(?<![\w.])/(?:root|work|opt(?!/homebrew)|home|Users)/(?!me/)|pypi\.|pythonhosted|--(?:extra-)?index-url|--find-links"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in own_files()
        if path.suffix != ".safetensors" and path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if forbidden.search(line)
    ]
    assert found == []
