"""`train.py -m`: many jobs, each a whole distributed run under a supervisor of its own.

`multirun` opens the sweep's directory, `sweep` runs its jobs, and `host_dealer` gives each job its hosts.
`table` reads and writes sweep.csv, `fetch_record` copies a job's record from the host that has it, and
`study` lets Optuna choose the values. Hydra finds this room through the two small files in `hydra_plugins/`.
"""

from mlx_ring.sweep.sweep import Job, Sweep, run_jobs
from mlx_ring.sweep.table import SweepTable

__all__ = ["Job", "Sweep", "SweepTable", "run_jobs"]
