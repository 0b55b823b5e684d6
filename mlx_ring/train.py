"""The program `train.py`: Hydra → RunConfig → Coordinator.run → exit status."""

import faulthandler
import logging
import signal
from typing import NoReturn

from mlx_ring.cluster.rank.stop_signal import stay_awake
from mlx_ring.run import failure
from mlx_ring.run.process import Process


def main() -> NoReturn:
    """Run the installed command `train.py`."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # prints every thread's stack on stderr
    stay_awake()
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger().addHandler(
        logging.NullHandler()
    )  # the run adds a log file; metrics go to the console
    process = Process()
    try:
        status = process.main()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - this rank must end and say why
        failure.leave(process, error)
    process.done()
    raise SystemExit(status)
