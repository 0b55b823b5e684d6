"""The one wire between ranks. `communicator` alone names `mx.distributed`; all else here is built on it.

`communicator` holds every collective of the program, `buckets` says which arrays travel together, `codecs`
how a gradient travels, `agreement` how ranks make sure that they hold and do the same. `machine` tells what
this process computes on. `selftest` is the program that `mlx-ring doctor` starts as ranks.

Whoever adds a collective adds it to `Communicator`, in the table at its top, and says "Collective: every
rank must call".
"""

from mlx_ring.communication.agreement import agree
from mlx_ring.communication.codecs import Codec, build_codec
from mlx_ring.communication.communicator import Communicator

__all__ = ["Codec", "Communicator", "agree", "build_codec"]
