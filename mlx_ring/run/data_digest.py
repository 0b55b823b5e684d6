"""Prints which data a host has, for `mlx-ring doctor`: `python -P -m mlx_ring.run.data_digest OVERRIDES`."""

import json
import os
import sys
import threading
import time

from mlx_ring.cluster.finding import FOUND
from mlx_ring.cluster.limits import DATA_SECONDS, EFFORT_SECONDS
from mlx_ring.cluster.rank.effort import OwnSigns
from mlx_ring.communication.communicator import Communicator
from mlx_ring.config.compose import compose_run
from mlx_ring.errors import MlxRingError
from mlx_ring.run.builder import open_data


def main() -> None:
    """Prints, as JSON after FOUND, {"digest", "name"} of the data that the overrides select, or {"error"}."""
    threading.Thread(target=_give_up, name="give up", daemon=True).start()
    try:
        config = compose_run(*sys.argv[1:])
        alone = Communicator.alone()
        found = {"digest": open_data(config, alone).dataset.digest, "name": config.data.name}
    except MlxRingError as error:
        found = {"error": str(error)}
    _print(found)


def _print(found: dict[str, str]) -> None:
    print(f"{FOUND}{json.dumps(found)}", flush=True)


def _give_up() -> None:
    """Ends this process if it gives no sign of life for DATA_SECONDS. Work may take as long as it needs."""
    signs = OwnSigns()
    last, since = -1, 0.0
    while True:
        signs.look()
        if signs.count != last:
            last, since = signs.count, time.monotonic()
        elif time.monotonic() - since > DATA_SECONDS:
            _print({"error": f"no progress for {DATA_SECONDS:g} s: {signs.words or 'opening the data'}"})
            os._exit(1)
        time.sleep(EFFORT_SECONDS)


if __name__ == "__main__":
    main()
