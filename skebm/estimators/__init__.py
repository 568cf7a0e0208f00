"""Estimators: one file each; what they share starts with an underscore."""

from skebm.energies import Boosting, Network
from skebm.estimators._calibration import Calibration
from skebm.estimators._generators import FlowDensity, ImplicitSampler
from skebm.estimators._given import UNKNOWN
from skebm.estimators._mixed import ColumnReport
from skebm.estimators._schema import CellColumn, Schema
from skebm.estimators.adversarial import AdversarialEBM
from skebm.estimators.conditional import ConditionalDensity
from skebm.estimators.contrastive_divergence import ContrastiveDivergenceEBM
from skebm.estimators.explanation import Explanation, Surprise
from skebm.estimators.flow_contrastive import FlowContrastiveDensity
from skebm.estimators.implicit_vae import ImplicitVAE
from skebm.estimators.marginal import MarginalDensity
from skebm.estimators.nce import NCEDensity
from skebm.estimators.outliers import OutlierDetector
from skebm.estimators.score_matching import ScoreMatchingEBM
from skebm.training import Columns
from skebm.training.cells import Grid
from skebm.training.chains import Moves
from skebm.training.columns import StateColumn

__all__ = [
    "AdversarialEBM",
    "ConditionalDensity",
    "ContrastiveDivergenceEBM",
    "Explanation",
    "FlowContrastiveDensity",
    "ImplicitVAE",
    "MarginalDensity",
    "NCEDensity",
    "OutlierDetector",
    "ScoreMatchingEBM",
    "Surprise",
    "TRUSTED_TYPES",
    "UNKNOWN",
]

TRUSTED_TYPES = [
    f"{cls.__module__}.{cls.__qualname__}"
    for cls in (
        *(AdversarialEBM, ContrastiveDivergenceEBM, FlowContrastiveDensity),
        *(ImplicitVAE, NCEDensity, OutlierDetector, ScoreMatchingEBM),
        *(Boosting, Network, Columns, FlowDensity, ImplicitSampler, Moves),
        *(Calibration, CellColumn, ColumnReport, Grid, Schema, StateColumn),
    )
]
"""What a fitted estimator of skebm is made of, for ``skops.io.load(file, trusted=TRUSTED_TYPES)``.

Loading one of these types runs no code but that of skebm.
"""
