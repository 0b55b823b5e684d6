"""`mlx-ring run --hostfile` over emulated hosts with their own disks: hosts are lost, come back, leave."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from emulated_hosts import AVAILABLE, ENVIRONMENT_PATH, Cluster
from ranks import SMALL, SUPPORT, environment, rows, start, status
from test_supervised_run import PROGRAM

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not AVAILABLE, reason="needs root, iproute2 and openssh-server"),
]
TESTS = str(SUPPORT)
STEPS = 300
# Steps are slow while there are several ranks: the run does not end before all has happened to it. Two and
# three ranks have equally many micro-batches each.
OVERRIDES = (
    *(value for value in SMALL if not value.startswith("model.")),
    "run.dir=run", "communicator=exact", f"trainer.steps={STEPS}", "checkpoint.every_steps=10",
    "metrics.log_every_steps=20", "metrics.console=false", "model=custom",
    "model.import_path=exact_parts:Slowed", "trainer.global_batch_size=24", "data=synthetic",
)  # fmt: skip


class Lab:
    """A supervisor on the last host of a cluster, which is in no host file, and the others as its hosts."""

    def __init__(self, folder: Path, cluster: Cluster, work: Path) -> None:
        self.cluster, self._folder = cluster, folder
        self._hostfile = folder / "lab.json"
        self.list_hosts(range(1, len(cluster.addresses)))
        command = [*PROGRAM, "--hostfile", str(self._hostfile), "--", *OVERRIDES]
        with (folder / "output").open("w") as output:
            self.process = subprocess.Popen(
                cluster.inside(len(cluster.addresses), command), cwd=work, env=environment(PYTHONPATH=TESTS),
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def list_hosts(self, numbers: range | list[int]) -> None:
        addresses = [self.cluster.addresses[number - 1] for number in numbers]
        envs = [f"PATH={ENVIRONMENT_PATH}", f"PYTHONPATH={TESTS}"]
        hosts = [{"ssh": address, "ips": [address]} for address in addresses]
        new = self._folder / "lab.json.new"
        new.write_text(json.dumps({"envs": envs, "hosts": hosts}))
        new.replace(self._hostfile)

    @property
    def output(self) -> str:
        return (self._folder / "output").read_text()

    def until(self, happened: Callable[[], object], seconds: float = 90) -> float:
        """Seconds until it happened."""
        begun = time.monotonic()
        while not happened():
            assert time.monotonic() - begun < seconds and self.process.poll() is None, self.output
            time.sleep(0.05)
        return time.monotonic() - begun

    def newest(self, number: int) -> int:
        """The step of the newest checkpoint on a host's disk."""
        found = (self.cluster.disk(number) / "run/checkpoints").glob("step_*")
        return max((int(path.name.removeprefix("step_")) for path in found), default=0)

    def until_saved_beyond(self, step: int, number: int, seconds: float = 90) -> float:
        return self.until(lambda: self.newest(number) > step, seconds)


@pytest.mark.timeout(300)
def test_hosts_are_lost_and_come_back_and_leave(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with Cluster(tmp_path / "cluster", 4, private=[work]) as cluster:
        lab = Lab(tmp_path, cluster, work)
        two = re.escape(cluster.addresses[1])
        lab.until_saved_beyond(20, 1)
        cluster.cut(2)
        assert lab.until(lambda: re.search(f"host {two} .*(silent|lost)", lab.output)) < 20
        assert lab.until_saved_beyond(lab.newest(1), 1, 30) < 25
        cluster.heal(2)
        lab.until(lambda: f"{cluster.addresses[1]} joins" in lab.output)
        lab.until_saved_beyond(lab.newest(1), 2)
        lab.list_hosts([1, 2])
        lab.until(lambda: f"{cluster.addresses[2]} leaves" in lab.output)
        lab.until(lambda: not cluster.processes(3), 20)
        lab.until_saved_beyond(lab.newest(1), 2)
        cluster.crash(1)
        assert lab.process.wait(120) == 0, lab.output
        final = status(cluster.disk(2))
        assert (final["state"], final["step"], final["world_size"]) == ("completed", STEPS, 1)
        steps = [row["step"] for row in rows(cluster.disk(2), "train")]
        assert steps == [1, *range(20, STEPS + 1, 20)]
        worlds = [row["world_size"] for row in rows(cluster.disk(2), "train")]
        assert sorted(set(worlds)) == [1, 2, 3], worlds
        cluster.boot(1)
        assert not cluster.processes(1) and not cluster.processes(2), lab.output
    calm = tmp_path / "calm"
    calm.mkdir()
    start([*OVERRIDES], calm, variables=[{"PYTHONPATH": TESTS}]).wait().ok()
    assert status(calm)["parameters_sha256"] == final["parameters_sha256"]
