"""A sweep over hosts that share no disk: if one is lost, another host does its job."""

import json
import subprocess
from pathlib import Path

import pytest
from emulated_hosts import AVAILABLE, ENVIRONMENT_PATH, Cluster
from ranks import ROOT, SMALL, TRAIN, environment
from sweeps import table

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not AVAILABLE, reason="needs root, iproute2 and openssh-server"),
]
STEPS = 300


def test_a_sweep_outlives_a_host(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with Cluster(tmp_path / "cluster", 4, private=[work]) as cluster:
        hosts = [{"ssh": address, "ips": [address]} for address in cluster.addresses[:3]]
        envs = [f"PATH={ENVIRONMENT_PATH}", f"PYTHONPATH={ROOT / 'tests'}"]
        here = cluster.disk(4)
        (here / "lab.json").write_text(json.dumps({"envs": envs, "hosts": hosts}))
        overrides = (
            *SMALL[1:-3], f"trainer.steps={STEPS}", f"evaluation.every_steps={STEPS}",
            "metrics.log_every_steps=50", "metrics.tensorboard=false", "checkpoint.every_steps=50",
            "communicator=exact", "cluster.hostfile=lab.json",
            "hydra.launcher.parallel=3", "hydra.sweep.dir=sweep",
            "optimizer.learning_rate=1e-3,2e-3,-1,3e-3,4e-3,5e-3",
        )  # fmt: skip
        lines: list[str] = []
        with subprocess.Popen(
            cluster.inside(4, [*TRAIN, "-m", *overrides]), cwd=work, env=environment(), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    lines.append(line)
                    if "job 1] [rank 0] checkpoint at step 50" in line:
                        cluster.cut(2)
                assert process.wait(60) == 2, "".join(lines)
            finally:
                process.kill()
        told = "".join(lines)
        found = table(here)
        states = [row["state"] for row in found]
        assert states == ["completed", "completed", "failed", "completed", "completed", "completed"], told
        assert [row["step"] for row in found if row["state"] == "completed"] == [str(STEPS)] * 5, told
        used = [json.loads((here / f"sweep/{number}/status.json").read_text())["hosts"] for number in (0, 3)]
        assert all(len(each) == 1 for each in used)
        assert f"host {cluster.addresses[1]}" in told and "error: job 2 failed, status 2" in told, told
        assert (here / "sweep/0/config.yaml").exists()
