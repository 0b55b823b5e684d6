"""What every backend must do, run by each rank of a real group: see test_communicator.py."""

import sys
from unittest import mock

import mlx.core as mx
import numpy as np
from mlx.nn.utils import average_gradients

from mlx_ring.cluster.rank.environment import RankEnvironment
from mlx_ring.communication import communicator
from mlx_ring.communication.codecs.float import NativeCodec
from mlx_ring.communication.communicator import Communicator
from mlx_ring.errors import ClusterError, DataError
from mlx_ring.training.strategies.all_reduce import AllReduce
from mlx_ring.training.strategies.base import Share


def check_long_messages(wire: Communicator) -> None:
    """What is too long for one message goes in several."""
    longest, communicator.MESSAGE_BYTES = communicator.MESSAGE_BYTES, 4096
    try:
        total = wire.all_sum(mx.arange(30_000, dtype=mx.int32).reshape(3, -1))
        assert mx.array_equal(total, wire.world_size * mx.arange(30_000).reshape(3, -1))
        given = mx.arange(9_001) if wire.rank == 0 else mx.zeros(9_001, dtype=mx.int32)
        assert mx.array_equal(wire.broadcast({"weight": given})["weight"], mx.arange(9_001))
    finally:
        communicator.MESSAGE_BYTES = longest


def check_sums(wire: Communicator) -> None:
    total = wire.all_sum(mx.array([wire.rank, 1], dtype=mx.int32))
    assert total.tolist() == [sum(range(wire.world_size)), wire.world_size]


def check_all_reduce(wire: Communicator) -> None:
    """Mixed dtypes, odd shapes, several buckets; MLX's own averaging is the reference."""
    mx.random.seed(wire.rank)
    arrays = {
        "a": mx.random.normal((33, 7)), "b": mx.random.normal((5,)).astype(mx.bfloat16), "c": mx.array(2.0),
        "d": mx.random.normal((1, 300, 3)), "e": mx.random.normal((2, 2)).astype(mx.bfloat16),
    }  # fmt: skip
    for wire.bucket_bytes in (4096, 2**20):
        for wire.overlap in (False, True):
            sent = wire.sent_bytes
            reduced = wire.all_reduce(dict(arrays)).arrays
            assert list(reduced) == list(arrays)
            size = sum(array.nbytes for array in arrays.values())
            assert abs(wire.sent_bytes - sent - 2 * (wire.world_size - 1) * size / wire.world_size) <= len(
                arrays
            )
            reference = average_gradients(arrays, group=wire._group, communication_stream=wire._stream)
            for name, array in reduced.items():
                assert array.shape == arrays[name].shape and array.dtype == arrays[name].dtype
                tolerance = 0.05 if array.dtype == mx.bfloat16 else 1e-5
                mean = array.astype(mx.float32) / wire.world_size
                assert mx.allclose(
                    mean, reference[name].astype(mx.float32), rtol=tolerance, atol=tolerance
                ), name


def check_memory_of_sums(wire: Communicator) -> None:
    """What nobody else holds is summed in its own memory; what somebody holds stays as it is."""
    for wire.overlap in (False, True):
        arrays = {"alone": mx.ones((256, 256))}
        mx.eval(arrays)
        place = np.asarray(arrays["alone"]).ctypes.data
        reduced = wire.all_reduce(arrays).arrays
        mx.eval(reduced)
        assert np.asarray(reduced["alone"]).ctypes.data == place
        held = {"a": mx.ones((256, 256)), "b": mx.ones((3,))}
        total = wire.all_reduce(dict(held)).arrays
        assert held["a"].sum().item() == 2**16 and total["a"].sum().item() == 2**16 * wire.world_size
        assert held["b"].tolist() == [1.0] * 3 and total["b"].tolist() == [float(wire.world_size)] * 3


def check_memory_of_gradients(wire: Communicator) -> None:
    """A strategy uses its share's gradients up."""
    strategy = AllReduce(wire, NativeCodec(), num_micro_batches=1, clip_gradient_norm=None, compile=True)
    wire.bucket_bytes = 4  # each by itself
    total = strategy.add(None, {"weight": mx.ones((256, 256)), "bias": mx.ones((8,))})
    mx.eval(total)
    places = [np.asarray(array).ctypes.data for array in total[0].values()]
    one = mx.array(1)
    share = Share(total=total, losses=[one], targets=[one], first_micro_batch=0, flags=[0.0])
    reduced = strategy.reduce(share).gradients
    mx.eval(reduced)
    assert [np.asarray(array).ctypes.data for array in reduced.values()] == places


def check_what_is_computed_meanwhile(wire: Communicator) -> None:
    """All that was made of sums but those of the last bucket, and nothing if the host has waited."""
    wire.bucket_bytes = 4096
    sizes = {"a": 4, "b": 5000, "c": 4, "d": 2000}
    waits = wire.host_waits
    for wire.host_waits in (True, False):
        sums = wire.all_reduce({name: mx.ones((size,)) for name, size in sizes.items()})
        made = {name: array.sum() for name, array in sums.arrays.items()}
        with mock.patch.object(mx, "async_eval") as computes:
            sums.compute_meanwhile(made)
        computed = [id(array) for call in computes.call_args_list for array in call.args[0]]
        travels = wire.world_size > 1 and not wire.host_waits
        assert computed == ([id(made["b"]), id(made["d"])] if travels else [])
    wire.host_waits = waits


def check_equal_bits(wire: Communicator) -> None:
    """Every rank gets the same bits of a float sum."""
    mx.random.seed(wire.rank)
    total = wire.all_sum(mx.random.normal((10007,)))
    digests = wire.gather_objects(np.array(total).tobytes().hex()[:4000])
    assert len(set(digests)) == 1


def check_broadcast(wire: Communicator) -> None:
    """Rank 0's arrays bit for bit, with minus zero, NaN payloads and every dtype that a checkpoint holds."""
    odd = np.array([-0.0, np.nan, np.inf, 1e-40], dtype=np.float32)
    arrays = {
        "odd": mx.array(odd), "step": mx.array(2**40 + 3, dtype=mx.uint64),
        "half": mx.array([1.5], dtype=mx.bfloat16),
        "flag": mx.array([True, False, True]), "many": mx.arange(100_000),
    }  # fmt: skip
    own = arrays if wire.rank == 0 else {name: mx.zeros_like(array) for name, array in arrays.items()}
    received = wire.broadcast(own)
    for name, array in arrays.items():
        assert received[name].dtype == array.dtype and received[name].shape == array.shape
        raw = [np.array(x.reshape(-1).view(mx.uint8)).tobytes() for x in (received[name], array)]
        assert raw[0] == raw[1], name


def check_objects(wire: Communicator) -> None:
    values = wire.gather_objects({"rank": wire.rank, "text": "é" * wire.rank})
    assert [value["rank"] for value in values] == list(range(wire.world_size))
    assert values[-1]["text"] == "é" * (wire.world_size - 1)
    assert wire.broadcast_object([wire.rank]) == [0]
    assert wire.broadcast_bytes(b"\0" * wire.rank) == b""
    assert wire.gather_floats([0.5] * wire.rank) == [0.5] * sum(range(wire.world_size))
    wire.barrier()


def check_agreed_errors(wire: Communicator) -> None:
    wire.agree_on_error(None)
    try:
        wire.agree_on_error(DataError("no file") if wire.rank == wire.world_size - 1 else None)
    except DataError as error:
        assert error.agreed and "no file" in str(error)
        if wire.world_size > 1:
            assert f"rank {wire.world_size - 1} on " in str(error)
    else:
        raise AssertionError("nothing was raised")


def main() -> None:
    wire = Communicator.join(RankEnvironment.read())
    for check in (
        check_sums,
        check_long_messages,
        check_memory_of_sums,
        check_memory_of_gradients,
        check_what_is_computed_meanwhile,
        check_equal_bits,
        check_broadcast,
        check_objects,
        check_agreed_errors,
    ):
        check(wire)
    if wire.world_size > 1:
        check_all_reduce(wire)
    assert len(wire.hosts) == wire.world_size
    print(f"rank {wire.rank} of {wire.world_size} over {wire.backend}: all checks passed")


if __name__ == "__main__":
    try:
        main()
    except ClusterError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(failure.exit_status)
