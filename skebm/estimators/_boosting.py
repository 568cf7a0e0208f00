"""Energies that are classifiers: data against samples of the base (NCE is classification)."""

import math

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier

NOISE_RATIO = 10.0
_MAX_NOISE = 200_000


def boosting_classifier(seed):
    """Boosted trees with the settings that did best on tables; see docs/energies."""
    return HistGradientBoostingClassifier(
        learning_rate=0.1, max_leaf_nodes=31, max_features=0.5, l2_regularization=1.0,
        min_samples_leaf=20, max_iter=400, early_stopping=False, random_state=seed,
    )  # fmt: skip
