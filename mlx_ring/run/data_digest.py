"""Prints which data a host has, for `mlx-ring doctor`: `python -m mlx_ring.run.data_digest OVERRIDES`."""

import json
import sys

from mlx_ring.cluster.finding import FOUND
from mlx_ring.communication.communicator import Communicator
from mlx_ring.config.compose import compose_run
from mlx_ring.errors import MlxRingError
from mlx_ring.run.builder import open_data


def main() -> None:
    """Prints, as JSON after FOUND, {"digest", "name"} of the data that the overrides select, or {"error"}."""
    try:
        config = compose_run(*sys.argv[1:])
        alone = Communicator.alone()
        found = {"digest": open_data(config, alone).dataset.digest, "name": config.data.name}
    except MlxRingError as error:
        found = {"error": str(error)}
    print(f"{FOUND}{json.dumps(found)}")


if __name__ == "__main__":
    main()
