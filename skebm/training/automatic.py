"""What ``energy_model="auto"`` trains where the noise is the base."""

from skebm.energies import Boosting, Network

from .acceptance import mean_and_error
from .classifiers import FEW_COLUMNS, train_classifiers
from .noise_contrastive import train_against_noise
from .tilted_task import TiltedTask
from .trained import Trained


def train_automatically(task: TiltedTask, *, noise_ratio: float | str = "auto") -> Trained:
    """Boosted trees; in up to three columns, where their steps are seen, a network where it can be.

    There the trees are trained first, as they are quick. If they find nothing, that is the result.
    Otherwise a smooth network, on periodic embeddings, takes their place, unless they are better on
    held-out rows by more than two standard errors.

    Parameters
    ----------
    task : TiltedTask
        Whose proposals are the bases.
    noise_ratio : float or "auto", default="auto"
        nu, for either as it is there.

    Returns
    -------
    Trained
    """
    trees = train_classifiers(task, Boosting(), noise_ratio=noise_ratio)
    gain = task.gain(trees.held, trees.pool)
    if task.n_features > FEW_COLUMNS or not _is_positive(task, gain):
        return trees
    smooth = train_against_noise(
        task, Network(embedding="periodic"), noise_ratio=noise_ratio, stage="smooth energy"
    )
    better = _is_positive(task, gain - task.gain(smooth.held, smooth.pool))
    return trees if better else smooth


def _is_positive(task, gain):
    """Whether a gain, row by row, is above zero by more than two standard errors."""
    mean, error = mean_and_error(task, gain)
    return mean > 2.0 * error
