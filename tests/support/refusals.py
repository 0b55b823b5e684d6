"""What every refusal has in common: one line on stderr, the contract's exit status, and nothing lost."""

from pathlib import Path

from ranks import Ranks

CONFIGURATION, CLUSTER, TRAINING, CHECKPOINT = 2, 3, 4, 5


def assert_refused(ranks: Ranks, status: int, *words: str, agreed: bool = False) -> None:
    """Every rank ended with `status` and one line that holds `words`; if `agreed`, rank 0 alone spoke."""
    assert ranks.statuses == [status] * len(ranks.members), ranks.report()
    for number, rank in enumerate(ranks.members):
        assert "Traceback" not in rank.stdout + rank.stderr, ranks.report()
        lines = [line for line in rank.stderr.splitlines() if line.startswith("error:")]
        assert len(lines) == (0 if agreed and number else 1), ranks.report()
        for line in lines:
            missing = [word for word in words if word not in line]
            assert not missing, f"{line!r} does not tell {missing}"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, but for locks, logs and the verdict, which any start may touch."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if path.name not in ("run.lock", "status.json") and path.suffix != ".log"
    }
