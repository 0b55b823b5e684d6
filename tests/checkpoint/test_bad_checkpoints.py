"""A checkpoint that cannot be used or written: one line, the contract's status, nothing lost."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import SMALL, TRAIN, Ranks, mlx_ring, rows, start, status, train
from refusals import CHECKPOINT, CONFIGURATION, assert_refused, contents
from safetensors.numpy import load_file, save_file

from mlx_ring.run_directory.manifest import sealed

pytestmark = pytest.mark.ranks

Damage = Callable[[Path], None]
MODEL = "model.safetensors"


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, with files that are no checkpoints beside."""
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for name in ("a_file", "old.npz", "old.pkl"):
        (tmp_path / name).write_text("not a checkpoint")
    return tmp_path


def seal(checkpoint: Path) -> None:
    """Make the manifest right for the files as they are now: only a look inside can tell the damage."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (checkpoint / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(sealed(manifest)))


def manifest(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(checkpoint: Path) -> None:
        content = json.loads((checkpoint / "manifest.json").read_text())
        change(content)
        (checkpoint / "manifest.json").write_text(json.dumps(sealed(content)))

    return damage


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Damage:
    def damage(checkpoint: Path) -> None:
        arrays = load_file(checkpoint / MODEL)
        change(arrays)
        save_file(arrays, checkpoint / MODEL)
        seal(checkpoint)

    return damage


def content(change: Callable[[bytes], bytes], *, sealed: bool = False) -> Damage:
    def damage(checkpoint: Path) -> None:
        path = checkpoint / MODEL
        path.write_bytes(change(path.read_bytes()))
        if sealed:
            seal(checkpoint)

    return damage


def raw(header: bytes, data_bytes: int) -> Damage:
    return content(lambda _: len(header).to_bytes(8, "little") + header + bytes(data_bytes), sealed=True)


def link(checkpoint: Path) -> None:
    (checkpoint / MODEL).rename(checkpoint.parent / "elsewhere")
    (checkpoint / MODEL).symlink_to(checkpoint.parent / "elsewhere")


def entry(name: str) -> Damage:
    return manifest(lambda content: content["files"].update({name: content["files"][MODEL]}))


TWO = b'"%s":{"dtype":"F32","shape":[2],"data_offsets":[%d,%d]}'
DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    "no manifest": (
        lambda path: (path / "manifest.json").unlink(),
        ["manifest.json cannot be read: No such file"],
    ),
    "bad JSON": (
        lambda path: (path / "manifest.json").write_text("{oops"),
        ["manifest.json is not JSON", "line 1"],
    ),
    "not an object": (
        lambda path: (path / "manifest.json").write_text("[]"),
        ["manifest.json is no manifest"],
    ),
    "nested": (lambda path: (path / "manifest.json").write_text("[" * 10**5), ["manifest.json is not JSON"]),
    "no step": (manifest(lambda content: content.pop("step")), ["manifest.json is damaged", "step", "None"]),
    "wrong progress": (
        manifest(lambda content: content.update(progress={"step": 1})),
        ["damaged", "progress", "1"],
    ),
    "no size": (
        manifest(lambda content: content["files"].update({MODEL: None})),
        ["damaged", "files", "None"],
    ),
    "newer format": (
        manifest(lambda content: content.update(format_version=2)),
        ["format version 2", "reads 1", "update mlx_ring"],
    ),
    "bit flip": (
        content(lambda old: old[:-1] + bytes([old[-1] ^ 1])),
        [MODEL, "has SHA-256", "its manifest says"],
    ),
    "truncated": (content(lambda old: old[:-8]), [MODEL, "bytes, its manifest says"]),
    "trailing bytes": (
        content(lambda old: old + bytes(8), sealed=True),
        [MODEL, "no valid safetensors file"],
    ),
    "huge header": (
        content(lambda old: (1 << 40).to_bytes(8, "little") + old[8:], sealed=True),
        [MODEL, "header too large"],
    ),
    "overlap": (
        raw(b"{%s,%s}" % (TWO % (b"a", 0, 8), TWO % (b"b", 4, 12)), 12),
        [MODEL, "no valid safetensors file"],
    ),
    "duplicate key": (
        raw(b"{%s,%s}" % (TWO % (b"a", 0, 8), TWO % (b"a", 8, 16)), 16),
        [MODEL, "no valid safetensors file"],
    ),
    "missing file": (lambda path: (path / MODEL).unlink(), [MODEL, "cannot be read: No such file"]),
    "missing tensor": (tensors(lambda arrays: arrays.pop("head.bias")), [f"{MODEL} lacks head.bias"]),
    "extra tensor": (
        tensors(lambda arrays: arrays.update(more=np.zeros(3, np.float32))),
        [f"{MODEL} holds more"],
    ),
    "other shape": (
        tensors(lambda arrays: arrays.update({"head.bias": np.zeros(3, np.float32)})),
        ["head.bias", "(3,)", "(10,)"],
    ),
    "other dtype": (
        tensors(lambda arrays: arrays.update({"head.bias": np.zeros(10, np.float16)})),
        ["head.bias", "float16", "float32"],
    ),
    "../ name": (entry("../model.safetensors"), ["manifest.json names '../model.safetensors'", "only plain"]),
    "absolute name": (
        entry("/tmp/model.safetensors"),
        ["manifest.json names '/tmp/model.safetensors'", "only plain"],
    ),
    "pickle inside": (
        entry("optimizer.pkl"),
        ["manifest.json names 'optimizer.pkl'", "only plain .safetensors"],
    ),
    "symbolic link": (link, [MODEL, "a symbolic link, which is refused"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_that_was_asked_for_is_refused(folder: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    damage(folder / "run/checkpoints/step_00000006")
    before = contents(folder)
    ranks = train(folder, "checkpoint.resume=run/checkpoints/step_00000006", "trainer.steps=7", run="new")
    assert_refused(ranks, CHECKPOINT, "run/checkpoints/step_00000006", *words)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("checkpoint.resume=nowhere", ["nowhere does not exist", "checkpoints/step_…"]),
        ("checkpoint.resume=a_file", ["a_file is a file", "checkpoints/step_…"]),
        ("checkpoint.resume=empty", ["no usable checkpoint in empty"]),
        ("checkpoint.resume=old.npz", ["old.npz is not supported", "never pickles"]),
        ("checkpoint.resume=old.pkl", ["old.pkl is not supported", "never pickles"]),
        ("checkpoint.initialize_from=nowhere", ["nowhere does not exist"]),
        ("checkpoint.initialize_from=old.npz", ["old.npz is not supported", "never pickles"]),
        ("evaluation.only=true", ["evaluation.only=true found no checkpoint", "checkpoint.resume=PATH"]),
    ],
)
def test_a_path_that_is_no_checkpoint_is_refused(folder: Path, override: str, words: list[str]) -> None:
    before = contents(folder)
    assert_refused(train(folder, override, run="new"), CHECKPOINT, *words)
    assert contents(folder) == before


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    ranks = train(folder, "checkpoint.initialize_from=run", "model.hidden_sizes=[8]", run="new", world_size=2)
    assert_refused(ranks, CHECKPOINT, "layers.0.linear.weight", "(16, 64)", "(8, 64)", "run", agreed=True)


def test_a_damaged_newest_checkpoint_is_passed_over(folder: Path) -> None:
    content(lambda old: old[:-8])(folder / "run/checkpoints/step_00000006")
    train(folder, "checkpoint.every_steps=3").ok()
    events = {row["event"]: str(row["message"]) for row in rows(folder, "event")}
    assert (
        "fell back to step_00000003" in events["checkpoint_damaged"] and MODEL in events["checkpoint_damaged"]
    )
    assert status(folder)["step"] == 6


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(folder: Path) -> None:
    for checkpoint in (folder / "run/checkpoints").iterdir():
        content(lambda old: old[:-8])(checkpoint)
    before = contents(folder / "run")
    ranks = train(folder, "trainer.steps=9", world_size=2)
    assert_refused(
        ranks, CHECKPOINT, "no usable checkpoint in", "run", MODEL, "checkpoint.resume=never", agreed=True
    )
    assert contents(folder / "run") == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.hidden_sizes=[8]"],
            ["model.hidden_sizes is [8] now and was [16]", "checkpoint.initialize_from"],
        ),
        (["optimizer.learning_rate=0.5"], ["optimizer.learning_rate is 0.5 now and was 0.001"]),
        (["data=synthetic"], ["data.name is synthetic now and was digits"]),
        (["seed=5"], ["seed is 5 now and was 0"]),
        (["trainer.global_batch_size=64"], ["trainer.global_batch_size is 64 now and was 32"]),
    ],
)
def test_a_resumed_run_that_changed_is_refused(folder: Path, overrides: list[str], words: list[str]) -> None:
    before, verdict = contents(folder), status(folder)
    assert_refused(train(folder, "trainer.steps=9", *overrides), CONFIGURATION, *words)
    assert contents(folder) == before and status(folder) == verdict


def test_a_resumed_run_whose_data_changed_is_refused(folder: Path) -> None:
    manifest(lambda content: content.update(data_sha256="0" * 64))(folder / "run/checkpoints/step_00000006")
    before = contents(folder)
    assert_refused(
        train(folder, "trainer.steps=9"),
        CONFIGURATION,
        "data's SHA-256 is",
        "was 000000000000",
        "step_00000006",
    )
    assert contents(folder) == before


# Writing


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    live = start([*SMALL, "run.dir=run", "trainer.steps=1000000"], tmp_path)
    try:
        process = live.members[0].process
        assert process.stdout is not None
        while "run directory" not in process.stdout.readline():
            assert process.poll() is None
        config, verdict = (tmp_path / "run/config.yaml").read_bytes(), status(tmp_path)
        assert_refused(train(tmp_path), CONFIGURATION, "run.dir", f"in use by process {process.pid} on ")
        assert (tmp_path / "run/config.yaml").read_bytes() == config
        assert (status(tmp_path)["job"], status(tmp_path)["state"]) == (verdict["job"], "running")
        assert process.poll() is None
    finally:
        live.kill()


def test_checkpoints_that_are_a_file_are_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").write_text("kept")
    assert_refused(train(tmp_path), CONFIGURATION, "run.dir", "checkpoints is not a directory")
    assert (tmp_path / "run/checkpoints").read_text() == "kept"


def limited(folder: Path, blocks: int, *overrides: str) -> Ranks:
    """Train where no file may grow beyond `blocks` of 512 bytes: writing fails as on a full disk."""
    shell = ["sh", "-c", f'ulimit -f {blocks}; exec "$@"', "sh", *TRAIN]
    return start([*SMALL, "run.dir=run", *overrides], folder, program=shell).wait()


def test_a_disk_that_fills_up_ends_the_run_and_loses_nothing(folder: Path) -> None:
    before = contents(folder / "run/checkpoints")
    ranks = limited(
        folder,
        8,
        "trainer.steps=8",
        "schedule=constant",
        "checkpoint.resume=never",
        "checkpoint.every_steps=null",
    )
    assert_refused(ranks, CHECKPOINT, "the last checkpoint could not be written", "File too large")
    assert contents(folder / "run/previous_1/checkpoints") == before
    assert not list(folder.glob("run/checkpoints/*"))
    assert status(folder)["state"] == "failed"


def test_too_many_failed_saves_end_the_run(tmp_path: Path) -> None:
    ranks = limited(tmp_path, 8, "trainer.steps=100", "checkpoint.every_steps=1", "checkpoint.max_failures=2")
    assert_refused(ranks, CHECKPOINT, "2 checkpoints in a row could not be written", "File too large")
    assert "2 of 2 in a row" in str(rows(tmp_path, "event")[-1]["message"])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_link_to_a_disk_that_is_not_there_is_refused_at_the_start(tmp_path: Path, world_size: int) -> None:
    (tmp_path / "run").mkdir()
    link = tmp_path / "run/checkpoints"
    link.symlink_to(tmp_path / "disk")
    words = ("run/checkpoints", f"a link to {tmp_path / 'disk'}", "does not exist", "mount its disk")
    for overrides in ((), ("checkpoint.resume=never",)):
        refused = train(tmp_path, *overrides, world_size=world_size)
        assert_refused(refused, CONFIGURATION, *words, agreed=True)
    assert link.is_symlink() and not (tmp_path / "run/metrics.jsonl").exists()
    assert_refused(train(tmp_path, "evaluation.only=true"), CHECKPOINT, *words)
    assert_refused(train(tmp_path, "checkpoint.resume=run", run="other"), CHECKPOINT, *words)
    assert_refused(mlx_ring(tmp_path, "checkpoint", "list", "run"), CHECKPOINT, *words)
    (tmp_path / "disk").mkdir()
    train(tmp_path).ok()
    assert (tmp_path / "disk/step_00000006/manifest.json").exists()


@pytest.mark.parametrize("key", ["checkpoint.resume", "checkpoint.initialize_from"])
def test_a_home_folder_that_is_not_known_is_refused(tmp_path: Path, key: str) -> None:
    refused = train(tmp_path, f"{key}='~no_such_user/run'", world_size=2)
    words = f"{key}=~no_such_user/run is in a home folder that is not known here"
    assert_refused(refused, CONFIGURATION, words, agreed=True)
