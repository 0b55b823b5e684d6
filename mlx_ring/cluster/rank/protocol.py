"""What ranks, agents and the supervisor tell one another. No mlx here."""

import os
import tempfile
from pathlib import Path
from typing import Any

JOB = "MLX_RING_JOB_ID"  # of one attempt; equal on all its ranks
REACHED = "MLX_RING_REACHED_STEP"  # of the newest checkpoint, in a restart
LONGEST_FOLDER = 55  # characters: a socket's path has 103 at most (macOS)
LEASE_SECONDS = 12.0  # for which a rank, or an agent, goes on without the one that watches over it


# Phases of a rank: before and while it joins the others, the step that is compiled, its last word.
STARTING, READY, JOINING, FIRST_STEP, DONE = "starting", "ready", "joining", "first step", "done"
GO = {"go": True}  # to ranks that are ready
Vitals = dict[str, Any]  # JSON values by name


def agent_directory(job: str) -> Path:
    """Where the agent of this host and job has its files: known to its ranks with no word from it.

    Hosts that share a disk are told apart by their networks, as Linux numbers them.
    """
    network = Path("/proc/self/ns/net")
    number = network.stat().st_ino if network.exists() else 0
    folder = tempfile.gettempdir()
    short = folder if len(folder) <= LONGEST_FOLDER else "/tmp"
    return Path(short) / f"mlx_ring-{os.getuid()}-{job}-{number}"
