"""`mlx.launch --hostfile … train.py` literally, over real ssh between two emulated hosts."""

import json
import shutil
from pathlib import Path

import pytest
from cluster import AVAILABLE, ENVIRONMENT_PATH, Cluster
from ranks import ROOT, SMALL, Ranks, command, rows, status

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs root, iproute2 and openssh-server")


def launch(folder: Path, hosts: Cluster, *overrides: str, first: str | None = None) -> Ranks:
    """On host 1, as its user would type it; `first` is what the host file calls it."""
    hostfile = folder / "lab.json"
    envs = [f"PATH={ENVIRONMENT_PATH}", f"PYTHONPATH={ROOT}"]
    entries = [{"ssh": address, "ips": [address]} for address in hosts.addresses]
    entries[0]["ssh"] = first or entries[0]["ssh"]
    hostfile.write_text(json.dumps({"backend": "ring", "envs": envs, "hosts": entries}))
    launcher = shutil.which("mlx.launch", path=ENVIRONMENT_PATH)
    assert launcher
    line = [launcher, "--hostfile", str(hostfile), "train.py", *SMALL, *overrides]
    return command(hosts.inside(1, line), folder)


@pytest.mark.timeout(300)
def test_two_hosts(tmp_path: Path) -> None:
    with Cluster(tmp_path, 2) as hosts:
        ranks = launch(tmp_path, hosts, "run.dir=run")
        assert (tmp_path / "run/status.json").exists(), ranks.report()
        final = status(tmp_path)
        assert final["state"] == "completed" and final["world_size"] == 2, ranks.report()
        assert final["backend"] == "ring" and len(final["hosts"]) == 2
        assert [row["step"] for row in rows(tmp_path, "train")] == [1, 2, 3, 4, 5, 6]
        assert (tmp_path / "run/logs/rank_1.log").exists()
        # a run directory of rank 0's own clock is agreed over the wire: one directory, not one a host
        ranks = launch(tmp_path, hosts, first="127.0.0.1")  # which mlx.launch starts without ssh
        folders = list((tmp_path / "outputs").iterdir())
        assert len(folders) == 1 and status(tmp_path / "outputs", folders[0].name)["state"] == "completed"
        # a user's mistake is told once more over ssh, by status and by words
        ranks = launch(tmp_path, hosts, "run.dir=wrong", "trainer.micro_batch_size=32")
        assert "2 ranks cannot share 1 micro-batches" in ranks.report()
