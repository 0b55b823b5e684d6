"""Nothing trains unless all ranks are of one job, one version, one configuration, one model and data."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import ROOT, SMALL, Rank, Ranks, free_ports, mpirun, start, status

from mlx_ring.communication.agreement import agree
from mlx_ring.errors import ClusterError

pytestmark = pytest.mark.ranks


def refused(ranks: Ranks, *words: str) -> None:
    """All ranks left with status 3, and exactly one line says why."""
    assert ranks.statuses == [3] * len(ranks.members), ranks.report()
    assert len(ranks.errors) == 1, ranks.report()
    for word in words:
        assert word in ranks.errors[0], ranks.report()
    assert "Traceback" not in ranks.report()


def two_different(folder: Path, own: list[list[str]], program: list[list[str]] | None = None) -> Ranks:
    """Two ranks of one ring with different command lines or programs."""
    hostfile = folder / "ring.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    train = [sys.executable, str(ROOT / "train.py")]
    ranks = Ranks()
    for number in range(2):
        launched = {"MLX_RANK": str(number), "MLX_HOSTFILE": str(hostfile)}
        chosen = program[number] if program else train
        ranks.members += start(
            [*SMALL, "run.dir=run", *own[number]], folder, program=chosen, variables=[launched]
        ).members
    return ranks.wait()


def test_another_configuration(tmp_path: Path) -> None:
    ranks = two_different(tmp_path, [["optimizer.learning_rate=0.01"], ["optimizer.learning_rate=0.02"]])
    refused(ranks, "optimizer.learning_rate is 0.02 on rank 1", "0.01 on rank 0", "host")
    assert status(tmp_path)["state"] == "failed"
    assert "learning_rate" in str(status(tmp_path)["message"])
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_ranks_that_show_no_job_join_one_that_does(tmp_path: Path) -> None:
    """As where mlx.launch starts one rank itself, and the others' parent is their host's sshd."""
    variables = [{"MLX_RING_JOB_ID": "first"}, {}, {"MLX_RING_JOB_ID": "first"}]
    start([*SMALL, "run.dir=run"], tmp_path, world_size=3, variables=variables).wait().ok()


@pytest.mark.parametrize(
    "own",
    [
        ["trainer.global_batch_size=4"],  # too small for two ranks: this rank alone would refuse
        ["cluster.ranks=3"],
        ["data=fashion_mnist", "data.distribute=true"],
        ["evaluation.only=true"],
        ["trainer.compute_dtype=float8"],  # cannot even be parsed
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_rank_alone_was_told_hangs_nobody(tmp_path: Path, own: list[str], rank: int) -> None:
    options: list[list[str]] = [[], []]
    options[rank] = own
    refused(two_different(tmp_path, options), "on rank 1", "on rank 0", "same command")


def test_a_directory_named_on_one_rank_alone(tmp_path: Path) -> None:
    common = [item for item in SMALL if not item.startswith("run.")]
    hostfile = tmp_path / "ring.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    ranks = Ranks()
    for number, own in enumerate([[], ["run.dir=run"]]):
        launched = {"MLX_RANK": str(number), "MLX_HOSTFILE": str(hostfile)}
        ranks.members += start([*common, *own], tmp_path, variables=[launched]).members
    refused(ranks.wait(), "run.dir is", "on rank 1", "on rank 0")


def test_other_data(tmp_path: Path) -> None:
    for name, text in (("a", "to be or not to be " * 400), ("b", "to be or not to me " * 400)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(text)
    options = [
        "model=transformer",
        "~model.hidden_sizes",
        "data=text",
        "data.sequence_length=16",
        "data.cache_dir=cache",
    ]
    small = [item for item in SMALL if "hidden_sizes" not in item]
    hostfile = tmp_path / "ring.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    ranks = Ranks()
    for number, name in enumerate("ab"):
        launched = {"MLX_RANK": str(number), "MLX_HOSTFILE": str(hostfile)}
        arguments = [*small, options[0], *options[2:], "run.dir=run", f"data.path={tmp_path / name}"]
        ranks.members += start(arguments, tmp_path, variables=[launched]).members
    refused(ranks.wait(), "data is", "on rank 1", "data.distribute=true")


def test_rank_0s_data_is_sent_to_those_that_lack_it(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300)
    small = [item for item in SMALL if "hidden_sizes" not in item]
    hostfile = tmp_path / "ring.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(3)]))
    ranks = Ranks()
    for number, name in enumerate(["a", "absent", "absent"]):
        launched = {"MLX_RANK": str(number), "MLX_HOSTFILE": str(hostfile)}
        arguments = [
            *small, "model=transformer", "data=text", "data.sequence_length=16", "data.distribute=true",
            f"data.path={tmp_path / name}", f"data.cache_dir={tmp_path / f'cache_{number}'}", "run.dir=run",
            "trainer.steps=2",
        ]  # fmt: skip
        ranks.members += start(arguments, tmp_path, variables=[launched]).members
    ranks.wait().ok()
    sent = [sorted(path.name for path in (tmp_path / f"cache_{n}").rglob("*.bin")) for n in range(3)]
    assert len(sent[0]) == 1 and sent[1] == sent[0] == sent[2]
    kept = [next((tmp_path / f"cache_{n}").rglob("*.bin")).read_bytes() for n in range(3)]
    assert kept[0] == kept[1] == kept[2] and len(kept[0]) > 10_000


def test_a_stale_checkout(tmp_path: Path) -> None:
    stale = tmp_path / "stale"
    shutil.copytree(ROOT / "mlx_ring", stale / "mlx_ring", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", stale / "conf")
    shutil.copy(ROOT / "train.py", stale)
    with (stale / "mlx_ring/training/trainer.py").open("a") as file:
        file.write("\n# an older line\n")
    programs = [[sys.executable, str(folder / "train.py")] for folder in (ROOT, stale)]
    refused(two_different(tmp_path, [[], []], programs), "source is", "on rank 1", "stale", "same commit")


def test_two_jobs_on_the_same_ports(tmp_path: Path) -> None:
    """Started together, they refuse: MLX alone would sum both jobs' gradients."""
    hostfile = tmp_path / "ring.json"
    hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    jobs = [
        start([*SMALL, f"run.dir={name}", "trainer.steps=2000"], tmp_path, world_size=2, hostfile=hostfile)
        for name in ("first", "second")
    ]
    ranks = Ranks([rank for job in jobs for rank in job.members])
    try:
        # A rank that finds its port taken ends by itself; its peer waits for it, as under a launcher that
        # stops it. Where each job got one port of the two, whichever, the ranks of both meet and refuse each
        # other; rank 0 tells why.
        running = Ranks(list(ranks.members))
        while not (loser := next_to_end(running)).stderr:
            assert loser.status == 3, ranks.report()
            running.members.remove(loser)
        assert loser.status == 3, ranks.report()
        crossed = [f"run.dir is {name} on rank 1" for name in ("first", "second")]
        assert any(words in loser.stderr for words in ("is in use by process", *crossed)), ranks.report()
    finally:
        ranks.kill()


def next_to_end(ranks: Ranks, timeout_seconds: float = 60) -> Rank:
    """The first rank that ends, with its output."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        for rank in ranks.members:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.stdout, rank.stderr = rank.process.communicate(timeout=0.1)
                return rank
    raise AssertionError(ranks.report())


def test_ranks_of_two_jobs_in_one_ring(tmp_path: Path) -> None:
    """Where no lock could keep them apart (another host), the ranks' job ids do."""
    variables = [{"MLX_RING_JOB_ID": name} for name in ("first", "second")]
    ranks = start([*SMALL, "run.dir=run"], tmp_path, world_size=2, variables=variables).wait()
    assert ranks.statuses == [3, 3], ranks.report()
    assert all("another job" in rank.stderr and "--starting-port" in rank.stderr for rank in ranks.members)
    assert not (tmp_path / "run/metrics.jsonl").exists()


class CrossedWire:
    """What a communicator would give to a rank whose peers differ."""

    rank = 0

    def __init__(self, *records: dict[str, object]) -> None:
        self.answers: list[list[object]] = [list(records)]

    def gather_objects(self, value: object) -> list[object]:
        return self.answers.pop(0) if self.answers else [value]


@pytest.mark.parametrize(
    ("key", "mine", "theirs", "word"),
    [
        ("mlx", "0.32.4", "0.32.5", "same version"),
        ("parameters", "a" * 64, "b" * 64, "model's code"),
        ("fast_synch", "", "1", "MLX_METAL_FAST_SYNCH"),
    ],
)
def test_what_is_compared(key: str, mine: str, theirs: str, word: str) -> None:
    wire = CrossedWire({"host": "studio-1", key: mine}, {"host": "mini-2", key: theirs})
    with pytest.raises(ClusterError, match=word) as caught:
        agree(wire, {})  # pyright: ignore
    assert "rank 1 (host mini-2)" in str(caught.value) and "host studio-1" in str(caught.value)


def test_lone_singletons_are_refused(tmp_path: Path) -> None:
    """mpirun started two, but MLX finds no MPI: never two silent trainings."""
    ranks = mpirun(
        2,
        [*SMALL, "run.dir=run"],
        tmp_path,
        ["env", "MLX_MPI_LIBNAME=absent.so", sys.executable, str(ROOT / "train.py")],
    )
    assert ranks.statuses == [3], ranks.report()
    assert ranks.errors and "mpi" in ranks.errors[0] and "openmpi" in ranks.errors[0], ranks.report()
    assert not (tmp_path / "run/checkpoints").exists()
