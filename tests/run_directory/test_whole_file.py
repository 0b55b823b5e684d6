"""A file that is written whole: the old content or the new, whatever happens between them."""

import os
from pathlib import Path

import pytest

from mlx_ring.run_directory.whole_file import whole_file


def test_the_new_content_takes_the_old_ones_place(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text("old")
    with whole_file(path, sync=True) as new:
        new.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_block_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="half"), whole_file(path) as new:
        new.write_text("ne")
        raise ValueError("half written")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_permissions(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        with whole_file(tmp_path / "usual"), whole_file(tmp_path / "shared", mode=0o664):
            pass
    finally:
        os.umask(previous)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"usual": 0o640, "shared": 0o664}


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "nowhere/file"):
        raise AssertionError("there is nothing to fill")
