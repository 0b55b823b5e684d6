"""The program `train.py`: Hydra → RunConfig → Coordinator.run → exit status."""

import faulthandler
import logging
import signal
from typing import NoReturn

from mlx_ring.cluster.rank.stop_signal import stay_awake
from mlx_ring.run import failure
from mlx_ring.run.process import Process
from mlx_ring.standard_streams import refuse_lost_answer, take_standard_streams


def main() -> NoReturn:
    """Runs the installed command `train.py` and exits with the run's exit status."""
    take_standard_streams()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # prints every thread's stack on stderr
    stay_awake()
    logging.getLogger().setLevel(logging.INFO)
    # Nothing is logged to the console, which shows the metrics; the run adds a log file.
    logging.getLogger().addHandler(logging.NullHandler())
    process = Process()
    try:
        status = process.main()
        if process.answers:
            refuse_lost_answer()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - this rank must end and say why
        failure.leave(process, error)
    process.done()
    raise SystemExit(status)
