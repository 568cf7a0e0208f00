"""A parameter exists only where it acts: each has another value that changes the fit."""

import inspect
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from skorch.callbacks import Callback
from torch import nn

import skebm
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
from skebm._engine import Budget
from skebm.bases import _flow_training
from skebm.datasets import make_two_moons
from skebm.training import adversarial, flow_contrastive, task

pytestmark = [
    pytest.mark.usefixtures("small_parts", "short_fits"),
    pytest.mark.filterwarnings("ignore"),  # little data, hardly any training
]

EXEMPT = {
    "verbose",  # shows
    "device",  # decides where, not what
    "n_jobs",
    "memory",  # decide how quickly, not what
    "handle_missing",  # decides what is refused, not what is made of the rest
}


@pytest.fixture(autouse=True, scope="module")
def short_fits(small_parts):
    with pytest.MonkeyPatch.context() as patch:
        for module in (adversarial, flow_contrastive):
            patch.setattr(module, "HEAD_START", 1)
        patch.setattr(_flow_training, "FLOW_BUDGET", Budget(epochs=2, steps=1))
        patch.setattr(task, "SMOOTHED_ROWS", 100)
        patch.setattr(adversarial, "GENERATOR_STEPS", 3)
        patch.setattr(adversarial, "SETTLING_STEPS", dict.fromkeys(adversarial.SETTLING_STEPS, 3))
        patch.setattr(adversarial, "MAX_SETTLINGS", 1)
        yield


# In the unit interval, where every likelihood is at home.
X, NEW = (make_two_moons(n, random_state=s) / 8.0 + 0.5 for s, n in enumerate((100, 20)))


def mixed(rows):
    """With kinds 0 to 3, and amounts that often are zero."""
    kinds, amounts = np.digitize(rows[:, 0], [0.4, 0.5, 0.6]), rows[:, 1] ** 2
    return np.c_[rows, kinds, np.where(rows[:, 0] < 0.55, 0.0, amounts)]


OF_TABLES = {"categorical_features", "max_categories", "atoms"}
"""Parameters that act on `mixed` rows."""


class Shift(Callback):
    """Moves all weights after every epoch."""

    def on_epoch_end(self, net, **kwargs):
        with torch.no_grad():
            for parameter in net.module_.parameters():
                parameter.add_(0.01)


def module(n_features, width=4):
    return nn.Sequential(nn.Linear(n_features, width), nn.Tanh(), nn.Linear(width, 1))


def linear(n_in, n_out):
    return nn.Linear(n_in, n_out)


def affine_flow(n_features):
    from zuko.flows import MAF

    return MAF(n_features, transforms=1, hidden_features=(4,))


class Where(NamedTuple):
    """Another value of a parameter, and the setting of its neighbours in which it acts."""

    value: object
    neighbours: dict


def network():
    return Network(hidden_layer_sizes=(8,), max_epochs=4, batch_size=32)


MISSING = object()

NO_PERCEPTRON = {"hidden_layer_sizes": (128, 128)}  # untouched
TRAINING = {
    "hidden_layer_sizes": (4,), "learning_rate": 0.2, "weight_decay": 0.5, "batch_size": 16,
    "max_epochs": 2, "patience": None, "callbacks": [Shift()],
}  # fmt: skip
NETWORK = TRAINING | {
    "embedding": None,
    "module": Where(module, NO_PERCEPTRON),
    "module__width": Where(6, NO_PERCEPTRON | {"module": module, "module__width": 4}),
}
BOOSTING = {
    "learning_rate": 0.4, "max_iter": 6, "max_leaf_nodes": 3, "min_samples_leaf": 40,
    "l2_regularization": 100.0, "max_features": 1.0,
    "early_stopping": Where(False, {"max_iter": 60}),
}  # fmt: skip
TILTED_FOR_SURE = {"base": None, "energy_model__patience": None}
MIXED = {
    "categorical_features": [2], "max_categories": Where(2, {"categorical_features": [2]}),
    "atoms": "off",
}  # fmt: skip
DENSITY = {
    "smoothing": 0.3, "contamination": 0.2, "random_state": 1,
}  # fmt: skip
TILTED = DENSITY | {
    "base": None, "energy_model": Network(hidden_layer_sizes=(4,), max_epochs=2),
    "n_members": 3, "n_partition_samples": Where(500, TILTED_FOR_SURE),
    "recalibration": Where(False, TILTED_FOR_SURE), "warm_start": Where(True, TILTED_FOR_SURE),
}  # fmt: skip
OTHER = {
    NCEDensity: TILTED | MIXED | {
        "base": "uniform", "objective": "ranking", "noise_ratio": 4.0, "noise": "uniform",
        "n_partition_samples": Where(500, TILTED_FOR_SURE | {"noise": "gaussian"}),
        "recalibration": Where(False, TILTED_FOR_SURE | {"noise": "gaussian"}),
    },
    ScoreMatchingEBM: TILTED | MIXED | {
        "method": "sliced", "n_projections": Where(3, {"method": "sliced"}), "sigma": 0.5,
    },
    ContrastiveDivergenceEBM: TILTED | MIXED | {
        "n_steps": 3, "persistent": False, "sampler": "ula", "step_size": 0.05,
        "reinit_fraction": 0.2,
    },
    FlowContrastiveDensity: TILTED | {
        "flow": affine_flow, "accuracy_threshold": 0.0,
        "generator_learning_rate": Where(0.05, {"accuracy_threshold": 0.0}),
        "refinement": False, "correction": Boosting(max_iter=3),
    },
    AdversarialEBM: TILTED | {
        "flow": affine_flow, "generator": "implicit", "generator_learning_rate": 0.05,
        "gradient_penalty": 2.0,
        "recalibration": Where(
            False,
            TILTED_FOR_SURE
            | {
                "energy_model__max_epochs": 30, "energy_model__learning_rate": 0.02,
                "gradient_penalty": 1.0,
            },  # fmt: skip
        ),
    },
    ImplicitVAE: DENSITY | TRAINING | MIXED | {
        "n_components": 1, "encoder": "gaussian", "likelihood": "bernoulli",
        "kl_weight_start": 0.1, "n_importance_samples": 20,
        "n_posterior_samples": Where(8, {"patience": None}),
        "warm_start": Where(True, {"patience": None}),
        "encoder_model": linear, "decoder_model": linear, "validation_fraction": 0.3,
    },
    OutlierDetector: MIXED | {
        "density": NCEDensity(base="gaussian", energy_model=None), "training": "contaminated",
        "calibration_fraction": 0.3, "contamination": 0.2, "n_members": 3,
        "n_partition_samples": 500, "random_state": 1,
    },
}  # fmt: skip
"""Estimator -> parameter -> another value, alone or with the neighbours that let it act."""

FEW = {"n_members": 2, "n_partition_samples": 1000, "random_state": 0}
REFERENCES = {
    NCEDensity: partial(NCEDensity, base="gaussian", **FEW),
    ScoreMatchingEBM: partial(ScoreMatchingEBM, base="gaussian", **FEW),
    ContrastiveDivergenceEBM: partial(ContrastiveDivergenceEBM, base="gaussian", n_steps=1, **FEW),
    FlowContrastiveDensity: partial(FlowContrastiveDensity, **FEW),
    AdversarialEBM: partial(AdversarialEBM, **FEW),
    ImplicitVAE: partial(
        ImplicitVAE, n_components=2, n_importance_samples=50, hidden_layer_sizes=(8,),
        max_epochs=4, batch_size=32, random_state=0,
    ),
    OutlierDetector: partial(OutlierDetector, **FEW),
}  # fmt: skip
TILTED_ESTIMATORS = [cls for cls in REFERENCES if cls not in (ImplicitVAE, OutlierDetector)]
SPECIFIED = {
    "energy_model": {cls: (network, NETWORK) for cls in TILTED_ESTIMATORS},
    "correction": {FlowContrastiveDensity: (partial(Boosting, max_iter=3), BOOSTING)},
    "energy_model of trees": {NCEDensity: (partial(Boosting, max_iter=3), BOOSTING)},
}
"""Parameter that is a specification -> estimator -> that of the reference, and other values."""


def parameters(cls):
    return [name for name in inspect.signature(cls).parameters if name not in EXEMPT]


def cases():
    """Yield (estimator, settings that make the reference, parameter, entry)."""
    for cls, other in OTHER.items():
        settings = {"energy_model": network} if cls in TILTED_ESTIMATORS else {}
        for name in parameters(cls):
            yield pytest.param(
                cls, settings, name, other.get(name, MISSING), id=f"{cls.__name__}-{name}"
            )
    for which, of_estimator in SPECIFIED.items():
        where = which.split()[0]
        for cls, (specification, other) in of_estimator.items():
            settings = {"energy_model": network, where: specification}
            names = [n for n in parameters(type(specification())) if n != "module_parameters"]
            for name in [*names, *(n for n in other if n not in names)]:
                entry = other.get(name, MISSING)
                if isinstance(entry, Where):
                    near = {f"{where}__{key}": value for key, value in entry.neighbours.items()}
                    entry = Where(entry.value, near)
                path = f"{where}__{name}"
                kind = type(specification()).__name__
                yield pytest.param(cls, settings, path, entry, id=f"{cls.__name__}-{kind}-{name}")


def outcome(estimator, n_fits=1, of=np.asarray):
    """All that a fit leaves behind, by name, as arrays."""
    for _ in range(n_fits):
        estimator.fit(of(X))
    new = of(NEW)
    found = {"scores": estimator.score_samples(new), "draws": estimator.sample(20, random_state=0)}
    if isinstance(estimator, ImplicitVAE):
        found["means"] = estimator.transform(new)
    for name, value in vars(estimator).items():
        if isinstance(value, dict) and name.endswith("_"):
            found |= {f"{name}{key}": one for key, one in value.items()}
        elif isinstance(value, np.ndarray | float | int | str) and name.endswith("_"):
            found[name] = value
        elif name in ("flow_", "generator_"):
            found[name] = value.sample(20, random_state=0)
    return found


@cache
def reference(cls, settings, neighbours, n_fits, of):
    """The outcome that others are compared with, one fit for all parameters that share it."""
    estimator = REFERENCES[cls](**{name: make() for name, make in settings})
    return outcome(estimator.set_params(**dict(neighbours)), n_fits, of)


def differs(one, other):
    return one.keys() != other.keys() or not all(
        np.array_equal(one[name], other[name], equal_nan=np.asarray(one[name]).dtype.kind == "f")
        for name in one
    )


@pytest.mark.parametrize(("cls", "settings", "name", "entry"), [*cases()])
def test_a_parameter_exists_only_where_it_acts(cls, settings, name, entry):
    assert entry is not MISSING, f"{name} of {cls.__name__}: add another value, one that acts."
    value, neighbours = entry if isinstance(entry, Where) else (entry, {})
    n_fits, of = 2 if name == "warm_start" else 1, mixed if name in OF_TABLES else np.asarray
    estimator = REFERENCES[cls](**{key: make() for key, make in settings.items()})
    estimator.set_params(**neighbours)
    *path, leaf = name.split("__", 1)
    owner = getattr(estimator, path[0]) if path else estimator
    for other in (owner, type(owner)()):  # neither as in the reference nor the default
        assert repr(other.get_params().get(leaf)) != repr(value)
    found = outcome(estimator.set_params(**{name: value}), n_fits, of)
    near = tuple((key, tuple(v) if isinstance(v, list) else v) for key, v in neighbours.items())
    expected = reference(cls, tuple(settings.items()), near, n_fits, of)
    assert differs(found, expected), f"{name}={value!r} of {cls.__name__} changes nothing."


def test_no_entry_is_stale():
    assert set(OTHER) == set(REFERENCES)
    for cls, other in [*OTHER.items(), (Boosting, BOOSTING)]:
        assert set(other) == set(parameters(cls))
    own = {name for name in NETWORK if not name.startswith("module__")}
    assert own == set(parameters(Network)) - {"module_parameters"}
    public = {c for c in map(partial(getattr, skebm), skebm.__all__) if isinstance(c, type)}
    # the imputer is a transformer, whose parameters have tests of their own
    assert public == {*OTHER, Network, Boosting, skebm.DensityImputer}


@pytest.mark.parametrize("cls", [c for c in TILTED_ESTIMATORS if c is not NCEDensity])
def test_trees_are_refused_where_they_cannot_act(cls):
    with pytest.raises(ValueError, match="energy_model is Boosting"):
        REFERENCES[cls](energy_model=Boosting()).fit(X)
