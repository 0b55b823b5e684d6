"""What the README, and the page of own parts that it leads to, show works as it stands there."""

import re
import shlex
from pathlib import Path

import pytest
from ranks import ROOT, rows, start, status

README = (ROOT / "README.md").read_text(encoding="utf-8")
YOUR_OWN = (ROOT / "docs/your-own.md").read_text(encoding="utf-8")


@pytest.mark.ranks
def test_the_example_of_own_parts_learns(tmp_path: Path) -> None:
    """Its data, model and loss, with its own command's overrides, in a folder that holds nothing else."""
    (program,) = re.findall(r"```python\n(.*?)```", YOUR_OWN, re.DOTALL)
    (tmp_path / "my_parts.py").write_text(program)
    (command,) = [line for line in YOUR_OWN.replace("\\\n", "").splitlines() if "my_parts:rings" in line]
    arguments = shlex.split(command, comments=True)
    overrides = arguments[arguments.index("train.py") + 1 :]
    start([*overrides, "run.dir=run"], tmp_path, world_size=2).wait().ok()
    assert status(tmp_path)["state"] == "completed"
    (*_, last) = rows(tmp_path, "evaluation")
    assert isinstance(last["accuracy"], float)
    assert last["accuracy"] > 0.9


def test_every_named_path_is_there() -> None:
    """Files of the repository that it names; hostfiles/macs.json is the reader's to write."""
    named = set(re.findall(r"(?:benchmarks|hostfiles|conf|docs)/[\w./-]*\w", README)) - {
        "hostfiles/macs.json"
    }
    assert named
    assert {path for path in named if not (ROOT / path).exists()} == set()
