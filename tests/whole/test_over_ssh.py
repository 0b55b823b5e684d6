"""`mlx.launch --hostfile … train.py` literally, over real ssh between three emulated hosts."""

import json
import shutil
from pathlib import Path

import pytest
from emulated_hosts import AVAILABLE, ENVIRONMENT_PATH, Cluster
from ranks import ROOT, SMALL, Ranks, command, rows, status

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(not AVAILABLE, reason="needs root, iproute2 and openssh-server"),
]


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


def test_three_hosts(tmp_path: Path) -> None:
    with Cluster(tmp_path, 3) as hosts:
        # mlx.launch starts 127.0.0.1 without ssh, the others with it
        ranks = launch(tmp_path, hosts, first="127.0.0.1")
        # a run directory of rank 0's own clock is agreed over the wire: one directory, not one a host
        folders = list((tmp_path / "outputs").iterdir())
        assert len(folders) == 1, ranks.report()
        run = folders[0].relative_to(tmp_path)
        final = status(tmp_path, str(run))
        assert final["state"] == "completed" and final["world_size"] == 3, ranks.report()
        assert final["backend"] == "ring" and len(final["hosts"]) == 3
        assert [row["step"] for row in rows(tmp_path, "train", str(run))] == [1, 2, 3, 4, 5, 6]
        assert all((folders[0] / f"logs/rank_{rank}.log").exists() for rank in range(3))
        # a user's mistake is told once more over ssh, by status and by words; here all of it is over ssh
        ranks = launch(tmp_path, hosts, "run.dir=wrong", "trainer.micro_batch_size=32")
        assert "3 ranks cannot share 1 micro-batches" in ranks.report()
