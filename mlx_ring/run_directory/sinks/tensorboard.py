"""TensorBoard's event files: a view of the record, drawn by `tensorboard --logdir RUN`."""

import re
import time
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb, hparams_pb
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from mlx_ring.run_directory.sinks import Row, finished_steps


class TensorBoardSink:
    """One event file a session, in RUN/tensorboard.

    Every row is written at once, not by EventFileWriter: its thread prints a traceback when the disk is full,
    and two sessions of one second may sort the wrong way round. A row costs 0.4 ms.
    """

    METRICS = ("evaluation/loss", "evaluation/accuracy", "evaluation/perplexity", "train/loss")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BufferedWriter | None = None

    def open(self, restored_step: int, hyperparameters: dict[str, Any]) -> None:
        """Begin this session's file. Like every method that writes, it raises OSError if the disk refuses."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._open_file("rank_0")
        for ended in self._folder.glob("events.out.tfevents.*.end"):
            ended.unlink()  # the session goes on
        # In every session: from the second on, the server drops the points of this step and later ones.
        self._add(restored_step + 1, session_log=SessionLog(status=SessionLog.START))
        metrics = [Metric(tag) for tag in self.METRICS]
        self._add(0, summary=hparams_config_pb([HParam(name) for name in hyperparameters], metrics))
        self._add(0, summary=hparams_pb(hyperparameters))

    def _open_file(self, name: str) -> None:
        """Open the next file. Servers read files in the order of their names: numbers, for clocks differ."""
        matches = (re.match(r"events\.out\.tfevents\.(\d+)", path.name) for path in self._folder.iterdir())
        number = 1 + max((int(match[1]) for match in matches if match), default=0)
        self._file = (self._folder / f"events.out.tfevents.{number:010d}.{name}").open("xb")
        self._add(0, file_version="brain.Event:2")

    def record(self, kind: str, row: Row) -> None:
        """Every number of a row becomes a point `kind/name`, an event becomes text."""
        if kind == "event":
            text = "\n\n".join(
                f"{key}: {value}" for key, value in row.items() if key not in ("event", "step")
            )
            # A path may hold bytes that are not UTF-8.
            summary = text_pb(f"event/{row['event']}", text.encode(errors="replace").decode())
        else:
            summary = Summary()
            with np.errstate(over="ignore"):  # points are float32: a perplexity may become infinite
                for key, value in row.items():
                    # A point has its own step and wall time.
                    if isinstance(value, int | float) and key not in ("step", "wall_time"):
                        summary.MergeFrom(scalar_pb(f"{kind}/{key}", float(value)))
        self._add(finished_steps(row), summary=summary)

    def close(self, succeeded: bool) -> None:
        """End the session. Its status has a file of its own, which a resume removes: servers keep the first
        status that they meet."""
        self.close_file()
        end = SessionEndInfo(
            status=STATUS_SUCCESS if succeeded else STATUS_FAILURE, end_time_secs=time.time()
        )
        content = metadata.create_summary_metadata(HParamsPluginData(session_end_info=end))
        summary = Summary()
        summary.value.add(tag=metadata.SESSION_END_INFO_TAG, metadata=content, tensor=metadata.NULL_TENSOR)
        self._open_file("end")
        self._add(0, summary=summary)
        self.close_file()

    def close_file(self) -> None:
        """Close the file without a status."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _add(self, step: int, **what: Any) -> None:
        records = RecordWriter(self._file)
        records.write(Event(wall_time=time.time(), step=step, **what).SerializeToString())
        records.flush()
