"""Displays in the manner of scikit-learn: arrays in the constructor, ``from_estimator``, ``plot``.

The numbers are computed before anything is drawn, so they can be read and tested without a
figure. matplotlib is imported only when ``plot`` is called.
"""

from ._calibration import CalibrationDisplay
from ._chains import ChainsDisplay
from ._density import DensityDisplay
from ._explanation import ExplanationDisplay
from ._samples import SamplesDisplay
from ._scores import AnomalyScoreDisplay
from ._stages import StagesDisplay
from ._training import TrainingCurveDisplay

__all__ = [
    "AnomalyScoreDisplay",
    "CalibrationDisplay",
    "ChainsDisplay",
    "DensityDisplay",
    "ExplanationDisplay",
    "SamplesDisplay",
    "StagesDisplay",
    "TrainingCurveDisplay",
]
