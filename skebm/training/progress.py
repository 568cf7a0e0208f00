"""Progress of a fit: one line, rewritten."""

from contextlib import AbstractContextManager
from typing import Any


class Progress(AbstractContextManager[Any]):
    """A tqdm bar that names the stage of the fit; silent when `verbose` is 0.

    Parameters
    ----------
    verbose : int or bool
    """

    def __init__(self, verbose: int):
        self._bar = None
        if verbose:
            from tqdm.auto import tqdm

            self._bar = tqdm(desc="fit", leave=True, bar_format="{desc} {bar}| {elapsed}{postfix}")

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def stage(self, name: str, done: int = 0, total: int = 1, **figures: Any) -> None:
        """Show that `done` of `total` steps of the stage `name` are done."""
        if self._bar is None:
            return
        self._bar.total = total
        self._bar.n = done
        self._bar.set_description_str(name, refresh=False)
        self._bar.set_postfix(figures, refresh=False)
        self._bar.refresh()
