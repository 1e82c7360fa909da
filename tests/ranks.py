"""The end of a test's rank: a process that `torch.distributed.run` started."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import torch


def leave_together() -> NoReturn:
    """End this process when all ranks have come here, so that none leaves while another still waits for it.

    It ends without the interpreter's own clearing up: DDP's reducer keeps gloo's threads, and one that runs meanwhile aborts
    the rank.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
