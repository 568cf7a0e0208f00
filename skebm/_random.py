"""Random streams: seeds of stages and members, and the lock around the global generators.

Everything of ours draws from a `torch.Generator` that is handed down. Code of others (modules and
distributions of users, scikit-learn, zuko) may draw on the global generators; it runs inside
`seeded_global_rng`.
"""

import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.utils import check_random_state

GLOBAL_RNG_LOCK = threading.RLock()
"""One lock, because there is one global state: whoever borrows it draws what it would draw alone.

Threads that draw on the global generators outside of this lock are not held back.
"""


@contextmanager
def seeded_global_rng(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Run a block with the global generators seeded, and put them back as they were.

    Torch's default dtype is float32 in the block, so that what others build and draw does not
    depend on it either.

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
        dtype = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float32)
            # not torch.manual_seed, which would reseed every accelerator for good
            torch.default_generator.manual_seed(seed)
            for d in cuda:
                with torch.cuda.device(d):
                    torch.cuda.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
        finally:
            torch.set_default_dtype(dtype)
            np.random.set_state(numpy_state)  # noqa: NPY002


def sobol_points(n: int, d: int, seed: int) -> torch.Tensor:
    """Points of a scrambled Sobol sequence in the unit cube, (n, d), float64.

    They have the digits of single precision: torch computes the first one in its default dtype, on
    which nothing here depends.

    Parameters
    ----------
    n, d : int
    seed : int
        Of the scrambling.
    """
    engine = torch.quasirandom.SobolEngine(d, scramble=True, seed=seed)
    return engine.draw(n, dtype=torch.float64).float().double()


def seed_of(random_state: int | np.random.RandomState | None) -> int:
    """Draw a seed from what scikit-learn takes as `random_state`, an int in [0, 2^31 - 1)."""
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))


def draw_seed(rng: torch.Generator) -> int:
    """Draw a seed from a torch.Generator, an int in [0, 2^31)."""
    return int(torch.randint(2**31, (), generator=rng, device=rng.device))


def spawn(rng: torch.Generator, n: int) -> list[torch.Generator]:
    """Return n generators, one per member: number k depends on `rng` and k alone.

    Parameters
    ----------
    rng : torch.Generator
        On the CPU.
    n : int

    Returns
    -------
    list of torch.Generator
    """
    return [torch.Generator().manual_seed(draw_seed(rng)) for _ in range(n)]


@dataclass(frozen=True)
class Seeds:
    """A seed for every stage of a fit and every member of it, all from one.

    What a stage draws depends on neither what other stages drew nor on their order, so that
    members may be fitted side by side and stages may be added.

    Attributes
    ----------
    seed : int
    """

    seed: int

    def of(self, stage: str, member: int = 0) -> int:
        """Seed of a stage and member, an int in [0, 2^31)."""
        entropy = [self.seed, zlib.crc32(stage.encode()), member]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)

    def rng(
        self, stage: str, member: int = 0, device: str | torch.device = "cpu"
    ) -> torch.Generator:
        """Return a fresh torch.Generator of that seed."""
        return torch.Generator(device).manual_seed(self.of(stage, member))

    def rngs(self, stage: str, n_members: int) -> list[torch.Generator]:
        """Return one for each of the members."""
        return [self.rng(stage, k) for k in range(n_members)]
