"""What ranks, agents and the supervisor say arrives as it was sent."""

import json

import pytest

from mlx_ring.cluster.rank.protocol import (
    Events,
    Exited,
    Message,
    Order,
    Phase,
    Ping,
    ProcessPlan,
    Pulse,
    RankReport,
    RankState,
    Ready,
    Report,
    StartProcesses,
    ToRank,
    Vitals,
    decode,
    encode,
)

VITALS = Vitals(phase=Phase.FIRST_STEP, step=3, calls=7, call="all_sum", saved_step=2, busy_seconds=0.25)
STATE = RankState(rank=1, vitals=VITALS, silent_seconds=0.5, process_state="running")
PLAN = ProcessPlan(name="rank 0", command=["python", "train.py"], environment={"MLX_RANK": "0", "is": "it"})
EVENTS = Events(events=[{"event": "restart", "message": "é", "restarts": 1}])


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (Ping(), Order),
        (StartProcesses(job="j", ring=[["127.0.0.1:5"]], environment={}, processes=[PLAN]), Order),
        (EVENTS, Order),
        (EVENTS, ToRank),
        (RankReport(rank=1, pid=2, vitals=VITALS), RankReport),
        (Pulse(job="j", ranks=[STATE]), Report),
        (Exited(job="j", name="rank 1", status=-9, error="", last=[STATE]), Report),
    ],
)
def test_a_message_arrives_as_it_was_sent(message: Message, kind: type[Message]) -> None:
    line = encode(message)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert decode(line, kind) == message


def test_a_phase_arrives_as_a_phase() -> None:
    report = decode(encode(RankReport(rank=0, pid=1, vitals=VITALS)), RankReport)
    assert report.vitals.phase is Phase.FIRST_STEP


@pytest.mark.parametrize(
    "line",
    [
        b"Welcome to studio-1!\n",
        b"\xff\n",
        b"[1]\n",
        b'{"is": "unknown"}\n',
        b'{"is": []}\n',
        b'{"is": "order"}\n',
        b'{"is": "pulse"}\n',
        b'{"is": "vitals", "phase": "asleep"}\n',
        encode(Ping()),
    ],
)
def test_what_a_login_shell_prints_is_no_report(line: bytes) -> None:
    with pytest.raises(ValueError):
        decode(line, Report)


def test_another_version_can_say_that_it_is_ready() -> None:
    line = {"is": "ready", "version": "9.9", "pid": 1, "host": "a", "machine": "b", "later": 1}
    assert decode(json.dumps(line).encode(), Report) == Ready(version="9.9", pid=1, host="a", machine="b")
