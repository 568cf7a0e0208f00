"""Row chunks, so that memory does not grow with the number of rows."""

from collections.abc import Callable

import torch

_CELLS = 1 << 18  # values per temporary array, 2 MiB: larger ones leave the cache


def in_chunks(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, cells_per_row: int
) -> torch.Tensor:
    """Apply a row-wise `function` to `x` in chunks of some 260,000 temporary values."""
    size = max(16, _CELLS // max(1, cells_per_row))
    if len(x) <= size:
        return function(x)
    return torch.cat([function(rows) for rows in x.split(size)])
