"""The training step and what belongs to it: computed on every rank, the same everywhere.

`trainer` is the loop and yields one result a step; it knows no files. `gradient` computes one micro-batch,
`work_split` says which micro-batches each rank computes, `strategies` turn the ranks' gradients into the same
new weights, and `state` holds what a step changes. `rank_flags` is what one rank tells the others in a step,
and `parameter_authority` decides from it what is due. `evaluator` measures. `optimizers`, `schedules` and
`memory_manager` build what the configuration names. `exact` makes sure that the bits do not depend on the
number of ranks.
"""

from mlx_ring.training.evaluator import Evaluation, Evaluator
from mlx_ring.training.parameter_authority import ParameterAuthority, Plan
from mlx_ring.training.trainer import Progress, StepResult, Trainer

__all__ = ["Evaluation", "Evaluator", "ParameterAuthority", "Plan", "Progress", "StepResult", "Trainer"]
