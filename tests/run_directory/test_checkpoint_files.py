"""Checkpoints on disk: what was written is read or refused, and nothing half done is ever read."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import SUPPORT
from safetensors.numpy import load_file, save_file

from mlx_ring.errors import CheckpointError, NewerCheckpointError
from mlx_ring.run_directory import checkpoint_files as disk
from mlx_ring.run_directory.checkpoint_files import HostArray, HostArrays
from mlx_ring.run_directory.manifest import sealed

MODEL = "model.safetensors"
FILES = ["manifest.json", MODEL, "optimizer.safetensors"]


def host(**arrays: np.ndarray) -> HostArrays:
    """Arrays as they are written, float32."""
    return {
        name: HostArray("float32", array.shape, np.ascontiguousarray(array)) for name, array in arrays.items()
    }


def save(checkpoints: Path, step: int, **facts: Any) -> Path:
    """A small checkpoint, its values the step."""
    weights = {"a.weight": np.full((2, 3), step, np.float32), "b": np.full((), step, np.float32)}
    files = {"model": host(**weights), "optimizer": host(step=np.zeros(1, np.float32))}
    return disk.write(checkpoints, step, files, {"progress": {"step": step}, **facts})[0]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 1, 2 and 3."""
    for step in (1, 2, 3):
        save(tmp_path / "checkpoints", step)
    return tmp_path / "checkpoints"


@pytest.fixture
def newest(checkpoints: Path) -> Path:
    return checkpoints / "step_00000003"


# Written and read


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 7, config={"seed": 1})
    manifest = disk.verify(path)
    assert (path.name, manifest["step"], manifest["config"]) == ("step_00000007", 7, {"seed": 1})
    assert (
        sorted(file.name for file in path.iterdir()) == FILES == sorted([disk.MANIFEST, *manifest["files"]])
    )
    weights = load_file(path / MODEL)
    np.testing.assert_array_equal(weights["a.weight"], np.full((2, 3), 7, np.float32))
    assert weights["b"].shape == ()
    for name, entry in manifest["files"].items():
        content = (path / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_size_that_is_told_is_that_of_the_files(tmp_path: Path) -> None:
    path, size_bytes = disk.write(
        tmp_path / "c", 1, {"model": host(a=np.zeros(100, np.float32))}, {"progress": {}}
    )
    assert size_bytes == (path / MODEL).stat().st_size > 400


@pytest.mark.parametrize(
    ("dtype", "width"), [("bfloat16", 2), ("float16", 2), ("int32", 4), ("uint8", 1), ("bool", 1)]
)
def test_every_dtype_keeps_its_bytes(tmp_path: Path, dtype: str, width: int) -> None:
    content = np.array([0, 1, 1, 0], np.dtype(f"u{width}"))
    path, _ = disk.write(
        tmp_path / "c", 1, {"model": {"a": HostArray(dtype, (2, 2), content)}}, {"progress": {}}
    )
    assert (path / MODEL).read_bytes().endswith(content.tobytes())
    disk.check_safetensors(path / MODEL)


def test_checkpoints_are_private(checkpoints: Path, newest: Path) -> None:
    assert checkpoints.stat().st_mode & 0o077 == newest.stat().st_mode & 0o077 == 0


def test_a_step_is_never_overwritten(checkpoints: Path, newest: Path) -> None:
    before = {path.name: path.read_bytes() for path in newest.iterdir()}
    with pytest.raises(OSError, match=r"not empty|exists"):
        save(checkpoints, 3, config={"seed": 5})
    assert {path.name: path.read_bytes() for path in newest.iterdir()} == before
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        f"step_0000000{step}" for step in (1, 2, 3)
    ]


def test_too_little_space_is_told_before_anything_is_written(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 0, 10))
    with pytest.raises(
        CheckpointError, match=r"checkpoints has 10 bytes free, a checkpoint needs 64; make room"
    ):
        save(checkpoints, 4)
    assert len(list(checkpoints.iterdir())) == 3


def test_a_failed_write_leaves_nothing(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        save(checkpoints, 4)
    assert len(list(checkpoints.iterdir())) == 3


def test_every_file_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash of the machine after the commit must find what the manifest lists."""
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def noted_rename(path: Path, target: Path) -> Path:
        events.append("rename")
        return rename(path, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("names of descriptors need /proc")
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    save(tmp_path / "checkpoints", 1)
    temporary = f".tmp-00000001-{os.getpid()}"
    made = tmp_path.name  # which now holds checkpoints/
    assert events == [
        made,
        MODEL,
        "optimizer.safetensors",
        "manifest.json",
        temporary,
        "rename",
        "checkpoints",
    ]


# Found


def test_the_newest_comes_first_whatever_the_number_of_digits(tmp_path: Path) -> None:
    for name in (
        "step_00000009",
        "step_00000100",
        "step_123456789",
        "step_7",
        "step_00000010.old",
        ".tmp-00000300-1",
    ):
        (tmp_path / name).mkdir()
    assert [path.name for path in disk.scan(tmp_path)] == ["step_123456789", "step_00000100", "step_00000009"]
    assert disk.scan(tmp_path / "absent") == []
    assert disk.step_directory(tmp_path, 123456789).name == "step_123456789"
    assert (disk.step_of(Path("step_00000100")), disk.step_of(Path("elsewhere"))) == (100, -1)


def test_the_newest_valid_one_is_found_and_the_others_explained(checkpoints: Path, newest: Path) -> None:
    (newest / MODEL).unlink()
    (checkpoints / "step_00000002/manifest.json").write_text("{")
    path, manifest, problems = disk.newest_valid(disk.scan(checkpoints))
    assert path == checkpoints / "step_00000001" and manifest["step"] == 1
    assert [
        name in problem for name, problem in zip(["step_00000003", "step_00000002"], problems, strict=True)
    ] == [True, True]


def test_no_valid_one_is_none(checkpoints: Path) -> None:
    for path in checkpoints.iterdir():
        (path / "manifest.json").unlink()
    path, manifest, problems = disk.newest_valid(disk.scan(checkpoints))
    assert (path, manifest, len(problems)) == (None, {}, 3)


def test_sweeping_deletes_what_the_dead_left_and_no_more(checkpoints: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = [f".tmp-00000004-{ended.pid}", f".del-step_00000001-{ended.pid}", f".tmp-00000005-{os.getpid()}"]
    kept = [f".tmp-00000006-{os.getppid()}", ".tmp-notes", "notes"]
    for name in (*left, *kept):
        (checkpoints / name).mkdir()
        (checkpoints / name / MODEL).touch()
    disk.sweep(checkpoints)
    steps = [f"step_0000000{step}" for step in (1, 2, 3)]
    assert sorted(path.name for path in checkpoints.iterdir()) == sorted([*kept, *steps])
    disk.sweep(checkpoints / "absent")


def test_removing_is_renaming_first(checkpoints: Path, newest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if killed before the deletion
    disk.remove(newest)
    assert disk.scan(checkpoints)[0].name == "step_00000002"
    monkeypatch.undo()
    disk.sweep(checkpoints)
    assert not list(checkpoints.glob(".del-*"))


# Damaged


def seal(checkpoint: Path) -> None:
    """Make the manifest right for the files as they are now."""
    content = json.loads((checkpoint / disk.MANIFEST).read_text())
    for name in content["files"]:
        held = (checkpoint / name).read_bytes()
        content["files"][name] = {"bytes": len(held), "sha256": hashlib.sha256(held).hexdigest()}
    (checkpoint / disk.MANIFEST).write_text(json.dumps(sealed(content)))


def in_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        content = json.loads((checkpoint / disk.MANIFEST).read_text())
        change(content)
        (checkpoint / disk.MANIFEST).write_text(json.dumps(sealed(content)))

    return damage


def safetensors(header: bytes, data_bytes: int) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        (checkpoint / MODEL).write_bytes(len(header).to_bytes(8, "little") + header + bytes(data_bytes))
        seal(checkpoint)

    return damage


def longer(checkpoint: Path) -> None:
    with (checkpoint / MODEL).open("ab") as file:
        file.write(bytes(4))
    seal(checkpoint)


def linked(checkpoint: Path) -> None:
    (checkpoint / MODEL).rename(checkpoint.parent.parent / "elsewhere")
    (checkpoint / MODEL).symlink_to(checkpoint.parent.parent / "elsewhere")


def a_folder(checkpoint: Path) -> None:
    (checkpoint / MODEL).unlink()
    (checkpoint / MODEL).mkdir()


def named(name: str) -> Callable[[Path], None]:
    return in_manifest(lambda content: content["files"].update({name: content["files"][MODEL]}))


TWO = b'"%s":{"dtype":"F32","shape":[2],"data_offsets":[%d,%d]}'
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (
        lambda path: (path / disk.MANIFEST).unlink(),
        "manifest.json cannot be read: No such file",
    ),
    "no JSON": (lambda path: (path / disk.MANIFEST).write_text('{"a":'), "manifest.json is not JSON"),
    "no UTF-8": (
        lambda path: (path / disk.MANIFEST).write_bytes(b"\xff\xfe\x00"),
        "manifest.json is not JSON",
    ),
    "nested": (lambda path: (path / disk.MANIFEST).write_text("[" * 10**5), "manifest.json is not JSON"),
    "a list": (lambda path: (path / disk.MANIFEST).write_text("[]"), "manifest.json is no manifest"),
    "no files": (in_manifest(lambda content: content.pop("files")), "manifest.json is no manifest"),
    "files is a list": (
        in_manifest(lambda content: content.update(files=[])),
        "manifest.json is no manifest",
    ),
    "no model": (in_manifest(lambda content: content["files"].pop(MODEL)), "lists no model.safetensors"),
    "no version": (in_manifest(lambda content: content.pop("format_version")), "format version None"),
    "no such version": (in_manifest(lambda content: content.update(format_version=0)), "format version 0;"),
    "no step": (in_manifest(lambda content: content.pop("step")), "step must be a whole number; got None"),
    "step below 0": (
        in_manifest(lambda content: content.update(step=-1)),
        "step must be a whole number; got -1",
    ),
    "step true": (
        in_manifest(lambda content: content.update(step=True)),
        "step must be a whole number; got True",
    ),
    "no progress": (
        in_manifest(lambda content: content.pop("progress")),
        "progress must be counters.* got None",
    ),
    "other progress": (
        in_manifest(lambda content: content.update(progress={"step": 2})),
        "progress must be .* its step the manifest's",
    ),
    "text in progress": (
        in_manifest(lambda content: content["progress"].update(tokens="3")),
        "progress must be counters",
    ),
    "config is text": (in_manifest(lambda content: content.update(config="a")), "config must be a group"),
    "no size": (
        in_manifest(lambda content: content["files"].update({MODEL: {"sha256": ""}})),
        "files must be sizes",
    ),
    "no checksum": (
        in_manifest(lambda content: content["files"].update({MODEL: {"bytes": 1}})),
        "files must be sizes",
    ),
    "missing file": (lambda path: (path / MODEL).unlink(), "model.safetensors cannot be read: No such file"),
    "a folder": (a_folder, "model.safetensors cannot be read: not a regular file"),
    "symbolic link": (linked, "model.safetensors cannot be read: a symbolic link, which is refused"),
    "empty": (
        lambda path: (path / MODEL).write_bytes(b""),
        "model.safetensors has 0 bytes, its manifest says",
    ),
    "trailing bytes": (longer, "model.safetensors is no valid safetensors file"),
    "overlap": (
        safetensors(b"{%s,%s}" % (TWO % (b"a", 0, 8), TWO % (b"b", 4, 12)), 12),
        "no valid safetensors",
    ),
    "duplicate": (
        safetensors(b"{%s,%s}" % (TWO % (b"a", 0, 8), TWO % (b"a", 8, 16)), 16),
        "no valid safetensors",
    ),
    "hole": (
        safetensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}', 12),
        "no valid safetensors",
    ),
    "wrong width": (
        safetensors(b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', 8),
        "no valid safetensors",
    ),
    "huge header": (
        lambda path: ((path / MODEL).write_bytes((1 << 60).to_bytes(8, "little")), seal(path)),
        "no valid safetensors",
    ),
    "../ name": (named("../model.safetensors"), r"names '\.\./model\.safetensors': only plain"),
    "absolute name": (named("/etc/model.safetensors"), r"names '/etc/model\.safetensors': only plain"),
    "hidden name": (named(".model.safetensors"), r"names '\.model\.safetensors': only plain"),
    "name with NUL": (named("a\0.safetensors"), "only plain"),
    "pickle": (named("model.pkl"), "names 'model.pkl': only plain .safetensors names are read"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_found_and_named(checkpoints: Path, newest: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(newest)
    with pytest.raises(CheckpointError, match=f"step_00000003.*{message}") as refused:
        disk.verify(newest)
    assert "\n" not in str(refused.value)
    path, _, problems = disk.newest_valid(disk.scan(checkpoints))
    assert path == checkpoints / "step_00000002" and problems == [str(refused.value)]


def test_a_later_version_is_not_passed_over(checkpoints: Path, newest: Path) -> None:
    in_manifest(lambda content: content.update(format_version=2))(newest)
    with pytest.raises(NewerCheckpointError, match="format version 2; this version reads 1: update"):
        disk.newest_valid(disk.scan(checkpoints))


@pytest.mark.parametrize("name", FILES[1:])
def test_a_flipped_bit_or_a_lost_byte_anywhere_is_found(newest: Path, name: str) -> None:
    content = (newest / name).read_bytes()
    for place in range(len(content)):
        flipped = content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]
        (newest / name).write_bytes(flipped)
        with pytest.raises(CheckpointError, match=f"{name} has SHA-256"):
            disk.verify(newest)
    for length in range(len(content)):
        (newest / name).write_bytes(content[:length])
        with pytest.raises(
            CheckpointError, match=f"{name} has {length} bytes, its manifest says {len(content)}"
        ):
            disk.verify(newest)
    (newest / name).write_bytes(content)
    disk.verify(newest)


def test_a_damaged_manifest_is_refused_or_means_the_same(newest: Path) -> None:
    """A flipped bit in a space or in a letter's case of an escape may leave every value as it was."""
    path = newest / disk.MANIFEST
    content = path.read_bytes()
    meant, refusals = json.loads(content), 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        try:
            assert disk.verify(newest) == meant
        except CheckpointError as refused:
            refusals += 1
            assert "\n" not in str(refused)
    assert refusals > 0.9 * len(content.replace(b" ", b"").replace(b"\n", b""))


def test_a_file_that_no_manifest_lists_is_not_read(newest: Path) -> None:
    (newest / "more.safetensors").write_bytes(b"junk")
    assert "more.safetensors" not in disk.verify(newest)["files"]


def test_a_link_to_a_checkpoint_is_no_checkpoint(checkpoints: Path, newest: Path) -> None:
    (checkpoints / "step_00000009").symlink_to(newest)
    with pytest.raises(CheckpointError, match="step_00000009 is no checkpoint: a symbolic link"):
        disk.verify(checkpoints / "step_00000009")


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_make_the_reader_stumble(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / disk.MANIFEST).write_bytes(content)
    (folder / MODEL).write_bytes(content)
    for read in (lambda: disk.verify(folder), lambda: disk.check_safetensors(folder / MODEL)):
        with pytest.raises(CheckpointError):
            read()


# Killed


def test_a_kill_at_any_moment_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    command = [sys.executable, str(SUPPORT / "killed_while_saving.py"), str(tmp_path / "checkpoints"), "60"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = ended.stdout.split()
    assert found.count("readable") >= 120 and found.count("interrupted") >= 20


# The digest of the weights


def independent_sha256(file: Path) -> str:
    """The contract's digest, from the file's own header and bytes."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    digest = hashlib.sha256()
    for name in sorted(set(header) - {"__metadata__"}):
        first, last = header[name]["data_offsets"]
        digest.update(name.encode("utf-8"))
        digest.update(b"\x00")
        digest.update(content[start + first : start + last])
    return digest.hexdigest()


def test_the_digest_of_the_weights_is_the_contracts(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = host(
        **{
            "layers.10.weight": generator.normal(size=(3, 4)).astype(np.float32),
            "layers.2.weight": generator.normal(size=(4, 3)).astype(np.float32).T,  # not row-major in memory
            "Übung.bias": np.float32(3).reshape(()),
            "empty": np.zeros((0, 3), np.float32),
        }
    )
    arrays["half"] = HostArray("bfloat16", (2,), np.array([1, 2], np.uint16))
    path, _ = disk.write(tmp_path / "c", 1, {"model": arrays}, {"progress": {}})
    assert disk.parameters_sha256(arrays) == independent_sha256(path / MODEL)
    assert disk.parameters_sha256({}) == hashlib.sha256().hexdigest()
    save_file(
        {"b": np.array([1, 2], np.float32), "a": np.array([3], np.float32)}, tmp_path / "plain.safetensors"
    )
    by_hand = hashlib.sha256(b"a\0" + bytes.fromhex("00004040") + b"b\0" + bytes.fromhex("0000803f00000040"))
    ordered = host(b=np.array([1, 2], np.float32), a=np.array([3], np.float32))
    assert (
        disk.parameters_sha256(ordered)
        == by_hand.hexdigest()
        == independent_sha256(tmp_path / "plain.safetensors")
    )
