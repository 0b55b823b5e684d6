"""What exact mode relies on: one micro-batch's gradient has the same bits on every rank, every time.

`start_check` tries that before the first step, with the real model and data. `reproducible` replaces the
operations that are not reproducible on a GPU. `operations` lists operations with their gradients, and
`doctor_checks` repeats each of them for `mlx-ring doctor --exact`. The sums themselves are integers: see
`communication.codecs.exact`.
"""

from mlx_ring.training.exact.reproducible import make_reproducible
from mlx_ring.training.exact.start_check import compare, first_gradient

__all__ = ["compare", "first_gradient", "make_reproducible"]
