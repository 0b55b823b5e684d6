"""Runs the agent of this host: orders come in on stdin, reports go out on stdout."""

import asyncio
import contextlib
import signal
import sys

from mlx_ring.cluster.agent.host_agent import HostAgent

ORDER_BYTES = 2**16  # the longest order


async def _main() -> None:
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader(limit=ORDER_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin.buffer)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sys.stdout.buffer)
    agent = HostAgent(orders, asyncio.StreamWriter(transport, protocol, None, loop))
    for number in (signal.SIGINT, signal.SIGHUP):  # the supervisor decides what a lost terminal means
        signal.signal(number, lambda *_: None)
    life = asyncio.ensure_future(agent.run())
    loop.add_signal_handler(signal.SIGTERM, life.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await life


asyncio.run(_main())
