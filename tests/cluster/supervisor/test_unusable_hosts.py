"""Hosts that a supervisor cannot use, and what lies on the disks of several, over real ssh."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from emulated_hosts import AVAILABLE, ENVIRONMENT_PATH, SETTINGS, Cluster
from ranks import SMALL, environment, rows, start

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not AVAILABLE, reason="needs root, iproute2 and openssh-server"),
]
PROGRAM = [sys.executable, str(Path(sys.executable).with_name("mlx-ring"))]


@dataclass
class Lab:
    """Three hosts with a disk each, and a fourth from which they are used."""

    cluster: Cluster
    work: Path

    def hostfile(self, *numbers: int, ips: dict[int, str] | None = None) -> str:
        hosts = [
            {"ssh": self.address(number), "ips": [(ips or {}).get(number, self.address(number))]}
            for number in numbers
        ]
        path = self.cluster.disk(4) / "lab.json"
        path.write_text(json.dumps({"envs": [f"PATH={ENVIRONMENT_PATH}"], "hosts": hosts}))
        return "lab.json"

    def address(self, number: int) -> str:
        return self.cluster.addresses[0].rpartition(".")[0] + f".{number}"

    def mlx_ring(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = self.cluster.inside(4, [*PROGRAM, *arguments])
        return subprocess.run(
            command, cwd=self.work, env=environment(), capture_output=True, text=True, timeout=90
        )


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    work = folder / "work"
    work.mkdir()
    with Cluster(folder / "cluster", 4, private=[work]) as cluster:
        yield Lab(cluster, work)


def refused(lab: Lab, words: list[str], *arguments: str, status: int = 3) -> None:
    """By one line on stderr."""
    done = lab.mlx_ring("run", *arguments, "--", *SMALL, "run.dir=run")
    told = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == status and len(told) == 1, done
    assert all(word in told[0] for word in words) and "Traceback" not in done.stderr, told[0]


def test_an_interpreter_that_is_not_there(lab: Lab) -> None:
    words = [lab.address(2), "it has no /nowhere/python", "--python"]
    refused(lab, words, "--hostfile", lab.hostfile(2), "--python", "/nowhere/python")


def test_a_folder_that_is_not_there(lab: Lab) -> None:
    lab.hostfile(1, 2)
    here = lab.cluster.disk(4) / "only_here"
    here.mkdir(exist_ok=True)
    line = f"cd {lab.work}/only_here && exec {PROGRAM[1]} run --hostfile ../lab.json"
    done = subprocess.run(
        lab.cluster.inside(4, ["sh", "-c", line]), cwd=lab.work, env=environment(), capture_output=True,
        text=True, timeout=90,
    )  # fmt: skip
    assert (
        done.returncode == 3 and f"{lab.address(1)}: it has no folder {lab.work}/only_here" in done.stderr
    ), done


def test_a_host_that_does_not_answer(lab: Lab) -> None:
    refused(lab, [lab.address(99), "ssh failed"], "--hostfile", lab.hostfile(1, 99))


def test_too_few_hosts_that_answer(lab: Lab) -> None:
    words = ["1 of 2 hosts answer and 2 are needed", lab.address(99)]
    refused(lab, words, "--hostfile", lab.hostfile(1, 99), "--min-hosts", "2")


def test_a_host_key_that_is_not_known(lab: Lab) -> None:
    known = SETTINGS / f"{lab.cluster.name}-4/ssh/known_hosts"
    whole = known.read_text()
    known.write_text(
        "\n".join(line for line in whole.splitlines() if not line.startswith(lab.address(2))) + "\n"
    )
    try:
        refused(lab, [lab.address(2), "ssh failed", "Host key"], "--hostfile", lab.hostfile(1, 2))
    finally:
        known.write_text(whole)


def test_an_address_of_another_host(lab: Lab) -> None:
    words = [f"host {lab.address(2)} cannot listen on {lab.address(3)}", "its own addresses"]
    refused(lab, words, "--hostfile", lab.hostfile(1, 2, ips={2: lab.address(3)}), status=2)


def test_a_disk_that_cannot_be_written_ends_no_run(lab: Lab) -> None:
    def remount(how: str) -> None:
        mount = ["mount", "-o", f"remount,bind,{how}", str(lab.work)]
        subprocess.run(lab.cluster.inside(2, mount), cwd="/", check=True)

    (lab.cluster.disk(2) / "kept").mkdir()  # it could be written once
    remount("ro")
    try:
        done = lab.mlx_ring("run", "--hostfile", lab.hostfile(1, 2), "--", *SMALL, "run.dir=kept")
    finally:
        remount("rw")
    assert done.returncode == 0 and "copy_failed" in done.stdout and "Traceback" not in done.stderr, done
    told, *_ = [row for row in rows(lab.cluster.disk(1), "event", "kept") if row["event"] == "copy_failed"]
    assert told["rank"] == 1 and "Read-only file system" in str(told["message"]), told


def test_checkpoints_on_all_disks(lab: Lab, tmp_path: Path) -> None:
    options = ("run.dir=run", "checkpoint.every_steps=2", "checkpoint.keep_last=9")
    start([*SMALL, *options], tmp_path).wait().ok()
    for number in (1, 2):
        shutil.copytree(tmp_path / "run", lab.cluster.disk(number) / "run")
    shutil.rmtree(lab.cluster.disk(1) / "run/checkpoints/step_00000006")
    damaged = lab.cluster.disk(2) / "run/checkpoints/step_00000006/model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    hostfile = lab.hostfile(1, 2, 3)

    listed = lab.mlx_ring("checkpoint", "list", "run", "--hostfile", hostfile, "--json")
    assert listed.returncode == 0 and f"host {lab.address(3)}: run does not exist" in listed.stderr, listed
    rows = json.loads(listed.stdout)["checkpoints"]
    one, two = lab.address(1), lab.address(2)
    assert [(row["host"], row["step"]) for row in rows] == [(one, 2), (one, 4), (two, 2), (two, 4), (two, 6)]
    assert len({row["parameters_sha256"] for row in rows}) == 3

    verified = lab.mlx_ring("checkpoint", "verify", "run", "--hostfile", hostfile)
    assert verified.returncode == 5, verified
    (bad,) = [line for line in verified.stdout.splitlines() if not line.endswith("ok")]
    assert bad.startswith(f"{two}:run/checkpoints/step_00000006  damaged: ") and "model.safetensors" in bad

    exported = lab.mlx_ring(
        "checkpoint", "export", "run", "--hostfile", hostfile, "--output", "out.safetensors"
    )
    assert exported.returncode == 0 and f"passed over: {two}:run" in exported.stderr, exported
    assert exported.stdout == f"{one}:run/checkpoints/step_00000004 → out.safetensors\n"
    written = lab.cluster.disk(4) / "out.safetensors"
    step_4 = tmp_path / "run/checkpoints/step_00000004/model.safetensors"
    assert written.read_bytes() == step_4.read_bytes()
    assert not list(lab.cluster.disk(4).glob(".*"))

    for hosts, code in (((1, 99), 0), ((99,), 3)):  # what others hold is shown all the same
        asked = lab.mlx_ring("checkpoint", "list", "run", "--hostfile", lab.hostfile(*hosts))
        assert asked.returncode == code and f"host {lab.address(99)}: ssh failed" in asked.stderr, asked
