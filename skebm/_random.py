"""Random streams: the one lock around the global generators of torch and numpy.

Everything of ours draws from a `torch.Generator` that is handed down. Code of others (modules and
distributions of users, scikit-learn, zuko) may draw on the global generators; it runs inside
`seeded_global_rng`.
"""

import threading
from contextlib import contextmanager

import numpy as np
import torch

GLOBAL_RNG_LOCK = threading.RLock()
"""One lock, because there is one global state: whoever borrows it draws what it would draw alone.

Threads that draw on the global generators outside of this lock are not held back.
"""


@contextmanager
def seeded_global_rng(seed, device=None):
    """Run a block with the global generators seeded, and put them back as they were.

    Parameters
    ----------
    seed : int
        Below 2^32.
    device : torch.device, optional
        A CUDA device whose generator is seeded, too; those of torch and numpy on the CPU always
        are.
    """
    cuda = [device] if device is not None and device.type == "cuda" else []
    with GLOBAL_RNG_LOCK, torch.random.fork_rng(devices=cuda):
        numpy_state = np.random.get_state()  # noqa: NPY002
        try:
            # not torch.manual_seed, which would reseed every accelerator for good
            torch.default_generator.manual_seed(seed)
            for d in cuda:
                with torch.cuda.device(d):
                    torch.cuda.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002


def draw_seed(generator):
    """Draw a seed from a torch.Generator, an int in [0, 2^31)."""
    return int(torch.randint(2**31, (), generator=generator, device=generator.device))
