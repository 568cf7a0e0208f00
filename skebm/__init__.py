"""Energy-based density estimators in scikit-learn's style, over PyTorch."""

from skebm._version import __version__
from skebm.estimators import ContrastiveDivergenceEBM, NCEDensity, ScoreMatchingEBM

__all__ = ["ContrastiveDivergenceEBM", "NCEDensity", "ScoreMatchingEBM", "__version__"]
