"""The wheel, in an empty environment and outside the checkout, does what the checkout does."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from ranks import ROOT, command, launch, ring_ports, status


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The commands' folder of an environment that holds the wheel with `[cpu]`, and nothing else."""
    uv = os.environ.get("UV") or shutil.which("uv")  # `uv run` tells its own path
    if uv is None:
        pytest.skip("uv is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    python = folder / "environment/bin/python"

    def run(*arguments: str | Path) -> None:
        done = subprocess.run([uv, *arguments], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    run("build", "--wheel", "--out-dir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    run("venv", "--python", sys.executable, folder / "environment")
    pins = ["--constraints", ROOT / "constraints.txt"]
    run("pip", "install", "--python", python, *pins, f"mlx-ring[cpu] @ {wheel.as_uri()}")
    return str(python.parent)


@pytest.mark.ranks
def test_the_installed_program_trains_alone(installed: str, tmp_path: Path) -> None:
    command([f"{installed}/train.py", "trainer.steps=5", "run.dir=run"], tmp_path, PYTHONPATH="").ok()
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("completed", 5)
    exported = ["checkpoint", "export", "run", "--output", "model.safetensors"]
    command([f"{installed}/mlx-ring", *exported], tmp_path, PYTHONPATH="").ok()
    assert (tmp_path / "model.safetensors").stat().st_size > 100_000


@pytest.mark.ranks
def test_the_installed_program_trains_under_mlx_launch(installed: str, tmp_path: Path) -> None:
    way = ["-n", "2", ring_ports(2), "train.py", "trainer.steps=5", "run.dir=run"]
    path = os.pathsep.join([installed, "/usr/bin", "/bin"])
    ranks = launch(way, tmp_path, tmp_path, PATH=path, PYTHONPATH="")
    assert status(tmp_path)["state"] == "completed", ranks.report()
    assert status(tmp_path)["world_size"] == 2


def test_the_installed_command_knows_its_version(installed: str, tmp_path: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    printed = command([f"{installed}/mlx-ring", "--version"], tmp_path, PYTHONPATH="").ok()
    assert printed.members[0].stdout == f"mlx-ring, version {version}\n"


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [
        Requirement(text)
        for text in [*project["dependencies"], *extras["cpu"], *extras["mpi"], *extras["text"]]
    ]
    pins: dict[str, list[str]] = {}
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    ):
        pins.setdefault(name, []).append(version)
    wrong = [
        str(want)
        for want in asked
        if not all(want.specifier.contains(pin) for pin in pins.get(want.name, ["0"]))
    ]
    assert wrong == []
