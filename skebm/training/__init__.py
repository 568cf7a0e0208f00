"""Training: a fit as data, and the functions that turn a task into a model.

`Task` is what a method is given, `Trained` what it hands back, `fit_tilted` shows the way from one
to the other from top to bottom. Nothing here knows an estimator.
"""

from skebm.training.cells import Kinds
from skebm.training.columns import Columns
from skebm.training.copies import join_groups, merge_copies
from skebm.training.device import resolve_device
from skebm.training.distributions import CONFINEMENT
from skebm.training.fit import Recipe, fit_tilted
from skebm.training.precision import merge_near_ties, relative_precision
from skebm.training.progress import Progress
from skebm.training.task import Task, make_task
from skebm.training.tilted_task import TiltedTask
from skebm.training.trained import Candidate, Fitted, Trained
from skebm.training.views import fit_lowest_view

__all__ = [
    "CONFINEMENT",
    "Candidate",
    "Columns",
    "Fitted",
    "Kinds",
    "Progress",
    "Recipe",
    "Task",
    "TiltedTask",
    "Trained",
    "fit_lowest_view",
    "fit_tilted",
    "join_groups",
    "make_task",
    "merge_copies",
    "merge_near_ties",
    "relative_precision",
    "resolve_device",
]
