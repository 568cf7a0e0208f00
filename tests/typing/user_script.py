"""What users write, for pyright, which checks the types; it is not run."""

from typing import Any, assert_type

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from skebm import (
    AdversarialEBM,
    Boosting,
    ContrastiveDivergenceEBM,
    FlowContrastiveDensity,
    ImplicitVAE,
    NCEDensity,
    Network,
    OutlierDetector,
    ScoreMatchingEBM,
)
from skebm.compose import PyODAdapter
from skebm.datasets import LatentClasses, TwoMoons, make_latent_classes, make_two_moons
from skebm.partition import LogPartition, importance_sampling
from skebm.plotting import DensityDisplay
from skebm.samplers import Run, mala, run

Floats = NDArray[np.float64]
Numbers = np.ndarray[tuple[Any, ...], np.dtype[Any]]


def script() -> None:
    X = make_two_moons(n_samples=300, random_state=0)
    assert_type(X, Floats)
    X, truth = make_two_moons(n_samples=300, random_state=0, return_log_density=True)
    assert_type(truth, Floats)
    assert_type(TwoMoons().log_density(X), Floats)
    frame = make_latent_classes(n_samples=300, random_state=0)
    assert_type(frame, pd.DataFrame)
    assert_type(LatentClasses().log_marginal(frame), Floats)

    density = NCEDensity(
        base=["gmm", "kde"],
        energy_model=Boosting(max_leaf_nodes=15),
        smoothing="scott",
        random_state=0,
    )
    assert_type(density.fit(X), NCEDensity)
    assert_type(density.fit(pd.DataFrame(X), sample_weight=np.ones(len(X))), NCEDensity)
    assert_type(density.score_samples(X), Floats)
    assert_type(density.score_samples(X.tolist(), return_std=False), Floats)
    log_density, std_error = density.score_samples(pd.DataFrame(X), return_std=True)
    assert_type(log_density, Floats)
    assert_type(std_error, Floats)
    assert_type(density.score(X), float)
    assert_type(density.predict(X), NDArray[np.int_])
    assert_type(density.fit_predict(X), NDArray[np.int_])
    assert_type(density.decision_function(X), Floats)
    assert_type(density.sample(10, random_state=0, n_steps=20), Any)
    assert_type(density.energy(X), Floats)
    assert_type(density.log_partition_, Floats)
    assert_type(density.offset_, float)
    assert_type(density.n_iter_, int)
    assert_type(density.history_["n_iter"], Numbers)
    DensityDisplay.from_estimator(density, X)

    detector = OutlierDetector(training="contaminated", calibration_fraction=0.3)
    assert_type(detector.fit(X).set_threshold(false_alarm_rate=0.01), OutlierDetector)
    assert_type(detector.p_values(X, random_state=0), Floats)
    assert_type(detector.discoveries(pd.DataFrame(X), fdr=0.2), NDArray[np.bool_])
    assert_type(detector.out_of_fold_p_values_, Floats)
    assert_type(PyODAdapter(detector, 0.05).fit(X).predict_proba(X), Floats)

    # what contradicts the documentation is found
    detector.set_threshold(0.01)  # pyright: ignore[reportCallIssue]
    NCEDensity(n_member=4)  # pyright: ignore[reportCallIssue]
    NCEDensity("gmm")  # pyright: ignore[reportCallIssue]
    NCEDensity(n_members="four")  # pyright: ignore[reportArgumentType]
    _ = density.score_samples(X, return_std=True) + 1.0  # pyright: ignore[reportOperatorIssue]

    flow = FlowContrastiveDensity(
        energy_model=Network(hidden_layer_sizes=(64, 64)), correction=None
    )
    assert_type(flow.fit(X).flow_.score_samples(X), Floats)
    adversarial = AdversarialEBM(generator="implicit").fit(X)
    assert_type(adversarial.generator_.sample(10), Floats)
    chains = ContrastiveDivergenceEBM(sampler="hmc", step_size=0.1).fit(X)
    assert_type(chains.sample(5, start="buffer"), Any)
    matched = ScoreMatchingEBM(energy_model=torch.nn.Linear(2, 1), sigma=[0.1, 0.2]).fit(X)
    assert_type(matched.stein_score(X), Floats)
    vae = ImplicitVAE(n_components=2, encoder_model=lambda n, k: torch.nn.Linear(n, k)).fit(X)
    assert_type(vae.transform(X), Floats)

    def log_normal(x: torch.Tensor) -> torch.Tensor:
        return -0.5 * x.square().sum(1)

    rng = torch.Generator().manual_seed(0)
    assert_type(run(mala, torch.zeros(10, 2), log_normal, rng, n_steps=10, step_size=0.5), Run)
    assert_type(importance_sampling(torch.zeros(100)), LogPartition)
