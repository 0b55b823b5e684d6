import contextlib
import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from tensorboard_server import Server

from mlx_ring.run_directory.metrics_tracker import MetricsTracker, read_rows

REPOSITORY = Path(__file__).parents[2]


def open_tracker(directory, *, restored_step=0, total_steps=400, console=False, tensorboard=False):
    return MetricsTracker(
        directory,
        total_steps=total_steps,
        restored_step=restored_step,
        console=console,
        tensorboard=tensorboard,
        hyperparameters={"optimizer.learning_rate": 0.001, "model.name": "mlp", "seed": 7, "compile": True},
        title="digits, mlp, 2 ranks",
    )


def train_row(step, **changed):
    row = {
        "step": step,
        "samples": 64 * step,
        "tokens": 0,
        "loss": 1 / step,
        "learning_rate": 9.1e-4,
        "gradient_norm": 1.5,
        "step_seconds": 0.1,
        "compute_seconds": 0.08,
        "communication_seconds": 0.003,
        "data_seconds": 0.001,
        "samples_per_second": 12345.4,
        "tokens_per_second": 0.0,
        "peak_memory_bytes": 123456789,
        "world_size": 2,
        "wire_bytes": 4096,
        "wall_time": 0.1 * step,
    }
    return row | changed


EVALUATION = {"step": 100, "loss": 0.23451, "accuracy": 0.9512, "samples": 10000, "seconds": 0.3131}
CHECKPOINT = {
    "step": 100,
    "path": "checkpoints/step_00000100",
    "bytes": 1234567,
    "stall_seconds": 0.01,
    "write_seconds": 0.2,
}
EVENT = {"event": "straggler", "step": 120, "message": "rank 1 takes 1.4 times the median", "rank": 1}

# A run in a process of its own, for what needs one: a terminal, a signal, a limit.
PROGRAM = """
import itertools, json, sys
from pathlib import Path
sys.path[:0] = ["tests/support", "tests/run_directory"]
from test_metrics_tracker import CHECKPOINT, EVALUATION, EVENT, open_tracker, train_row
"""


def start(program, *arguments, **options):
    command = [sys.executable, "-W", "error", "-c", PROGRAM + program, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, **options)


# --- metrics.jsonl


def test_each_row_is_one_line_of_strict_json_on_disk_at_once(tmp_path):
    tracker = open_tracker(tmp_path)
    path = tmp_path / "metrics.jsonl"
    tracker.record("train", train_row(1, loss=math.nan, gradient_norm=math.inf))
    tracker.record(
        "event", {"event": "x", "step": 1, "message": "ä\n", "ranks": [1.5, -math.inf], "of": {"a": math.nan}}
    )

    lines = path.read_text(encoding="utf-8").splitlines()  # before close: each line was flushed
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert list(rows[0]) == ["kind", *train_row(1)]
    assert rows[0] == {"kind": "train", **train_row(1), "loss": None, "gradient_norm": None}
    assert rows[1] == {
        "kind": "event", "event": "x", "step": 1, "message": "ä\n", "ranks": [1.5, None], "of": {"a": None},
    }  # fmt: skip
    assert read_rows(path) == rows
    tracker.flush()
    tracker.close(True)
    assert read_rows(path) == rows


def test_a_row_of_an_unknown_kind_is_refused(tmp_path):
    tracker = open_tracker(tmp_path)
    with pytest.raises(AssertionError, match="training"):
        tracker.record("training", train_row(1))
    tracker.close(False)


@pytest.mark.parametrize("torn", [b'{"kind": "train", "step": 1', b'{"kind": "train", "step": 1}', b"\0\0\n"])
@pytest.mark.parametrize(
    ("restored_step", "kept"), [(0, []), (2, [1, 2, 2, 1]), (3, [1, 2, 2, 3, 1]), (9, [1, 2, 2, 3, 1])]
)
def test_a_resume_cuts_later_rows_and_the_torn_line(tmp_path, restored_step, kept, torn):
    tracker = open_tracker(tmp_path)
    for kind, step in (("train", 1), ("train", 2), ("evaluation", 2), ("train", 3), ("checkpoint", 1)):
        tracker.record(kind, {"step": step})
    tracker.close(False)
    path = tmp_path / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(torn)
    assert [row["step"] for row in read_rows(path)] == [1, 2, 2, 3, 1]

    resumed = open_tracker(tmp_path, restored_step=restored_step)
    resumed.record("train", {"step": restored_step + 1})
    resumed.close(True)
    assert [row["step"] for row in read_rows(path)] == [*kept, restored_step + 1]
    assert path.read_bytes().count(b"\n") == len(kept) + 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_killed_run_loses_at_most_its_torn_line(tmp_path):
    program = """
tracker = open_tracker(Path(sys.argv[1]))
for step in itertools.count(1):
    tracker.record("train", train_row(step))
    print(step, flush=True)
"""
    with start(program, tmp_path, stdout=subprocess.PIPE) as process:
        for _ in range(50):
            process.stdout.readline()
        process.kill()
        reported = 50 + len(process.stdout.read().splitlines()) - 1  # the last of them may be torn, too
    steps = [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= reported


def test_a_full_disk_ends_tensorboard_with_a_warning_and_then_the_run_with_an_error(tmp_path):
    """The file size limit stands in for the disk: the event file reaches it first, metrics.jsonl later."""
    program = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
tracker = open_tracker(Path(sys.argv[1]), console=True, tensorboard=True)
try:
    for step in range(1, 1000):
        tracker.record("train", train_row(step))
except OSError as error:
    print(f"raised: {error}")
tracker.close(False)
"""
    with start(program, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    path = tmp_path / "metrics.jsonl"
    rows = read_rows(path)
    off = [row for row in rows if row["kind"] == "event"]
    assert [row["event"] for row in off] == ["tensorboard_off"]
    assert rows[-1]["step"] > off[0]["step"] + 5  # training went on without TensorBoard
    assert [line for line in output.splitlines() if line.startswith("tensorboard_off")] == [
        f"tensorboard_off at step {off[0]['step']}: {off[0]['message']}"
    ]
    assert output.splitlines()[-1] == f"raised: [Errno 27] File too large: '{path}'"


# --- TensorBoard


def test_tensorboard_holds_every_number_at_its_step(tmp_path):
    tracker = open_tracker(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        tracker.record(
            "train", train_row(step, loss=math.nan if step == 2 else 1 / step, gradient_norm=1e300)
        )
    tracker.record("evaluation", EVALUATION)
    tracker.record("checkpoint", CHECKPOINT)
    tracker.record("event", EVENT | {"path": "\udcff"})  # a file name that is not UTF-8
    tracker.close(True)

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0}).Reload()

    def points(tag):
        return [(event.step, make_ndarray(event.tensor_proto).item()) for event in events.Tensors(tag)]

    scalars = {
        *(f"train/{key}" for key in train_row(1) if key not in ("step", "wall_time")),
        *(f"evaluation/{key}" for key in ("loss", "accuracy", "samples", "seconds")),
        *(f"checkpoint/{key}" for key in ("bytes", "stall_seconds", "write_seconds")),
    }
    assert set(events.PluginTagToContent("scalars")) == scalars
    steps, losses = zip(*points("train/loss"), strict=True)
    assert steps == (1, 2, 3)
    assert losses == pytest.approx((1, math.nan, 1 / 3), nan_ok=True)
    assert points("train/gradient_norm") == [(step, math.inf) for step in (1, 2, 3)]
    assert points("evaluation/accuracy") == [(100, pytest.approx(0.9512))]
    assert points("checkpoint/write_seconds") == [(100, pytest.approx(0.2))]
    assert points("event/straggler") == [
        (120, b"message: rank 1 takes 1.4 times the median\n\nrank: 1\n\npath: ?")
    ]
    assert set(events.PluginTagToContent("hparams")) == {
        "_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info",
    }  # fmt: skip


def test_a_real_server_shows_a_resumed_run_as_one(tmp_path):
    first = open_tracker(tmp_path, tensorboard=True)
    for step in range(1, 61):
        first.record("train", train_row(step, loss=-1.0))
    first.close(False)
    (events,) = (tmp_path / "tensorboard").glob("*.rank_0")
    os.truncate(events, events.stat().st_size - 5)  # as a power cut leaves it

    second = open_tracker(tmp_path, tensorboard=True, restored_step=50)
    for step in range(51, 81):
        second.record("train", train_row(step, loss=1.0))
    second.record("evaluation", EVALUATION)
    second.record("checkpoint", CHECKPOINT)  # the last tag: with it, the server has read all
    second.close(True)

    with (tmp_path / "server.log").open("w+b") as log, Server(tmp_path, log) as server:
        deadline = time.monotonic() + 120
        while "checkpoint/bytes" not in server.get("scalars/tags").get("tensorboard", {}):
            assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()
            time.sleep(0.1)
        points = server.get("scalars/scalars", run="tensorboard", tag="train/loss")
        groups = server.session_groups()
    assert [(step, loss) for _, step, loss in points] == [
        (step, -1.0 if step <= 50 else 1.0) for step in range(1, 81)
    ]
    (group,) = groups
    assert group["hparams"] == {
        "optimizer.learning_rate": 0.001,
        "model.name": "mlp",
        "seed": 7,
        "compile": True,
    }
    # Servers keep the first end they meet: the failed session's must be gone.
    assert [session["status"] for session in group["sessions"]] == ["STATUS_SUCCESS"]
    shown = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
    assert shown == {
        "evaluation/loss": pytest.approx(0.23451),
        "evaluation/accuracy": pytest.approx(0.9512),
        "train/loss": 1.0,
    }


def test_a_folder_that_cannot_be_made_costs_tensorboard_only(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("in the way")
    tracker = open_tracker(tmp_path, console=True, tensorboard=True, restored_step=4)
    tracker.record("train", train_row(5))
    tracker.close(True)
    assert [(row["kind"], row["step"]) for row in read_rows(tmp_path / "metrics.jsonl")] == [
        ("event", 4),
        ("train", 5),
    ]
    warning = capsys.readouterr().out.splitlines()[1]
    assert re.fullmatch(r"tensorboard_off at step 4: warning: .*File exists: '.*/tensorboard'", warning)


def test_neither_mlx_nor_tensorflow_nor_torch_is_loaded():
    program = "print([name for name in ('mlx', 'tensorflow', 'torch') if name in sys.modules])"
    with start(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate(timeout=60)[0] == "[]\n"


# --- console

PLAIN_LINES = [
    "digits, mlp, 2 ranks",
    "step 100/400  loss 0.01  lr 9.1e-04  12,345 samples/s  comm 3 %  eta 0:30",
    "evaluation at step 100  loss 0.2345  accuracy 0.9512  samples 10,000  0.313 s",
    "checkpoint at step 100  path checkpoints/step_00000100  1.2 MB  stall 0.01 s  write 0.2 s",
    "step 120/400  loss nan  lr 9.1e-04  0.5 tokens/s  comm 3 %  eta 7:46:40",
    "straggler at step 120: rank 1 takes 1.4 times the median",
    "a line",
]

WHOLE_RUN = """
tracker = open_tracker(Path(sys.argv[1]), console=True)
tracker.record("train", train_row(100))
tracker.record("evaluation", EVALUATION)
tracker.record("checkpoint", CHECKPOINT)
slow = {"tokens": 7, "tokens_per_second": 0.5, "step_seconds": 100.0, "communication_seconds": 3.0}
tracker.record("train", train_row(120, loss=float("nan"), **slow))
tracker.record("event", EVENT)
tracker.message("a\\nline")
tracker.close(True)
"""


def test_elsewhere_than_on_a_terminal_each_row_is_one_plain_line(tmp_path):
    with start(WHOLE_RUN, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        output, errors = process.communicate(timeout=60)
    assert output.splitlines() == PLAIN_LINES
    assert (errors, process.returncode) == ("", 0)


def test_without_console_nothing_is_printed(tmp_path, capfd):
    tracker = open_tracker(tmp_path)
    tracker.record("train", train_row(1))
    tracker.message("unheard")
    tracker.close(True)
    assert capfd.readouterr() == ("", "")


def test_a_row_with_missing_figures_is_still_a_line(tmp_path, capsys):
    tracker = open_tracker(tmp_path, console=True)
    tracker.record("train", {"step": 1, "loss": None, "step_seconds": 0})
    tracker.close(True)
    line = capsys.readouterr().out.splitlines()[1]
    assert line == "step 1/400  loss nan  lr nan  nan samples/s  comm 0 %  eta 0:00"


def test_a_reader_that_went_away_does_not_end_the_run(tmp_path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with start(WHOLE_RUN, tmp_path, stdout=write_end, stderr=subprocess.PIPE, text=True) as process:
        os.close(write_end)
        _, errors = process.communicate(timeout=60)
    assert (errors, process.returncode) == ("", 0)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 5


def test_a_terminal_that_went_away_does_not_end_the_run(tmp_path):
    terminal, process_side = pty.openpty()
    program = WHOLE_RUN.replace("\ntracker.record", "\nsys.stdin.read()\ntracker.record", 1)
    environment = os.environ | {"TERM": "xterm"}
    pipe = subprocess.PIPE
    with start(program, tmp_path, stdin=pipe, stdout=process_side, stderr=pipe, env=environment) as process:
        os.close(process_side)
        received = b""
        while b"waiting for the first step" not in received:
            received += os.read(terminal, 65536)
        os.close(terminal)
        _, errors = process.communicate(timeout=60)
    assert (errors, process.returncode) == (b"", 0)
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 5


def test_a_character_that_the_console_lacks_does_not_end_the_run(tmp_path):
    program = WHOLE_RUN.replace("a\\nline", "\\udcff \\u2026")
    assert program != WHOLE_RUN
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    with start(program, tmp_path, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.communicate(timeout=60)[0].splitlines()[-1] == r"\udcff \u2026"
    assert process.returncode == 0


def on_terminal(directory, columns, rows, **environment):
    """What a pseudo-terminal of that size received from a whole run."""
    terminal, process_side = pty.openpty()
    fcntl.ioctl(process_side, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR")
    }
    environment = clean | {"TERM": "xterm-256color"} | environment
    with start(
        WHOLE_RUN, directory, stdin=process_side, stdout=process_side, stderr=process_side, env=environment
    ) as process:
        os.close(process_side)
        received = b""
        with contextlib.suppress(OSError):  # Linux ends a terminal with EIO, macOS with an empty read
            while chunk := os.read(terminal, 65536):
                received += chunk
    os.close(terminal)
    assert process.returncode == 0, received
    return received.decode()


def visible(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")


def test_a_terminal_shows_a_live_view(tmp_path):
    received = on_terminal(tmp_path, 100, 30)
    first, *_, last = visible(received).split("step 100/400")[0], visible(received).split("step 120/400")[-1]
    assert "waiting for the first step" in first
    assert re.search(r"━.* 30%\s+loss nan +lr 9.1e-04 +0.5 tokens/s +comm 3 % +eta 7:46:40", last)
    assert last.rstrip().endswith(PLAIN_LINES[2])  # the last evaluation stays in view
    assert "\x1b[1A" in received  # drawn over, not below
    for line in PLAIN_LINES[2:4] + PLAIN_LINES[5:]:
        assert line in visible(received)
    assert received.index("\x1b[?25h") < received.index(
        "loss"
    )  # nor would a killed run take the cursor along


@pytest.mark.parametrize(("columns", "rows"), [(12, 6), (1, 1), (0, 0)])
def test_a_narrow_terminal_is_no_error(tmp_path, columns, rows):
    text = "".join(visible(on_terminal(tmp_path, columns, rows)).split())
    assert "stragglerat" in text
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 5


def test_no_color_is_respected(tmp_path):
    colour = re.compile(r"\x1b\[[0-9;]*[34]8?[0-9;]*m")
    assert colour.search(on_terminal(tmp_path, 80, 24)) is not None
    received = on_terminal(tmp_path, 80, 24, NO_COLOR="1")
    assert "120/400" in visible(received)
    assert colour.search(received) is None


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"MLX_RANK": "0"}, {"OMPI_COMM_WORLD_RANK": "0"}])
def test_lines_where_a_terminal_cannot_or_may_not_be_drawn_on(tmp_path, environment):
    received = on_terminal(tmp_path, 200, 24, **environment)
    assert received.splitlines() == PLAIN_LINES
