"""Does faults to supervised runs, each several times, and compares what is seen with what is expected.

    python benchmarks/faults.py                    every fault, three trials each: about 40 minutes
    python benchmarks/faults.py --only F2 F6       some of them
    python benchmarks/faults.py --soak-minutes 60  the long runs: false alarms, cost of supervision, goodput

A quick run does three of the faults. The smallest form does one, and the long runs for seconds.

The faults of networks need root, iproute2 and openssh-server, for emulated hosts on this machine. Faults that
have no figure of their own (F9 to F11, F13 to F15) are tests of the suite, which are run here once more.
"""

import argparse
import statistics
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import harness
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/support"))

import fault_clock
import fault_hosts as hosts
import fault_trials as trials
import soak
from fault_trials import Seen, SuiteTests

Fault = tuple[str, str, Callable[[], Seen]]  # its name, what is expected, one trial
FAULTS: list[Fault] = [
    ("F1 raise in the first step", "rank and error named, restart", trials.raises(at_call=1)),
    ("F1 raise in a later one", "rank and error named, restart", trials.raises(at_call=100)),
    ("F2 SIGKILL", "signal named, restart", trials.killed("SIGKILL")),
    ("F2 SIGSEGV", "signal named, restart", trials.killed("SIGSEGV")),
    ("F2 SIGABRT", "signal named, restart", trials.killed("SIGABRT")),
    ("F3 exit 0 early", "rank named, restart", trials.leaves()),
    ("F4 SIGSTOP", "deadline, dump, rank named", trials.stopped(second_death=False)),
    ("F4 SIGSTOP, and another dies", "named at once, no orphan", trials.stopped(second_death=True)),
    ("F5 supervisor SIGINT", "saves, 75", trials.asked("SIGINT", 75)),
    ("F5 supervisor SIGTERM", "saves, 75", trials.asked("SIGTERM", 75)),
    ("F5 supervisor SIGHUP", "saves, 75", trials.asked("SIGHUP", 75)),
    ("F5 supervisor SIGINT twice", "leaves at once, 130", trials.asked("SIGINT", 130)),
    ("F5 supervisor SIGKILL", "no rank after 20 s", trials.supervisor_killed()),
    ("F6 cable cut", "host named, goes on without", hosts.host_lost("cut")),
    ("F6 link down", "host named, goes on without", hosts.host_lost("link_down")),
    ("F6 host crashes", "host named, goes on without", hosts.host_lost("crash")),
    ("F6 cut for 2 s", "survived", hosts.flap(2.0)),
    ("F6 cut for 20 s", "goes on without, then with it", hosts.flap(20.0)),
    ("F6 cut for 60 s", "goes on without, then with it", hosts.flap(60.0)),
    ("F7 1 % loss, 5 ms", "no false alarm", hosts.bad_network(delay_ms=5, loss_percent=1)),
    ("F7 10 Mbit/s", "no false alarm", hosts.bad_network(rate="10mbit")),
    ("F7 a slow rank", "straggler named, no alarm", trials.slow_rank()),
    ("F8 1 bucket queued, SIGKILL", "no hang", trials.killed("SIGKILL", buckets=1)),
    ("F8 2 buckets queued, SIGKILL", "no hang", trials.killed("SIGKILL", buckets=2)),
    ("F8 8 buckets queued, SIGKILL", "no hang", trials.killed("SIGKILL", buckets=8)),
    ("F9 jobs that meet", "refused; two side by side agree", trials.two_at_once()),
    ("F10 ranks that disagree", "refused by name", SuiteTests("communication/test_agreement.py")),
    ("F11 NaN on one rank", "all skip it alike", SuiteTests("run/test_failures.py", "non_finite")),
    ("F12 200 SIGKILLs while saving", "newest valid loads", trials.kills_while_saving(200)),
    ("F13 disk full, read-only", "old kept, told, then fails", SuiteTests(
        "run/test_failures.py checkpoint/test_copies.py run_directory/test_checkpoint_files.py"
        " cluster/supervisor/test_unusable_hosts.py", "disk or space or failed_write")),
    ("F14 a flipped bit", "the one before, file named", SuiteTests(
        "checkpoint/test_checkpoints.py checkpoint/test_copies.py run_directory/test_checkpoint_files.py",
        "damaged or flipped")),
    ("F15 4 → 2 → 3 → 1 ranks", "the same samples and bits", SuiteTests(
        "training/exact/test_exact.py", "continues_on_other_numbers")),
    ("F16 host added, removed, replaced", "taken in, let go", hosts.host_file_edited()),
    ("F17 rank 8 s late", "waited for", trials.late(8.0)),
    ("F17 rank 35 s late", "waited for", trials.late(35.0)),
    ("F17 host absent", "named", hosts.host_absent()),
    ("F18 crash loop", "stops, cause shown", trials.crash_loop()),
    ("F19 all asleep for 15 s", "no false alarm", trials.asleep(15.0)),
    ("F19 clock jumps by 1 h, 2 h back", "no false alarm", fault_clock.jumps()),
]  # fmt: skip
QUICK = ("F2 SIGKILL", "F12 200 SIGKILLs while saving", "F18 crash loop")
SMALLEST = ("F3 exit 0 early",)
SMALLEST_SOAK_MINUTES = 0.05
SHORT_NOTE = "The long runs lasted for seconds, most of which are start-up: goodput says nothing."
GOALS: harness.Goals = {
    "trials_failed": ("<=", 0),
    "death_named_seconds": ("<=", 2.0),
    "silent_host_named_seconds": ("<=", 20.0),
    "dump_after_deadline_seconds": ("<=", 2.0),
    "first_resumed_step_seconds": ("<=", 15.0),
    "lost_checkpoint_intervals": ("<=", 1.0),
    "orphans": ("<=", 0),
    "failures_with_status_0": ("<=", 0),
    "unreadable_after_200_kills": ("<=", 0),
    "false_alarms": ("<=", 0),
    "supervisor_share_of_a_core": ("<=", 0.02),
    "heartbeat_share_of_a_step": ("<=", 0.01),
    "goodput": (">=", 0.9),
}
# The goals of the smallest form, whose long runs last for seconds.
SHORT_GOALS = {figure: goal for figure, goal in GOALS.items() if figure != "goodput"} | {
    "supervisor_share_of_a_core": ("<=", 0.1)
}


def measure(options: argparse.Namespace, quick: bool) -> dict[str, float]:
    chosen = [fault for fault in FAULTS if _is_chosen(fault[0], options)]
    trials_each = 1 if quick else options.trials
    seen: dict[str, list[Seen]] = {}
    failed = 0
    for name, expected, trial in chosen:
        seen[name] = []
        for number in range(1, trials_each + 1):
            try:
                seen[name].append(trial())
            except Exception:  # noqa: BLE001 - the other faults are still to be tried
                failed += 1
                print(f"{name}, trial {number}: expected: {expected}\n{traceback.format_exc()}", flush=True)
        print(f"{name}: {'; '.join(each.words for each in seen[name])}", flush=True)
    _print_table(chosen, seen)
    worst: dict[str, float] = defaultdict(float)
    for each in (each for found in seen.values() for each in found):
        for figure, value in each.figures.items():
            worst[figure] = max(worst[figure], value)
    figures = {"trials_failed": float(failed), **worst}
    if options.smallest:
        figures |= soak.measure(SMALLEST_SOAK_MINUTES, options.only, pairs=1, steps=200, interval_steps=20)
    elif options.soak_minutes:
        figures |= soak.measure(options.soak_minutes, options.only)
    return figures


def _is_chosen(name: str, options: argparse.Namespace) -> bool:
    if options.only:
        return name.split()[0] in options.only  # none, if only a long run is named
    if options.smallest:
        return name in SMALLEST
    return name in QUICK if options.quick else options.soak_minutes == 0 or options.everything


def _print_table(chosen: list[Fault], seen: dict[str, list[Seen]]) -> None:
    """Prints what was expected and what was seen. Times are medians, with the longest in brackets."""
    table = Table("fault", "expected", "seen", "named after s", "trains again after s", "steps lost")
    for name, expected, _ in chosen:
        found = seen[name]
        words = f"{len(found)} times: {found[-1].words}" if found else "not seen"
        cells = [_spread(found, key) for key in ("named", "resumed", "lost")]
        table.add_row(name, expected, words, *cells)
    Console(width=160).print(table)


def _spread(found: list[Seen], key: str) -> str:
    values = [value for each in found if (value := getattr(each, key)) is not None]
    return f"{statistics.median(values):.1f} (≤ {max(values):.1f})" if values else ""


if __name__ == "__main__":
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument(
        "--only",
        nargs="+",
        metavar="F",
        help="only these faults, such as F2 F6, or these long runs: quiet heartbeats kills",
    )
    own.add_argument("--trials", type=int, default=3, help="how often each fault is tried (3)")
    own.add_argument("--soak-minutes", type=float, default=0, help="do the long runs instead of the faults")
    own.add_argument("--everything", action="store_true", help="do the faults and the long runs")
    parsed = harness.parse("faults", own)
    harness.run(
        parsed,
        partial(measure, parsed),
        GOALS,
        SHORT_GOALS if parsed.smallest else None,
        notes=[SHORT_NOTE] if parsed.smallest else [],
    )
