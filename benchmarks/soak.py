"""Long supervised runs: false alarms, what supervision costs, and the share of the time spent on training.

`faults.py --soak-minutes N` starts them.
"""

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

KILL_SECONDS = 120.0  # between two kills
KILL_MINUTES = 30.0  # at most, which is fifteen kills
SLOW = "{fault: slow, rank: 1, at_call: 1, repeats: 1000000000}"


def overrides(interval_steps: int) -> tuple[str, ...]:
    """Returns the overrides of a run that saves every `interval_steps` steps and logs ten times as often."""
    return (
        FOR_EVER,
        f"metrics.log_every_steps={interval_steps // 10}",
        f"checkpoint.every_steps={interval_steps}",
        "model.hidden_sizes=[128,128]",
        "trainer.micro_batch_size=2",
    )


def measure(
    minutes: float, only: list[str] | None, *, pairs: int = 5, steps: int = 2000, interval_steps: int = 200
) -> dict[str, float]:
    """Does the long runs.

    Args:
        minutes: how long the quiet run is, and that with kills.
        only: the names of the parts that are wanted, out of quiet, heartbeats and kills; all by default.
        pairs: how many pairs of a supervised run and one by hand are compared.
        steps: the length of each of these.
        interval_steps: the steps between two checkpoints; ten times as many rows are logged.
    """
    parts = {
        "quiet": lambda: quiet(minutes, interval_steps),
        "heartbeats": lambda: heartbeats(pairs, steps, interval_steps),
        "kills": lambda: kills(minutes, interval_steps),
    }
    figures: dict[str, float] = {}
    for name, part in parts.items():
        if not only or name in only:
            figures |= part()
    return figures


def quiet(minutes: float, interval_steps: int) -> dict[str, float]:
    """Nothing happens, except that rank 1 takes 50 ms for each micro-batch.

    This leaves the cores free for other work on this machine, which may make the test harder.
    """
    with TimedRun("-n", "2", overrides=overrides(interval_steps), fault=SLOW) as run:
        run.trains(beyond=interval_steps // 10)
        supervisor = psutil.Process(run.process.pid)
        watching = [supervisor, *supervisor.children()]  # the child is its agent
        before = _cpu_seconds(watching)
        begun = time.monotonic()
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


def heartbeats(pairs: int, steps: int, interval_steps: int) -> dict[str, float]:
    """Measures what supervision costs a step.

    Heartbeats take a share of a core; no step can lose more to them than that. All that supervision does
    shows in the seconds of a step over those of ranks started by hand; the two kinds of run alternate.
    """
    ratios: list[float] = []
    options = (*overrides(interval_steps), f"trainer.steps={steps}", "metrics.console=false")
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
    """Returns the seconds for which one heartbeat keeps a rank's interpreter busy while an agent reads it."""
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
    """Returns the seconds of a step of the same run whose ranks nobody supervises."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        ring = Path(name) / "ring.json"
        os.environ["PYTHONPATH"] = PYTHONPATH
        command = [sys.executable, str(ROOT / "train.py"), *TINY, "data.arguments={fault: none}", *options]
        local_ranks.end(local_ranks.start_ring([*command, f"run.dir={run}"], 2, ring))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return _step_seconds([row for row in rows if row["kind"] == "train"])


def _step_seconds(rows: list[dict[str, Any]]) -> float:
    return statistics.median(row["step_seconds"] for row in rows[1:])


def kills(minutes: float, interval_steps: int) -> dict[str, float]:
    """Kills a random rank every two minutes.

    Goodput is the time that the steps which count take at their usual pace, as a share of all the time.
    """
    minutes = min(minutes, KILL_MINUTES)
    chance = random.Random(2)
    with TimedRun("-n", "2", "--max-restarts", "1000", overrides=overrides(interval_steps)) as run:
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
        run.trains(beyond=run.step + interval_steps)  # so that there are rows to take the pace from
        assert run.stop() == 75, run.told()
        usual = _step_seconds(run.rows("train"))
        return {"kills": float(killed), "goodput": steps * usual / seconds}
