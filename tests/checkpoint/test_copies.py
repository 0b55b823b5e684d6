"""Copies on disks of their own: each rank in a folder of its own is a host that shares no disk."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from ranks import SMALL, SUPPORT, TRAIN, Ranks, rows, start, status
from refusals import CHECKPOINT, CONFIGURATION, assert_refused

from mlx_ring.checkpoint import file_transfer
from mlx_ring.checkpoint.file_transfer import Part, Writing
from mlx_ring.run_directory.directory import is_record_name

pytestmark = pytest.mark.ranks
OPTIONS = (
    "communicator=exact", "checkpoint.every_steps=2", "checkpoint.keep_last=9", "schedule=constant",
    "model.dropout=0.3",
)  # fmt: skip
RECORD = ("config.yaml", "metrics.jsonl", "digests.jsonl")


def hosts(folder: Path, names: str = "abc") -> list[Path]:
    """A folder for every host."""
    folders = [folder / name for name in names]
    for each in folders:
        each.mkdir(exist_ok=True)
    return folders


def together(
    folders: Sequence[Path], *overrides: str, programs: Sequence[Sequence[str]] | None = None
) -> Ranks:
    """The small run, rank by rank in these folders."""
    command = [*SMALL, *OPTIONS, "run.dir=run", *overrides]
    parent = folders[0].parent
    return start(command, parent, world_size=len(folders), folders=folders, programs=programs).wait()


def checkpoints(folder: Path) -> dict[str, bytes]:
    """Every file below checkpoints/."""
    root = folder / "run/checkpoints"
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "run/checkpoints").glob("step_*"))


def events(folder: Path) -> dict[str, str]:
    return {str(row["event"]): str(row["message"]) for row in rows(folder, "event")}


def assert_clean(folders: Sequence[Path]) -> None:
    """No token, no temporary file."""
    for folder in folders:
        hidden = {path.name for path in folder.rglob(".*")} - {".hydra"}
        assert hidden == set(), hidden


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SHA-256 of the weights after eight steps."""
    folder = tmp_path_factory.mktemp("undisturbed")
    together(hosts(folder, "a"), "trainer.steps=8").ok()
    return str(status(folder / "a")["parameters_sha256"])


@pytest.fixture(scope="module")
def held_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hosts a and b after a run of six steps on both."""
    folder = tmp_path_factory.mktemp("held_by_two")
    together(hosts(folder, "ab")).ok()
    return folder


@pytest.fixture(scope="module")
def held_by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Host a after a run of six steps on it alone."""
    folder = tmp_path_factory.mktemp("held_by_one")
    together(hosts(folder, "a")).ok()
    return folder


def test_every_disk_holds_the_run(tmp_path: Path) -> None:
    folders = hosts(tmp_path)
    together(folders, "metrics.tensorboard=true", "evaluation.every_steps=2").ok()
    first = checkpoints(folders[0])
    assert steps(folders[0]) == [2, 4, 6]
    for folder in folders[1:]:
        assert checkpoints(folder) == first
        for name in RECORD:
            assert (folder / "run" / name).read_bytes() == (folders[0] / "run" / name).read_bytes()
        for part in ("tensorboard", ".hydra"):
            held = [
                {path.name: path.read_bytes() for path in (each / "run" / part).iterdir()}
                for each in (folders[0], folder)
            ]
            assert held[0] and held[0] == held[1]
        assert not (folder / "run/status.json").exists(), "the verdict is rank 0's"
    assert_clean(folders)


def test_rank_0_alone_keeps_checkpoints_where_it_is_told_to(tmp_path: Path) -> None:
    folders = hosts(tmp_path, "ab")
    together(folders, "checkpoint.copies=rank_0").ok()
    assert steps(folders[0]) == [2, 4, 6] and not (folders[1] / "run/checkpoints").exists()


@pytest.mark.parametrize("names", ["aaa", "aba"])
def test_ranks_that_share_a_disk_share_a_copy(tmp_path: Path, names: str) -> None:
    folders = hosts(tmp_path, names)
    together(folders).ok()
    for folder in set(folders):
        assert steps(folder) == [2, 4, 6]
        (holder,) = {(folder / "run/run.lock").read_text()}
        assert holder
    logs = [{path.name for path in (folder / "run/logs").iterdir()} for folder in folders]
    assert logs[0] == {f"rank_{rank}.log" for rank, name in enumerate(names) if name == names[0]}
    assert_clean(folders)


def test_rank_0s_disk_is_lost(tmp_path: Path, undisturbed: str) -> None:
    """Rank 0's disk and another are lost; the one that is left has rank 1 now, among new hosts."""
    folders = hosts(tmp_path)
    together(folders, "trainer.steps=4").ok()
    for folder in folders[:2]:
        shutil.rmtree(folder)
    d, e = hosts(tmp_path, "de")
    left = [d, folders[2], e]
    together(left, "trainer.steps=8").ok()
    assert status(d)["parameters_sha256"] == undisturbed
    assert [row["step"] for row in rows(d, "train")] == list(range(1, 9))
    assert [steps(folder) for folder in left] == [[4, 6, 8], [2, 4, 6, 8], [4, 6, 8]]
    told = events(d)["copies_brought"]
    assert "step 4 of rank 1 on " in told and "rank 0 on " in told and "had no checkpoint" in told
    for folder in left:
        assert (folder / "run/metrics.jsonl").read_bytes() == (d / "run/metrics.jsonl").read_bytes()
    assert_clean(left)


@pytest.mark.long
def test_an_older_disk_takes_the_newer_record(tmp_path: Path, undisturbed: str) -> None:
    """Host a was away for two steps; it comes back as rank 0."""
    a, b = hosts(tmp_path, "ab")
    together([a, b], "trainer.steps=4").ok()
    together([b], "trainer.steps=6").ok()
    together([a, b], "trainer.steps=8").ok()
    assert status(a)["parameters_sha256"] == undisturbed
    assert [row["step"] for row in rows(a, "train")] == list(range(1, 9))
    assert "had step 4" in events(a)["copies_brought"]


def test_other_runs_are_set_aside(tmp_path: Path, undisturbed: str) -> None:
    """Host b holds a run of another seed that came further, c one that the same command began alone."""
    a, b, c = hosts(tmp_path)
    together([a], "trainer.steps=4").ok()
    together([b], "seed=5", "trainer.steps=6").ok()
    together([c], "trainer.steps=2").ok()
    together([b, a, c], "trainer.steps=8").ok()
    assert status(b)["parameters_sha256"] == undisturbed
    assert [row["step"] for row in rows(b, "train")] == list(range(1, 9))
    told = events(b)["copies_brought"]
    assert "step 4 of rank 1" in told and "had step 6 of another run" in told and "had step 2 of ano" in told
    assert [steps(folder) for folder in (a, b, c)] == [[2, 4, 6, 8], [4, 6, 8], [4, 6, 8]]
    for folder, step in ((b, 6), (c, 2)):
        assert (folder / f"run/previous_1/checkpoints/step_{step:08d}").is_dir()
    assert status(b, "run/previous_1")["state"] == "completed"
    assert not (a / "run/previous_1").exists() and not (c / "run/status.json").exists()
    refused = together([*hosts(tmp_path, "d"), a], "trainer.steps=8", "seed=9")
    assert_refused(refused, CONFIGURATION, "rank 1 on ", "seed is 9 now and was 0", agreed=True)


def test_a_completed_run_is_left_as_it_is_on_new_disks_too(held_by_two: Path, tmp_path: Path) -> None:
    folders = hosts(tmp_path, "ab")
    shutil.copytree(held_by_two, tmp_path, dirs_exist_ok=True)
    digest = status(folders[0])["parameters_sha256"]
    moved = [*hosts(tmp_path, "c"), folders[1]]
    shown = together(moved).ok().members[0].stdout
    assert "has completed its 6 steps already" in shown
    final = status(moved[0])
    assert (final["state"], final["parameters_sha256"]) == ("completed", digest)


def test_a_damaged_newest_copy_is_replaced(held_by_two: Path, tmp_path: Path) -> None:
    folders = hosts(tmp_path, "ab")
    shutil.copytree(held_by_two, tmp_path, dirs_exist_ok=True)
    whole = checkpoints(folders[0])
    path = folders[0] / "run/checkpoints/step_00000006/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    together(folders, "trainer.steps=8").ok()
    for folder in folders:
        assert checkpoints(folder).items() >= whole.items()
    told = events(folders[0])["copies_brought"]
    assert "step 6 of rank 1 on " in told and "model.safetensors has SHA-256" in told
    assert_clean(folders)


def test_checkpoints_all_of_which_are_damaged_are_refused(held_by_two: Path, tmp_path: Path) -> None:
    a, b = hosts(tmp_path, "ab")
    shutil.copytree(held_by_two, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(a)
    hosts(tmp_path, "ab")
    for path in (b / "run/checkpoints").rglob("model.safetensors"):
        path.write_bytes(path.read_bytes()[:-8])
    refused = together([a, b], "trainer.steps=8")
    assert_refused(
        refused,
        CHECKPOINT,
        "no usable checkpoint on rank 1",
        "model.safetensors",
        "resume=never",
        agreed=True,
    )
    together([a, b], "trainer.steps=2", "checkpoint.resume=never").ok()


def test_a_new_start_is_one_on_every_disk(held_by_two: Path, tmp_path: Path) -> None:
    """Also on the disk of a host that was away meanwhile: its later steps are an older run's."""
    a, b = hosts(tmp_path, "ab")
    shutil.copytree(held_by_two, tmp_path, dirs_exist_ok=True)
    before = [checkpoints(folder) for folder in (a, b)]
    together([a], "checkpoint.resume=never", "trainer.steps=2").ok()
    assert [steps(folder) for folder in (a, b)] == [[2], [2, 4, 6]]
    together([b, a], "trainer.steps=4").ok()
    assert [row["step"] for row in rows(b, "train")] == [1, 2, 3, 4]
    for folder, old in zip((a, b), before, strict=True):
        assert steps(folder) == [2, 4]
        aside = folder / "run/previous_1/checkpoints"
        assert {
            str(path.relative_to(aside)): path.read_bytes() for path in aside.rglob("*.*") if path.is_file()
        } == old


@pytest.mark.long
def test_a_rewind_is_one_on_every_disk(tmp_path: Path, undisturbed: str) -> None:
    a, b, c = hosts(tmp_path)
    together([a, c]).ok()
    together([a, b], "checkpoint.resume=run/checkpoints/step_00000002", "trainer.steps=4").ok()
    assert [steps(folder) for folder in (a, b)] == [[2, 4], [4]]
    together([a, c], "trainer.steps=8").ok()
    assert [row["step"] for row in rows(c, "train")] == list(range(1, 9))
    assert status(a)["parameters_sha256"] == undisturbed


def test_an_evaluation_writes_nothing_anywhere(held_by_one: Path, tmp_path: Path) -> None:
    a, b = hosts(tmp_path, "ab")
    shutil.copytree(held_by_one, tmp_path, dirs_exist_ok=True)
    together([a, b], "evaluation.only=true").ok()
    assert list((b / "run").iterdir()) == []


def test_a_directory_in_use_on_another_disk_is_refused(tmp_path: Path) -> None:
    a, b = hosts(tmp_path, "ab")
    live = start([*SMALL, "run.dir=run", "trainer.steps=1000000"], b)
    try:
        process = live.members[0].process
        assert process.stdout is not None
        while "run directory" not in process.stdout.readline():
            assert process.poll() is None
        refused = together([a, b])
        assert_refused(refused, CONFIGURATION, "rank 1 on ", "is in use by process", agreed=True)
        assert process.poll() is None
    finally:
        live.kill()


# What goes wrong

LIMITED = [
    "sh",
    "-c",
    'ulimit -f 8; exec "$@"',
    "sh",
    *TRAIN,
]  # no file may grow beyond 4 KiB, as on a full disk
KILLED = """
import os, signal
from mlx_ring.checkpoint import file_transfer
from mlx_ring.train import main

def killed(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

def after_half(self, part, content, write=file_transfer.Writing.write):
    write(self, part, content[: len(content) // 2])
    if part.name == "model.safetensors":
        killed()

if "{who}" == "receiver":
    file_transfer.Writing.write = after_half
else:
    file_transfer.read = killed
main()
"""


def test_a_full_disk_ends_no_run_but_rank_0s(tmp_path: Path) -> None:
    a, b = hosts(tmp_path, "ab")
    together([a, b], programs=[TRAIN, LIMITED]).ok()
    failed = [row for row in rows(a, "event") if row["event"] == "copy_failed"]
    assert [(row["step"], row["rank"]) for row in failed] == [(2, 1), (4, 1), (6, 1)]
    assert all("File too large" in str(row["message"]) and row["host"] for row in failed)
    assert steps(a) == [2, 4, 6] and checkpoints(b) == {}
    together([a, b], "trainer.steps=8").ok()  # there is room again
    assert steps(b) == [6, 8]
    assert (b / "run/metrics.jsonl").read_bytes() == (a / "run/metrics.jsonl").read_bytes()


def test_a_disk_that_cannot_hold_checkpoints_ends_no_run(tmp_path: Path) -> None:
    a, b = hosts(tmp_path, "ab")
    (b / "run").mkdir()
    (b / "run/checkpoints").write_text("kept")
    together([a, b]).ok()
    failed = [row for row in rows(a, "event") if row["event"] == "copy_failed"]
    assert [row["step"] for row in failed] == [0, 2, 4, 6]
    assert "checkpoints is not a directory" in str(failed[0]["message"])
    assert status(a)["state"] == "completed" and (b / "run/checkpoints").read_text() == "kept"


@pytest.mark.parametrize("who", [pytest.param("receiver", marks=pytest.mark.long), "sender"])
def test_a_rank_killed_while_a_copy_is_sent(
    held_by_one: Path, tmp_path: Path, who: str, undisturbed: str
) -> None:
    a, b = hosts(tmp_path, "ab")
    shutil.copytree(held_by_one, tmp_path, dirs_exist_ok=True)
    program = tmp_path / "killed.py"
    program.write_text(KILLED.replace("{who}", who))
    killed = [sys.executable, str(program)]
    folders, programs = ([a, b], [TRAIN, killed]) if who == "receiver" else ([b, a], [TRAIN, killed])
    ranks = together(folders, "trainer.steps=8", programs=programs)
    assert ranks.statuses == [3, -signal.SIGKILL], ranks.report()
    assert steps(b) == [] and steps(a) == [2, 4, 6]
    together(folders, "trainer.steps=8").ok()
    assert status(folders[0])["parameters_sha256"] == undisturbed
    assert steps(b) == [6, 8]
    assert_clean([a, b])


@pytest.mark.parametrize(
    "had",
    [
        "an older checkpoint",
        *(pytest.param(had, marks=pytest.mark.long) for had in ("another run", "nothing")),
    ],
)
def test_a_kill_at_any_moment_of_taking_over(tmp_path: Path, had: str) -> None:
    a, b = hosts(tmp_path, "ab")
    together([a], "metrics.tensorboard=true").ok()
    if had == "an older checkpoint":
        shutil.copytree(a / "run", b / "run")
        together([a], "metrics.tensorboard=true", "trainer.steps=8").ok()
    elif had == "another run":
        together([b], "seed=7").ok()
    else:
        (b / "run").mkdir()
    program = SUPPORT / "killed_take_over.py"
    command = [sys.executable, str(program), str(a / "run"), str(b / "run")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 20


# Parts of files


def test_parts_are_cut_and_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_transfer, "MESSAGE_BYTES", 10)
    given = [Part("a", 0, 4), Part("empty", 0, 0), Part("b", 5, 28), Part("c", 0, 3)]
    assert list(file_transfer._messages(given)) == [
        [Part("a", 0, 4), Part("b", 5, 11)],
        [Part("b", 11, 21)],
        [Part("b", 21, 28), Part("c", 0, 3)],
    ]


def test_what_is_written_goes_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    writing = Writing(tmp_path / "run")
    writing.write(Part("metrics.jsonl", 0, 3), b"new")
    with pytest.raises(OSError, match="symbolic links"):
        writing.end({"metrics.jsonl": 3})
    assert (tmp_path / "elsewhere").read_text() == "kept"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("metrics.jsonl", True), (".hydra/config.yaml", True), ("tensorboard/events.1.end", True),
        ("../metrics.jsonl", False), ("/metrics.jsonl", False), ("tensorboard/..", False),
        ("train.py", False),
        ("tensorboard/../../x", False), (".hydra/a/b", False), ("status.json", False), ("", False),
        ("tensorboard/.hidden", False),
    ],
)  # fmt: skip
def test_names_from_the_wire(name: str, known: bool) -> None:
    assert is_record_name(name) == known
