"""Independent pieces of a fit side by side, by joblib: in threads, processes or on a cluster.

Each of them computes with one thread, so that what comes out does not depend on how many of them
there are, or where.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from joblib import Parallel, cpu_count, delayed
from joblib.parallel import get_active_backend

from ._threads import limit_threads


def resolve_n_jobs(n_jobs: int | None, n_threads: int) -> int | None:
    """How many jobs joblib is asked for.

    Parameters
    ----------
    n_jobs : int or None
        As the user gives it.
    n_threads : int
        What None stands for where no ``joblib.parallel_config`` says more, and no search around the
        fit has taken the cores.

    Returns
    -------
    int or None
        None leaves it to joblib.
    """
    active: Any = get_active_backend()
    backend, asked = active
    is_free = asked is None and not backend.nesting_level and backend.effective_n_jobs(None) == 1
    return n_threads if n_jobs is None and is_free else n_jobs


def side_by_side(
    function: Callable[..., Any],
    arguments: Iterable[tuple[Any, ...]],
    n_jobs: int | None,
    *,
    in_threads: bool = False,
) -> list[Any]:
    """Results of ``function(*args)`` for every `args` of the iterable, in its order.

    Parameters
    ----------
    function : callable
        It runs without gradients, and may run on a copy of its arguments: what it changes is lost
        unless it returns it.
    arguments : iterable of tuples
        Taken from when there is somebody to work on them.
    n_jobs : int or None
    in_threads : bool, default=False
        Whether only threads are used, because copies would cost more than they gain. Where a
        ``joblib.parallel_config`` asks for processes, these wait, and as many threads work, but no
        more than there are cores.

    Returns
    -------
    list
    """
    where: Any = {"require": "sharedmem"} if in_threads else {"prefer": "threads"}
    if in_threads and n_jobs is None:
        n_jobs = _threads_for_processes()
    parallel: Any = Parallel(n_jobs=n_jobs, **where)
    return list(parallel(delayed(_alone)(function, args) for args in arguments))


def _threads_for_processes():
    """How many threads stand for the processes that joblib is told to use; None where it is not."""
    active: Any = get_active_backend()
    backend, asked = active
    if backend.nesting_level or getattr(backend, "supports_sharedmem", False):
        return None
    return min(backend.effective_n_jobs(asked), cpu_count())


def _alone(function, args):
    # both are settings of a thread, and those of the fit are another one's
    with torch.no_grad(), limit_threads(1):
        return function(*args)
