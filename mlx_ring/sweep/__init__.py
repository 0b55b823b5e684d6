"""`train.py -m`: many runs, each a whole distributed run under a supervisor of its own.

`multirun` opens the sweep's folder, `sweep` runs its jobs, `host_dealer` gives each job its hosts, `table`
is sweep.csv, `fetch_record` brings a job's record from the host that has it, and `study` lets Optuna draw
the values. Hydra finds this room through the two small files in `hydra_plugins/`.
"""

from mlx_ring.sweep.sweep import Job, Sweep, run_jobs
from mlx_ring.sweep.table import SweepRecord

__all__ = ["Job", "Sweep", "SweepRecord", "run_jobs"]
