"""The program `train.py`: Hydra → RunConfig → Coordinator.run, and the exit status of what ends it."""

import faulthandler
import logging
import signal
from typing import NoReturn

from mlx_ring.cluster.rank.stop_signal import stay_awake
from mlx_ring.run.process import Process


def main() -> NoReturn:
    """The installed command `train.py`."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # where every thread is, to stderr
    stay_awake()
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger().addHandler(logging.NullHandler())  # the run adds a file; the console is the tracker's
    process = Process()
    try:
        status = process.main()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - this rank must end, and say why
        process.leave(error)
    process.done()
    raise SystemExit(status)
