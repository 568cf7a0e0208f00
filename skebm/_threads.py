"""One thread where the work is made of many small steps.

Sharing those out costs more than it saves; on a busy machine ten times more, because the threads of
OpenMP wait by spinning.
"""

import functools
import os
from contextlib import AbstractContextManager

import torch
from threadpoolctl import ThreadpoolController

was_forked = False
"""Whether this process is a fork of one that had several threads, and computes with one."""


@functools.cache
def _controller():
    # once, and not at import: whoever only imports the package is left alone
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_use_one_thread)
    return ThreadpoolController()


def _use_one_thread():
    """Keep a forked child from waiting for threads of OpenMP that only its parent has.

    Torch would do so for ever at the first step that it shares out.
    """
    global was_forked
    was_forked = torch.get_num_threads() > 1
    torch.set_num_threads(1)  # of all libraries in torch, some of which know no other way


def limit_threads(n_threads: int) -> AbstractContextManager:
    """Context in which numerical libraries use at most `n_threads` threads from this one."""
    return _controller().limit(limits=n_threads)
