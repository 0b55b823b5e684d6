"""Long runs under supervision: false alarms, what watching costs, and how much of the time is training."""

import json
import os
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import local_ranks
import psutil
from fault_runs import FOR_EVER, PYTHONPATH, ROOT, TINY, TimedRun
from fault_trials import false_alarms

from mlx_ring.cluster.limits import PULSE_SECONDS
from mlx_ring.cluster.rank.heartbeat import Heartbeat
from mlx_ring.cluster.rank.protocol import Phase, Vitals

KILL_SECONDS = 120.0
KILL_MINUTES = 30.0  # at most: fifteen kills
SLOW = "{fault: slow, rank: 1, at_call: 1, repeats: 1000000000}"
SOAK = (
    FOR_EVER, "metrics.log_every_steps=20", "checkpoint.every_steps=200", "model.hidden_sizes=[128,128]",
    "trainer.micro_batch_size=2",
)  # fmt: skip


def measure(minutes: float, only: list[str] | None) -> dict[str, float]:
    """The figures, of runs of so many minutes, or of some parts alone: quiet, heartbeats, kills."""
    figures: dict[str, float] = {}
    for part in (quiet, heartbeats, kills):
        if not only or part.__name__ in only:
            figures |= part(minutes)
    return figures


def quiet(minutes: float) -> dict[str, float]:
    """Nothing happens, but that rank 1 is slow: 50 ms for each micro-batch. This leaves the cores free, and
    other work on this machine may make the test harder."""
    with TimedRun("-n", "2", overrides=SOAK, fault=SLOW) as run:
        run.trains(beyond=20)
        supervisor = psutil.Process(run.process.pid)
        watching = [supervisor, *supervisor.children()]  # and its agent
        before, begun = _cpu_seconds(watching), time.monotonic()
        memory = _resident(run)
        time.sleep(60 * minutes)
        share = (_cpu_seconds(watching) - before) / (time.monotonic() - begun)
        growth = (_resident(run) - memory) / 2**20 / (minutes / 60)
        alarms = false_alarms(run)
        assert run.stop() == 75, run.told()
        return {
            "soak_minutes": minutes,
            "false_alarms": float(alarms),
            "supervisor_share_of_a_core": share,
            "resident_growth_mebibytes_an_hour": growth,
        }


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


def _resident(run: TimedRun) -> int:
    return sum(process.memory_info().rss for process in run.ranks().values())


def heartbeats(_minutes: float, pairs: int = 5, steps: int = 2000) -> dict[str, float]:
    """The share of a core that beats take, and no step can lose more to them; and, as a look at all that
    supervision does, seconds a step over those of ranks started by hand, alternating."""
    ratios: list[float] = []
    options = (*SOAK, f"trainer.steps={steps}", "metrics.console=false")
    for _ in range(pairs):
        with TimedRun("-n", "2", overrides=options) as run:
            assert run.wait(300) == 0, run.told()
            watched = _step_seconds(run.rows("train"))
        ratios.append(watched / _by_hand(options))
    return {
        "heartbeat_share_of_a_step": _beat_seconds() / PULSE_SECONDS,
        "supervised_over_by_hand": statistics.median(ratios),
        "supervised_over_by_hand_lowest": min(ratios),
        "supervised_over_by_hand_highest": max(ratios),
    }


def _beat_seconds(beats: int = 5000) -> float:
    """What one beat keeps a rank's interpreter busy, with somebody who reads it."""
    with tempfile.TemporaryDirectory() as name, socket.socket(socket.AF_UNIX) as agent:
        agent.bind(f"{name}/ranks")
        agent.listen()
        heartbeat = Heartbeat(Path(name) / "ranks", 0, _vitals, lambda _: None)
        reader, _ = agent.accept()
        drain = threading.Thread(target=lambda: all(iter(lambda: reader.recv(65536), b"")), daemon=True)
        drain.start()
        begun = time.thread_time()
        for _ in range(beats):
            heartbeat.report()
        seconds = (time.thread_time() - begun) / beats
        heartbeat.close()
        reader.close()
        return seconds


def _vitals() -> Vitals:
    return Vitals(
        phase=Phase.TRAINING, step=123456, calls=1234567, call="all_sum", saved_step=1, busy_seconds=0.01
    )


def _by_hand(options: tuple[str, ...]) -> float:
    with tempfile.TemporaryDirectory() as name:
        run, ring = Path(name) / "run", Path(name) / "ring.json"
        os.environ["PYTHONPATH"] = PYTHONPATH
        command = [sys.executable, str(ROOT / "train.py"), *TINY, "data.arguments={fault: none}", *options]
        local_ranks.end(local_ranks.start_ring([*command, f"run.dir={run}"], 2, ring))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return _step_seconds([row for row in rows if row["kind"] == "train"])


def _step_seconds(rows: list[dict[str, Any]]) -> float:
    return statistics.median(row["step_seconds"] for row in rows[1:])


def kills(minutes: float) -> dict[str, float]:
    """A random rank is killed every two minutes. Goodput: the share of time in which steps were trained that
    count, at their usual pace."""
    minutes, chance = min(minutes, KILL_MINUTES), random.Random(2)
    with TimedRun("-n", "2", "--max-restarts", "1000", overrides=SOAK) as run:
        begun, first = run.trains(beyond=20)
        killed = 0
        while time.monotonic() - begun < 60 * minutes:
            time.sleep(min(KILL_SECONDS, 60 * minutes))
            at = time.monotonic()
            chance.choice(list(run.ranks().values())).kill()
            killed += 1
            run.trains(since=run.seen("run directory", since=run.seen("restart", since=at)[0])[0])
        seconds = time.monotonic() - begun
        steps = run.step - first
        assert run.stop() == 75, run.told()
        usual = _step_seconds(run.rows("train"))
        return {"kills": float(killed), "goodput": steps * usual / seconds}
