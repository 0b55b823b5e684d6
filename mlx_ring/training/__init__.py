"""The training step and what belongs to it: computed on every rank, the same everywhere.

`trainer` is the loop and yields one result a step; it knows no files. `gradient` computes one micro-batch,
`work_split` deals micro-batches to ranks, `strategies` turn the ranks' gradients into the same new weights,
`state` holds what a step changes. `parameter_authority` is rank 0's say; `evaluator` measures;
`optimizers`, `schedules` and `memory_manager` build what the configuration names. `exact` makes sure that
the bits do not depend on the number of ranks.
"""

from mlx_ring.training.evaluator import Evaluation, Evaluator
from mlx_ring.training.parameter_authority import ParameterAuthority, Plan
from mlx_ring.training.trainer import Progress, StepResult, Trainer

__all__ = ["Evaluation", "Evaluator", "ParameterAuthority", "Plan", "Progress", "StepResult", "Trainer"]
