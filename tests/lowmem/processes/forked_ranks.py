"""Ranks as children of one process, which has imported what takes long; nothing but Python's own is imported here."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable


def fork_ranks(num: int, run: Callable[[int, int], object]) -> None:
    """Have each of so many children call `run` with its rank and a free port of this machine; waits for all of them."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    pids = []
    for rank in range(num):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                run(rank, port)
                status = 0
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    assert not any(statuses), statuses
