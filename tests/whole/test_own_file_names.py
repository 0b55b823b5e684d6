"""Every command works in a folder whose files have the names of Python's own modules."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from emulated_hosts import AVAILABLE, ENVIRONMENT_PATH, Cluster
from ranks import ROOT, SMALL, SUPPORT, Ranks, command, status
from refusals import CLUSTER, assert_refused

pytestmark = pytest.mark.ranks
OWN = (
    *(item for item in SMALL if not item.startswith("model.")),
    "model=custom", "model.import_path=user_parts:Line", "data=custom", "data.import_path=user_parts:points",
    "trainer.loss=user_parts:squared", "metrics.tensorboard=true",
)  # fmt: skip
# What an old Python says of an option that it does not know.
OLD_PYTHON = """#!/bin/sh
echo "Unknown option: -P" >&2
echo "usage: python3 [option] ... [-c cmd | -m mod | file | -] [arg] ..." >&2
exit 2
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the user's parts, and a file for every module of Python's, none of which can be imported."""
    for name in filter(find_spec, sys.stdlib_module_names):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name}.py of the user was imported')\n")
    shutil.copy(SUPPORT / "user_parts.py", tmp_path)
    return tmp_path


def completed(folder: Path, run: str, ranks: Ranks, world_size: int = 1) -> None:
    ranks.ok()
    assert "of the user was imported" not in ranks.report()
    found = status(folder, run)
    assert (found["state"], found["world_size"]) == ("completed", world_size), ranks.report()


def test_one_rank(folder: Path) -> None:
    completed(folder, "run", command(["train.py", *OWN, "run.dir=run"], folder))
    shutil.copy(ROOT / "train.py", folder / "train.py")  # as in a checkout: the folder of the program itself
    completed(folder, "own", command([sys.executable, "train.py", *OWN, "run.dir=own"], folder))


def test_supervised_ranks(folder: Path) -> None:
    for launcher in ("ssh", "mpirun"):
        line = ["mlx-ring", "run", "-n", "2", "--launcher", launcher, "--", *OWN, f"run.dir={launcher}"]
        completed(folder, launcher, command(line, folder), 2)


def test_a_sweep(folder: Path) -> None:
    done = command(["train.py", "-m", *OWN, "hydra.sweep.dir=sweep"], folder)
    completed(folder, "sweep/0", done)


def test_the_doctor(folder: Path) -> None:
    looked = command(["mlx-ring", "doctor", "--json", "--", *OWN], folder)
    found = {each["name"]: each["status"] for each in json.loads(looked.members[0].stdout)["checks"]}
    assert found["data"] == found["launch"] == found["exit status"] == "ok", looked.report()


def test_a_part_that_has_such_a_name_is_told(folder: Path) -> None:
    refused = command(["train.py", *OWN, "run.dir=run", "data.import_path=queue:points"], folder)
    assert_refused(refused, 2, "data.import_path=queue:points cannot be imported", "give your file another")


def test_a_python_that_is_too_old_is_named(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text(OLD_PYTHON)
    old.chmod(0o755)
    refused = command(["mlx-ring", "run", "--python", str(old), "--", *SMALL, "run.dir=run"], tmp_path)
    assert_refused(refused, CLUSTER, f"{old} is older than Python 3.11", "--python")


def test_a_job_whose_supervisor_cannot_start_says_why(tmp_path: Path) -> None:
    """The reason is its last word; no folder is named that is not there."""
    planted = "import sys\nif '--leash' in sys.orig_argv: sys.exit('planted')\n"
    (tmp_path / "sitecustomize.py").write_text(planted)
    line = ["train.py", "-m", *SMALL, "hydra.sweep.dir=sweep"]
    done = command(line, tmp_path, PYTHONPATH=str(tmp_path))
    assert done.statuses == [1] and len(done.errors) == 1, done.report()
    assert "planted; the same command" in done.errors[0] and "see " not in done.errors[0]


@pytest.mark.hosts
@pytest.mark.skipif(not AVAILABLE, reason="needs root, iproute2 and openssh-server")
def test_hosts(folder: Path) -> None:
    """Over ssh, in a folder of that name on the other hosts, too."""
    with Cluster(folder.parent / "cluster", 2) as hosts:

        def type_on_host_1(*words: str) -> Ranks:
            executable = shutil.which(words[0], path=ENVIRONMENT_PATH)
            assert executable
            return command(hosts.inside(1, [executable, *words[1:]]), folder)

        lab = ("--hostfile", "lab.json")
        type_on_host_1("mlx-ring", "hosts", "add", "lab.json", *hosts.addresses).ok()
        completed(folder, "run", type_on_host_1("mlx-ring", "run", *lab, "--", *OWN, "run.dir=run"), 2)
        listed = type_on_host_1("mlx-ring", "checkpoint", "list", "run", *lab).ok()
        assert all(address in listed.members[0].stdout for address in hosts.addresses), listed.report()
        looked = type_on_host_1("mlx-ring", "doctor", *lab, "--json", "--", *OWN)
        found = {each["name"]: each["status"] for each in json.loads(looked.members[0].stdout)["checks"]}
        assert found["data"] == found["launch"] == "ok", looked.report()
        launched = type_on_host_1("mlx.launch", *lab, "train.py", *OWN, "run.dir=launched")
        completed(folder, "launched", launched, 2)
