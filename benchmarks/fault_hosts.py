"""The trials of hosts and of the network between them, on emulated hosts of this machine with a disk each."""

import json
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from emulated_hosts import ENVIRONMENT_PATH, Cluster
from fault_runs import FOR_EVER, PYTHONPATH, TimedRun
from fault_trials import Seen, Trial, assert_same, at_a_random_step, false_alarms, goes_on

HOSTS = 3
RARELY = "metrics.log_every_steps=5"


@dataclass
class Lab:
    """A cluster. The supervisor runs on its last host, which is in no host file."""

    cluster: Cluster
    folder: Path
    work: Path

    def list_hosts(self, *numbers: int, absent: bool = False) -> Path:
        """Replaces the host file by one with these hosts and, if `absent`, one that does not exist."""
        addresses = [self.cluster.addresses[number - 1] for number in numbers]
        if absent:
            addresses.append(self.cluster.addresses[0].rpartition(".")[0] + ".99")
        envs = [f"PATH={ENVIRONMENT_PATH}", f"PYTHONPATH={PYTHONPATH}"]
        hosts = [{"ssh": address, "ips": [address]} for address in addresses]
        new = self.folder / "lab.json.new"
        file = self.folder / "lab.json"
        new.write_text(json.dumps({"envs": envs, "hosts": hosts}))
        return new.replace(file)

    def run(self, *options: str, overrides: tuple[str, ...] = (FOR_EVER,)) -> TimedRun:
        def inside(command: list[str]) -> list[str]:
            return self.cluster.inside(len(self.cluster.addresses), command)

        hostfile = str(self.folder / "lab.json")
        run = TimedRun("--hostfile", hostfile, *options, overrides=overrides, wrap=inside, folder=self.work)
        run.record = self.cluster.disk(1) / "run"
        return run

    def left(self, *numbers: int) -> int:
        """Waits until these hosts run no process, or for 20 seconds. Returns how many processes they run."""
        deadline = time.monotonic() + 20
        while (left := sum(len(self.cluster.processes(n)) for n in numbers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left


@contextmanager
def lab(*, user_space_switch: bool = False) -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="mlx_ring-hosts-") as name:
        folder = Path(name)
        work = Path(name) / "work"
        work.mkdir()
        with Cluster(folder / "c", HOSTS + 1, private=[work], user_space_switch=user_space_switch) as cluster:
            made = Lab(cluster, folder, work)
            made.list_hosts(*range(1, HOSTS + 1))
            yield made


def host_lost(how: str) -> Trial:
    def trial() -> Seen:
        with lab() as hosts, hosts.run() as run:
            at_a_random_step(run)
            at = time.monotonic()
            getattr(hosts.cluster, how)(2)
            two = re.escape(hosts.cluster.addresses[1])

            def come_back() -> None:
                undo = {
                    "cut": hosts.cluster.heal,
                    "link_down": hosts.cluster.link_up,
                    "crash": hosts.cluster.boot,
                }
                undo[how](2)

            seen = goes_on(run, at, rf"host {two} .*(silent|lost)", "silent_host_named_seconds", come_back)
            left = hosts.left(1, 2, 3)
            return Seen(
                words=seen.words, named=seen.named, resumed=seen.resumed, lost=seen.lost,
                figures=seen.figures | {"orphans": left},
            )  # fmt: skip

    return trial


def flap(seconds: float) -> Trial:
    def trial() -> Seen:
        with lab() as hosts, hosts.run() as run:
            at_a_random_step(run)
            at = time.monotonic()
            hosts.cluster.cut(2)
            time.sleep(seconds)
            hosts.cluster.heal(2)
            if seconds < 5:
                run.trains(since=time.monotonic(), beyond=run.step + 40)
                alarms = false_alarms(run)
                words = "nobody noticed"
            else:
                two = re.escape(hosts.cluster.addresses[1])
                named, _ = run.seen(rf"host {two} .*(silent|lost)", since=at)
                # The host joins at the restart or later.
                again, _ = run.seen(r"3 rank\(s\)", since=named)
                back, _ = run.trains(since=again)
                alarms = 0
                words = f"back after {back - at - seconds:.1f} s"
            assert run.stop() == 75, run.told()
            assert_same(run)
            return Seen(words=words, figures={"false_alarms": alarms, "orphans": hosts.left(1, 2, 3)})

    return trial


def bad_network(*, delay_ms: float = 0, loss_percent: float = 0, rate: str = "") -> Trial:
    def trial() -> Seen:
        with lab(user_space_switch=not rate) as hosts:
            if rate:
                hosts.cluster.rate("all", rate)
            else:
                hosts.cluster.delay(delay_ms, loss_percent)
            with hosts.run(overrides=(FOR_EVER, RARELY)) as run:
                run.trains()
                time.sleep(30)
                steps = run.step
                alarms = false_alarms(run)
                assert run.stop() == 75, run.told()
                assert_same(run) if steps > 1000 else None
                return Seen(words=f"{steps} steps, no alarm", figures={"false_alarms": alarms})

    return trial


def host_file_edited() -> Trial:
    def trial() -> Seen:
        with lab() as hosts:
            hosts.list_hosts(1, 2)
            with hosts.run() as run:
                at_a_random_step(run)
                seconds: list[float] = []
                for numbers, words in (
                    ((1, 2, 3), "joins"),
                    ((1, 3), "leaves"),
                    ((1, 2), "joins; .* leaves"),
                ):
                    at = time.monotonic()
                    hosts.list_hosts(*numbers)
                    changed, _ = run.seen(f"{words}: the ranks save", since=at)
                    again, _ = run.seen("run directory", since=changed)
                    seconds.append(run.trains(since=again, beyond=run.step)[0] - at)
                left = hosts.left(3)
                assert run.stop() == 75, run.told()
                assert_same(run)
                worlds = list(dict.fromkeys(row["world_size"] for row in run.rows("train")))
                assert worlds == [2, 3], worlds
                added, removed, replaced = seconds
                words = f"added after {added:.1f} s, removed {removed:.1f} s, replaced {replaced:.1f} s"
                return Seen(words=words, resumed=max(seconds), figures={"orphans": left})

    return trial


def host_absent() -> Trial:
    def trial() -> Seen:
        with lab() as hosts:
            hosts.list_hosts(1, 2, absent=True)
            begun = time.monotonic()
            with hosts.run() as run:
                status = run.wait(60)
                seconds = time.monotonic() - begun
                last = run.lines[-1][1]
                assert status == 3 and ".99: ssh failed" in last, run.told()
                return Seen(
                    words=last,
                    figures={"failures_with_status_0": 0, "orphans": hosts.left(1, 2)},
                    named=seconds,
                )

    return trial
