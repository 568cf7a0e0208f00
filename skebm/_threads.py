"""One thread where the work is made of many small steps.

Sharing those out costs more than it saves; on a busy machine ten times more, because the threads of
OpenMP wait by spinning.
"""

import functools
from contextlib import AbstractContextManager

from threadpoolctl import ThreadpoolController


@functools.cache
def _controller():
    return ThreadpoolController()


def limit_threads(n_threads: int) -> AbstractContextManager:
    """Context in which numerical libraries use at most `n_threads` threads from this one."""
    return _controller().limit(limits=n_threads)
