"""The engine: minibatches of tensors, and a training loop with skorch inside.

skorch brings the history and the callbacks that users already have; the loop itself is lean (no
row-by-row collation, no host sync per step), so that a step costs what a bare torch loop costs.
`net` is the only file that imports skorch, and only when training starts.
"""

from skebm._engine.batches import MemberBatches
from skebm._engine.budget import Budget, evaluations_every, unfinished_gain
from skebm._engine.loop import Opponent, check_callbacks, train

__all__ = [
    "Budget",
    "MemberBatches",
    "Opponent",
    "check_callbacks",
    "evaluations_every",
    "train",
    "unfinished_gain",
]
