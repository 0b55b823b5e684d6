"""Runs the agent of this host: orders come in on stdin, reports go out on stdout."""

import asyncio
import signal
import sys

from mlx_ring.cluster.agent.host_agent import HostAgent
from mlx_ring.cluster.rank.stop_signal import STOP_SIGNALS

ORDER_BYTES = 2**16  # the longest order


async def _main() -> None:
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader(limit=ORDER_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin.buffer)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sys.stdout.buffer)
    agent = HostAgent(orders, asyncio.StreamWriter(transport, protocol, None, loop))
    # The supervisor, which gets them too, decides what they mean. Its end ends this one.
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
    await agent.run()


asyncio.run(_main())
