"""A program that drives a run itself, without train.py: `python own_coordinator.py RUN OVERRIDES`."""

import sys
from pathlib import Path

from mlx_ring.cluster.rank.environment import RankEnvironment
from mlx_ring.communication.communicator import Communicator
from mlx_ring.config.compose import compose_run
from mlx_ring.run.coordinator import Coordinator

directory = Path(sys.argv[1])
config = compose_run(f"run.dir={directory}", *sys.argv[2:])
communicator = Communicator.join(RankEnvironment.read())
sys.exit(Coordinator(config, communicator, directory).run())
