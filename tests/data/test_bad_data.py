"""Data that is missing, damaged, too small or different between hosts gives one line that names the file."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from ranks import TRAIN, command, start
from refusals import CLUSTER, CONFIGURATION, assert_refused, contents

pytestmark = pytest.mark.ranks
SMALL = (
    "trainer.steps=1",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=4",
    "run.dir=run",
    "evaluation.every_steps=null",
)
TEXT = (*SMALL, "model=transformer", "data=text", "data.cache_dir=cache")
TOKENS = (*SMALL, "model=transformer", "data=tokens")


def write_tokens(folder: Path, name: str, *, count: int = 3000, largest: int = 99, **changes: object) -> None:
    """Writes a token file with a vocabulary of 100, and its side-car with `changes`."""
    tokens = (np.arange(count) % (largest + 1)).astype("<u2").tobytes()
    side_car = {"format_version": 1, "dtype": "uint16", "vocabulary_size": 100, "tokens": count}
    (folder / f"{name}.bin").write_bytes(tokens)
    sha256 = hashlib.sha256(tokens).hexdigest()
    (folder / f"{name}.json").write_text(json.dumps({**side_car, "sha256": sha256, **changes}))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with good and bad data of every kind."""
    for name in ("no_files", "no_match", "not_utf8", "images", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "no_match/notes.md").write_text("text")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "nul.txt").write_bytes(b"first\nsecond\0\n" * 1000)
    (tmp_path / "not_utf8/page.txt").write_bytes(b"first\nsecond \xff\n" * 1000)
    (tmp_path / "good/page.txt").write_text("a line of text\n" * 1000)
    (tmp_path / "images/train-images-idx3-ubyte").write_bytes(b"not images")
    for name in ("train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / "images" / name).touch()
    write_tokens(tmp_path, "foreign", largest=100)
    write_tokens(tmp_path, "few", count=500)
    write_tokens(tmp_path, "newer", format_version=9)
    write_tokens(tmp_path, "longer", tokens=4000)
    write_tokens(tmp_path, "flipped", sha256="ab" * 32)
    write_tokens(tmp_path, "no_json")
    (tmp_path / "no_json.json").write_text("{oops")
    write_tokens(tmp_path, "alone")
    (tmp_path / "alone.json").unlink()
    (tmp_path / "broken.py").write_text("def build(:")
    return tmp_path


ROWS = {
    "absent text": ((*TEXT, "data.path=nowhere"), ["data.path=nowhere does not exist"]),
    "empty text": ((*TEXT, "data.path=empty.txt"), ["data.path=empty.txt holds no text"]),
    "empty folder": (
        (*TEXT, "data.path=no_files"),
        ["data.path=no_files holds no text", "data.pattern=**/*.txt"],
    ),
    "no match": (
        (*TEXT, "data.path=no_match"),
        ["data.path=no_match holds no text", "data.pattern=**/*.txt"],
    ),
    "short text": ((*TEXT, "data.path=short.txt"), ["9 tokens", "65", "data.held_out_fraction"]),
    "not UTF-8": (
        (*TEXT, "data.path=not_utf8"),
        ["not_utf8/page.txt, line 2", "0xff is not UTF-8", "data.exclude"],
    ),
    "NUL": ((*TEXT, "data.path=nul.txt"), ["nul.txt, line 2", "NUL"]),
    "cache": ((*TEXT, "data.path=good", "data.cache_dir=nul.txt"), ["kept in nul.txt", "data.cache_dir"]),
    "home of the cache": (
        (*TEXT, "data.path=good", "data.cache_dir='~no_such_user/cache'"),
        ["data.cache_dir=~no_such_user/cache is in a home folder that is not known", "set HOME"],
    ),
    "home of text": ((*TEXT, "data.path='~no_such_user'"), ["data.path=~no_such_user is in a home"]),
    "home of tokens": ((*TOKENS, "data.path='~no_such_user/a.bin'"), ["data.path=~no_such_user/a.bin is in"]),
    "home of images": (
        (*SMALL, "data=fashion_mnist", "data.path='~no_such_user'"),
        ["data.path=~no_such_user is in a home"],
    ),
    "absent tokens": ((*TOKENS, "data.path=nowhere.bin"), ["data.path=nowhere.bin is not a file", ".json"]),
    "no side-car": ((*TOKENS, "data.path=alone.bin"), ["alone.json is missing", "vocabulary_size"]),
    "no JSON": (
        (*TOKENS, "data.path=no_json.bin"),
        ["no_json.json cannot be read as JSON", "line 1 column 2"],
    ),
    "a flipped bit": (
        (*TOKENS, "data.path=flipped.bin"),
        ["flipped.bin has SHA-256", "abababababab", "again"],
    ),
    "newer side-car": ((*TOKENS, "data.path=newer.bin"), ["newer.json", "format_version 9", "newer than 1"]),
    "truncated": (
        (*TOKENS, "data.path=longer.bin"),
        ["longer.bin holds 6000 bytes", "4000 tokens", "8000 bytes"],
    ),
    "foreign token": (
        (*TOKENS, "data.path=foreign.bin"),
        ["foreign.bin holds the token 100", "vocabulary has 100"],
    ),
    "few tokens": ((*TOKENS, "data.path=few.bin"), ["7 training samples", "global batch of 8"]),
    "long sequences": (
        (*TOKENS, "data.path=few.bin", "data.sequence_length=65"),
        ["data.sequence_length=65", "maximum of 64", "model.max_sequence_length"],
    ),
    "absent images": (
        (*SMALL, "data=fashion_mnist", "data.path=nowhere"),
        ["not in nowhere", "train-images-idx3-ubyte", "data.path=FOLDER"],
    ),
    "damaged images": (
        (*SMALL, "data=fashion_mnist", "data.path=images"),
        ["images/train-images-idx3-ubyte", "must start with 00000803"],
    ),
    "few samples": (
        (*SMALL, "data=synthetic", "data.samples=7"),
        ["7 training samples", "global batch of 8", "trainer.global_batch_size"],
    ),
    "language data": (
        (*SMALL, "data=text", "data.path=good"),
        ["data=text", "language", "classifier", "model=transformer"],
    ),
    "image data": ((*SMALL, "model=transformer"), ["data=digits", "classifier", "language", "data=text"]),
    "own code": (
        (*SMALL, "data=custom", "data.import_path=broken:build"),
        ["data.import_path=broken:build cannot be imported", "SyntaxError"],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_bad_data_is_refused(files: Path, name: str) -> None:
    overrides, words = ROWS[name]
    before = contents(files)
    assert_refused(start(overrides, files).wait(), CONFIGURATION, *words)
    after = contents(files)
    assert {path: after.get(path) for path in before} == before
    assert not list(files.glob("run/checkpoints"))


def test_a_user_without_a_home_is_told_which_setting_avoids_it(files: Path) -> None:
    """As in a container: HOME is not set, and the user's number has no entry."""
    stranger = ["unshare", "--user", "--map-user=54321", "env", "-u", "HOME"]
    if not shutil.which("unshare") or subprocess.run([*stranger, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces")
    text = ["data.path=good", *(item for item in TEXT if not item.startswith("data.cache_dir"))]
    done = command([*stranger, *TRAIN, *text], files)
    assert_refused(
        done, CONFIGURATION, "data.cache_dir=~/.cache/mlx_ring is in a home folder that is not known"
    )
    command([*stranger, *TRAIN, *text, "data.cache_dir=cache"], files).ok()


def test_a_rank_without_a_home_is_told_by_rank_0(files: Path) -> None:
    where = [{"CACHE": "cache"}, {"CACHE": "~no_such_user"}]
    own = ("data.path=good", "data.distribute=true", "data.cache_dir=${oc.env:CACHE}")
    ranks = start([*TEXT, *own], files, world_size=2, variables=where).wait()
    assert_refused(
        ranks, CONFIGURATION, "rank 1 on ", "data.cache_dir=~no_such_user is in a home", agreed=True
    )


def test_all_ranks_share_one_refusal_of_the_data(files: Path) -> None:
    ranks = start([*SMALL, "data=synthetic", "data.samples=7"], files, world_size=2).wait()
    assert_refused(ranks, CONFIGURATION, "7 training samples", "global batch of 8", agreed=True)


def test_data_that_one_rank_lacks_is_told_by_rank_0(files: Path) -> None:
    where = [{"DATA": "good"}, {"DATA": "nowhere"}]
    ranks = start([*TEXT, "data.path=${oc.env:DATA}"], files, world_size=2, variables=where).wait()
    assert_refused(ranks, CONFIGURATION, "rank 1 on ", "data.path=nowhere does not exist", agreed=True)


def test_data_that_differs_between_hosts_is_refused(files: Path) -> None:
    (files / "other").mkdir()
    (files / "other/page.txt").write_text("another line\n" * 1000)
    where = [{"DATA": "good"}, {"DATA": "other"}]
    ranks = start([*TEXT, "data.path=${oc.env:DATA}"], files, world_size=2, variables=where).wait()
    words = [
        "the ranks do not agree: data is",
        "on rank 1",
        "on rank 0",
        "copy the data",
        "data.distribute=true",
    ]
    assert_refused(ranks, CLUSTER, *words, agreed=True)
    assert not list(files.glob("run/checkpoints"))
