"""The scikit-learn contract: its own battery of checks, and its tools around our estimators."""

import ast
import inspect
import io
import pickle
import re
import warnings

import joblib
import numpy as np
import pytest
import sklearn
from sklearn.base import clone, is_outlier_detector
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator
from torch import nn

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
from skebm.datasets import make_two_moons

TREES = Boosting(max_iter=3)
NETWORK = Network(hidden_layer_sizes=(8,), max_epochs=3)

QUICK = {"n_members": 2, "n_partition_samples": 1000, "random_state": 0}
QUICK_NCE = QUICK | {"base": "gaussian", "noise_ratio": 1, "energy_model": TREES}
QUICK_SM = QUICK | {"base": "gaussian", "energy_model": NETWORK}
QUICK_CD = QUICK_SM | {"n_steps": 1}
QUICK_FCE = QUICK | {"energy_model": NETWORK, "correction": TREES}
QUICK_ADV = QUICK | {"energy_model": NETWORK}
QUICK_VAE = {"hidden_layer_sizes": (8,), "max_epochs": 3, "random_state": 0}
MORE_TREES = QUICK_NCE | {"noise_ratio": 5, "energy_model": Boosting(max_iter=30)}

# Granted by scikit-learn to its own estimators that shuffle rows (RandomForestClassifier, KMeans,
# IsolationForest, ...). What must hold instead is tested in test_laws.py.
EXPECTED_FAILURES = {
    "check_sample_weight_equivalence_on_dense_data": (
        "sample_weight is not equivalent to removing/repeating samples: folds, noise and samples "
        "of the base are drawn for other rows."
    )
}

# With several members only: the one of ImplicitVAE scores held-out rows like all others.
EXPECTED_OF_MEMBERS = {
    "check_outliers_fit_predict": (
        "fit_predict labels the training rows by out-of-fold scores, because their own densities "
        "are flattered by themselves; predict is for new rows."
    )
}

EXPECTED_OF_DETECTORS = EXPECTED_OF_MEMBERS | {
    "check_outliers_train": (
        "contamination is a share of the training rows by their out-of-fold scores, because sharp "
        "kernels flatter the rows that they have seen; fit_predict labels that share."
    )
}


pytestmark = [
    pytest.mark.usefixtures("small_parts"),
    # 1,000 samples for log Z
    pytest.mark.filterwarnings("ignore::skebm.exceptions.LowEffectiveSampleSizeWarning"),
]


class _OutlierDetectorFirst:
    """An estimator under the other tag: outlier detector first, density second."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.estimator_type = "outlier_detector"
        return tags


QUICKLY = {
    NCEDensity: QUICK_NCE, ScoreMatchingEBM: QUICK_SM, ContrastiveDivergenceEBM: QUICK_CD,
    FlowContrastiveDensity: QUICK_FCE, AdversarialEBM: QUICK_ADV, ImplicitVAE: QUICK_VAE,
    OutlierDetector: QUICK,
}  # fmt: skip
TRAINED = [cls for cls in QUICKLY if cls is not OutlierDetector]
TILTED = [cls for cls in TRAINED if cls is not ImplicitVAE]


def outlier_detector(cls):
    name = f"{cls.__name__}AsOutlierDetector"
    made = type(name, (_OutlierDetectorFirst, cls), {"__module__": __name__})
    return globals().setdefault(name, made)  # where pickles look it up


def checks():
    both = [kind(cls)(**quick) for cls, quick in QUICKLY.items()
            for kind in (lambda cls: cls, outlier_detector)]  # fmt: skip
    done = set()
    for estimator in both:
        of_members = {} if isinstance(estimator, ImplicitVAE) else EXPECTED_OF_MEMBERS
        of_members = EXPECTED_OF_DETECTORS if isinstance(estimator, OutlierDetector) else of_members
        battery = estimator_checks_generator(
            estimator, mark="xfail", expected_failed_checks=EXPECTED_FAILURES | of_members
        )
        for item in battery:
            # pytest.param where the check is expected to fail, (estimator, check) otherwise
            values, marks = (item.values, item.marks) if hasattr(item, "values") else (item, ())
            check = getattr(values[1], "func", values[1])
            plain = type(estimator).__name__.removesuffix("AsOutlierDetector")
            if isinstance(estimator, _OutlierDetectorFirst):
                if (plain, check) in done:
                    continue  # the tag alone makes no difference to it
            else:
                done.add((plain, check))
            name = f"{type(estimator).__name__}-{check.__name__}"
            yield pytest.param(*values, marks=marks, id=name)


@pytest.mark.filterwarnings("ignore")  # data of one row, two rows, log Z of 1,000 samples
@pytest.mark.parametrize(("estimator", "check"), list(checks()))
def test_battery(estimator, check):
    check(estimator)


def test_tags():
    tags = NCEDensity().__sklearn_tags__()
    assert tags.estimator_type == "density_estimator"
    assert not tags.target_tags.required
    assert not tags.non_deterministic
    assert is_outlier_detector(outlier_detector(NCEDensity)())


# ---------------------------------------------------------------------- tools around an estimator


@pytest.fixture(scope="module")
def X():
    return make_two_moons(250, random_state=0)


@pytest.fixture(scope="module")
def fitted(X):
    return NCEDensity(**MORE_TREES).fit(X)


def test_the_fixture_has_a_tilt(fitted):
    # the tests below would be easy on a model that is its base
    assert fitted.n_iter_ > 0
    assert (fitted.log_partition_ != 0).all()


def test_clone_and_repr(fitted, X):
    copy = clone(fitted)
    names = copy.get_params().keys() - {"energy_model"}  # which is compared by its own parameters
    assert copy.get_params().keys() == fitted.get_params().keys()
    assert all(copy.get_params()[name] == fitted.get_params()[name] for name in names)
    assert copy.energy_model is not fitted.energy_model
    with pytest.raises(NotFittedError):
        copy.score_samples(X)
    assert repr(NCEDensity()) == "NCEDensity()"
    assert repr(NCEDensity(n_members=2, base=None)) == "NCEDensity(base=None, n_members=2)"
    assert "NCEDensity" in fitted._repr_html_()


def test_pickle_and_joblib(fitted, X):
    buffer = io.BytesIO()
    joblib.dump(fitted, buffer)
    buffer.seek(0)
    for copy in (pickle.loads(pickle.dumps(fitted)), joblib.load(buffer)):
        np.testing.assert_array_equal(copy.score_samples(X), fitted.score_samples(X))
        np.testing.assert_array_equal(copy.sample(20, random_state=1), fitted.sample(20, 1))
        np.testing.assert_array_equal(copy.stein_score(X), fitted.stein_score(X))


def test_pickle_holds_neither_data_nor_training(fitted):
    # 250 rows, a Gaussian base and two forests of at most 30 small trees
    payload = pickle.dumps(fitted)
    assert b"skorch" not in payload
    assert len(payload) < 1_000_000


def test_pipeline(X):
    # an orthogonal map in front changes nothing but the constant of the scaler
    pipeline = make_pipeline(StandardScaler(), NCEDensity(**QUICK_NCE)).fit(X)
    plain = NCEDensity(**QUICK_NCE).fit(X)
    log_det = -np.log(X.std(axis=0)).sum()
    np.testing.assert_allclose(
        pipeline.score_samples(X) + log_det, plain.score_samples(X), atol=1e-6
    )
    assert pipeline.score(X) == pytest.approx(pipeline.score_samples(X).mean(), abs=1e-12)
    assert set(pipeline.predict(X)) == {-1, 1}


def test_cross_val_score_is_the_held_out_log_density(X):
    cv = KFold(3, shuffle=True, random_state=0)
    scores = cross_val_score(NCEDensity(**QUICK_NCE), X, cv=cv)
    train, test = next(cv.split(X))
    expected = NCEDensity(**QUICK_NCE).fit(X[train]).score_samples(X[test]).mean()
    assert scores[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_grid_search_needs_no_scorer(backend, reference_search):
    with joblib.parallel_backend(backend):
        search = grid_search(n_jobs=2)
    for key in ("mean_test_score", "split0_test_score", "split1_test_score"):
        np.testing.assert_array_equal(search.cv_results_[key], reference_search.cv_results_[key])
    assert str(search.best_params_) == str(reference_search.best_params_)


def grid_search(n_jobs=None):
    cv = KFold(2, shuffle=True, random_state=0)
    grid = {"energy_model": [None, Boosting(max_iter=20)]}
    search = GridSearchCV(NCEDensity(**MORE_TREES), grid, cv=cv, n_jobs=n_jobs)
    return search.fit(make_two_moons(500, random_state=0))


@pytest.fixture(scope="module")
def reference_search():
    return grid_search()


def test_held_out_log_density_decides(reference_search):
    # two moons are no Gaussian: a tilt by trees beats none
    base_alone, tilted = reference_search.cv_results_["mean_test_score"]
    assert isinstance(reference_search.best_params_["energy_model"], Boosting)
    assert tilted > base_alone + 0.05


def test_halving_search(X):
    estimator, grid = NCEDensity(**QUICK_NCE | {"energy_model": None}), ["gaussian", "gmm", "kde"]
    search = HalvingGridSearchCV(
        estimator, {"base": grid}, cv=2, factor=3, min_resources=60, random_state=0
    ).fit(X)
    last = search.cv_results_["iter"] == search.n_iterations_ - 1
    assert search.best_score_ == search.cv_results_["mean_test_score"][last].max()
    assert search.n_iterations_ == 2


# ---------------------------------------------------------------------- frames


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_frames(X, library):
    frames = pytest.importorskip(library)
    names = ["across", "up"]
    frame = frames.DataFrame({name: X[:, j] for j, name in enumerate(names)})
    estimator = NCEDensity(**QUICK_NCE).fit(frame)
    assert list(estimator.feature_names_in_) == names
    plain = NCEDensity(**QUICK_NCE).fit(X)
    np.testing.assert_array_equal(estimator.score_samples(frame), plain.score_samples(X))
    with pytest.raises(ValueError, match="feature names"):
        estimator.score_samples(frame[names[::-1]])
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        estimator.score_samples(X)


def test_constant_column_of_a_frame_keeps_its_place(X):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": X[:, 0], "same": 3.0, "b": X[:, 1]})
    estimator = NCEDensity(**QUICK_NCE).fit(frame)
    assert estimator.n_features_in_ == 3
    drawn = estimator.sample(10, random_state=0)
    assert drawn.shape == (10, 3)
    assert (drawn["same"] == 3.0).all()


def test_torch_tensors(X):
    import torch

    estimator = NCEDensity(**QUICK_NCE).fit(torch.as_tensor(X))
    scores = estimator.score_samples(torch.as_tensor(X))
    np.testing.assert_array_equal(scores, NCEDensity(**QUICK_NCE).fit(X).score_samples(X))
    np.testing.assert_array_equal(
        scores, estimator.score_samples(torch.tensor(X, requires_grad=True))
    )


def test_set_output_of_other_steps(X):
    pandas = pytest.importorskip("pandas")
    pipeline = make_pipeline(PCA(2), NCEDensity(**QUICK_NCE))
    pipeline[:-1].set_output(transform="pandas")
    pipeline.fit(pandas.DataFrame(X, columns=["a", "b"]))
    assert list(pipeline[-1].feature_names_in_) == ["pca0", "pca1"]
    with sklearn.config_context(transform_output="pandas"):
        fitted = NCEDensity(**QUICK_NCE).fit(X)
        assert type(fitted.score_samples(X)) is np.ndarray
        assert type(fitted.sample(3)) is np.ndarray


# ---------------------------------------------------------------------- density and transformer


@pytest.fixture(scope="module")
def groups():
    """Two groups of rows in five columns, told apart by one direction in them."""
    rng = np.random.default_rng(0)
    y = np.arange(300) % 2
    z = np.c_[4.0 * y - 2.0 + rng.normal(size=300), rng.normal(size=300)]
    return z @ rng.normal(size=(2, 5)) + 0.3 * rng.normal(size=(300, 5)), y


def test_transformer_in_front_of_a_classifier(groups):
    X, y = groups
    pipeline = make_pipeline(ImplicitVAE(**QUICK_VAE | {"n_components": 2}), LogisticRegression())
    pipeline.fit(X[:200], y[:200])
    assert pipeline.score(X[200:], y[200:]) > 0.9
    vae = pipeline[0]
    np.testing.assert_array_equal(vae.transform(X), pipeline[:-1].transform(X))
    twin = clone(vae)
    np.testing.assert_array_equal(
        twin.fit_transform(X[:200], sample_weight=np.ones(200)), vae.transform(X[:200])
    )


def test_search_of_the_number_of_components(groups):
    X, _ = groups
    search = GridSearchCV(
        ImplicitVAE(**QUICK_VAE | {"max_epochs": 0}), {"n_components": [1, 2]},
        cv=KFold(2, shuffle=True, random_state=0),
    ).fit(X)  # fmt: skip
    one, two = search.cv_results_["mean_test_score"]
    assert search.best_params_ == {"n_components": 2}
    assert two > one + 0.1
    assert search.transform(X).shape == (300, 2)


def test_frames_of_latent_variables(groups):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(groups[0], index=np.arange(300) + 7)
    frame.columns = list("abcde")
    vae = ImplicitVAE(**QUICK_VAE | {"n_components": 3}).set_output(transform="pandas").fit(frame)
    z = vae.transform(frame)
    names = ["implicitvae0", "implicitvae1", "implicitvae2"]
    assert list(vae.get_feature_names_out()) == list(z.columns) == names
    assert (z.index == frame.index).all()
    vae.set_output(transform="default")
    np.testing.assert_array_equal(z.to_numpy(), vae.transform(frame))
    # rows are frames like those that were fitted
    for rows in (vae.inverse_transform(z), vae.reconstruct(frame)):
        assert list(rows.columns) == list("abcde")
        assert (rows.index == frame.index).all()
    with pytest.raises(ValueError, match="X has 2 columns, but there are 3 latent variables"):
        vae.inverse_transform(z.to_numpy()[:, :2])


def test_clone_and_pickle_of_a_transformer(X):
    vae = ImplicitVAE(**QUICK_VAE | {"n_components": 2}).fit(X)
    assert clone(vae).get_params() == vae.get_params()
    with pytest.raises(NotFittedError):
        clone(vae).transform(X)
    with pytest.raises(NotFittedError):
        clone(vae).inverse_transform(X)
    payload = pickle.dumps(vae)
    assert b"skorch" not in payload
    assert len(payload) < 100_000  # four perceptrons of eight units
    copy = pickle.loads(payload)
    for method in ("score_samples", "transform", "reconstruct", "inverse_transform"):
        np.testing.assert_array_equal(getattr(copy, method)(X), getattr(vae, method)(X))
    np.testing.assert_array_equal(copy.sample(20, random_state=1), vae.sample(20, random_state=1))
    assert repr(ImplicitVAE(encoder="gaussian")) == "ImplicitVAE(encoder='gaussian')"


def test_tags_of_a_transformer():
    tags = ImplicitVAE().__sklearn_tags__()
    assert tags.estimator_type == "density_estimator"
    assert tags.transformer_tags is not None
    assert not tags.non_deterministic
    assert is_outlier_detector(outlier_detector(ImplicitVAE)())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("n_components", 0), ("n_components", "all"), ("encoder", "flow"),
        ("likelihood", "poisson"), ("kl_weight_start", 0), ("n_posterior_samples", 0),
        ("n_importance_samples", 9), ("encoder_model", "cnn"), ("decoder_model", 3),
    ],
)  # fmt: skip
def test_bad_parameters_of_a_transformer(X, option, value):
    with pytest.raises(ValueError, match=f"'{option}' parameter of ImplicitVAE must be"):
        ImplicitVAE(**QUICK_VAE).set_params(**{option: value}).fit(X)


# ---------------------------------------------------------------------- specifications


def module(n_features, width=2):
    return nn.Sequential(nn.Linear(n_features, width), nn.Tanh(), nn.Linear(width, 1))


BARE_MODULE = Network(module, max_epochs=3, module__width=2)
TO_SEARCH = [
    *((cls, NETWORK, "hidden_layer_sizes", [(4,), (16, 16)]) for cls in TILTED),
    *((cls, BARE_MODULE, "module__width", [2, 32]) for cls in TILTED),
    (NCEDensity, TREES, "max_leaf_nodes", [2, 31]),
]


@pytest.mark.parametrize(("cls", "energy_model", "name", "values"), TO_SEARCH)
def test_search_of_the_parameters_of_an_energy(cls, energy_model, name, values, X):
    # no fallback on the base, which would make all candidates alike
    particular = {"base": None, "noise": "gaussian"} if cls is NCEDensity else {"base": None}
    rows = X[:150]
    if cls is ContrastiveDivergenceEBM:
        particular["n_steps"] = 1
    if energy_model is TREES:
        particular = {"noise_ratio": 5, "base": "gaussian"}  # which trees do better than
        energy_model, rows = Boosting(max_iter=30), make_two_moons(1000, random_state=0)
    estimator = cls(**QUICK | particular | {"energy_model": energy_model})
    cv = KFold(2, shuffle=True, random_state=0)
    search = GridSearchCV(estimator, {f"energy_model__{name}": values}, cv=cv, error_score="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hardly any training
        search.fit(rows)
    one, other = search.cv_results_["mean_test_score"]
    assert np.isfinite([one, other]).all()
    assert one != other
    best = search.best_estimator_.energy_model
    assert best.get_params()[name] == search.best_params_[f"energy_model__{name}"]
    assert energy_model.get_params()[name] == estimator.energy_model.get_params()[name]


@pytest.mark.parametrize("cls", TILTED)
def test_specifications_are_cloned_printed_and_set_with_their_estimator(cls):
    estimator = cls(energy_model=Network(hidden_layer_sizes=(8,)))
    name = cls.__name__
    assert repr(estimator) == f"{name}(energy_model=Network(hidden_layer_sizes=(8,)))"
    assert estimator.get_params()["energy_model__hidden_layer_sizes"] == (8,)
    assert "energy_model__hidden_layer_sizes" not in estimator.get_params(deep=False)
    twin = clone(estimator).set_params(energy_model__hidden_layer_sizes=(4,))
    assert twin.energy_model.hidden_layer_sizes == (4,)
    assert estimator.energy_model.hidden_layer_sizes == (8,)
    # the module of a user, and what is passed to it
    estimator = cls(energy_model=Network(module, module__width=8))
    assert clone(estimator).get_params()["energy_model__module__width"] == 8
    assert "module__width=8" in repr(estimator)
    estimator.set_params(energy_model=NETWORK, energy_model__batch_size=7)
    assert estimator.energy_model.batch_size == 7
    NETWORK.set_params(batch_size=256)


@pytest.mark.parametrize("cls", TILTED)
@pytest.mark.parametrize(
    ("energy_model", "message"),
    [
        ("auto", r"'auto' is a name .* pass energy_model=Network\(\) \(or Boosting\(\)\)"),
        ("mlp", r"pass energy_model=Network\(embedding='piecewise_linear'\)"),
        ("boosting", r"pass energy_model=Boosting\(\)"),
        (module, r"module is a bare module .* pass energy_model=Network\(module\)"),
        (Boosting, r"Boosting is a class .* pass energy_model=Boosting\(\)"),
        (None, r"pass energy_model=Network\(\)"),
    ],
)
def test_what_has_no_parameters_says_what_to_pass(cls, energy_model, message):
    with pytest.raises(ValueError, match=message):
        cls(energy_model=energy_model).set_params(energy_model__learning_rate=0.1)
    # both at once
    estimator = cls(energy_model=energy_model)
    estimator.set_params(energy_model=Network(), energy_model__learning_rate=0.1)
    assert estimator.energy_model.learning_rate == 0.1


# ---------------------------------------------------------------------- docstrings

OWN_WORDS = {
    NCEDensity: {"base", "energy_model", "n_iter_"},  # of all distributions, of trees
    ScoreMatchingEBM: {"energy_model"},
    ContrastiveDivergenceEBM: {"energy_model"},
    FlowContrastiveDensity: {
        *("base", "flow", "generator_learning_rate", "log_partition_learned_", "n_iter_"),
        "warm_start",
    },
    AdversarialEBM: {"base", "flow", "generator_learning_rate", "warm_start"},
    ImplicitVAE: {  # networks and no tilt, one member
        *("accepted_", "held_out_gain_", "held_out_gain_std_error_", "model_", "n_iter_"),
        *("out_of_fold_members_", "out_of_fold_scores_", "warm_start"),
    },
    OutlierDetector: {  # views, without a test of what is accepted; no networks
        *("accepted_", "contamination", "device", "effective_sample_size_", "log_partition_"),
        *("n_jobs", "n_partition_samples", "out_of_fold_offset_"),
    },
}
"""Parameters and attributes that mean something else in an estimator than in the others."""

OWN_WORDS_IN_ALL = {"history_"}
"""Has a training loss, which is another one in each."""


def documented(cls):
    """What the docstring says of parameters and attributes: name -> type and text."""
    docs = pytest.importorskip("numpydoc.docscrape").ClassDoc(cls)
    return {
        entry.name: (entry.type, " ".join(" ".join(entry.desc).split()))
        for entry in docs["Parameters"] + docs["Attributes"]
    }


def test_what_is_shared_is_documented_alike():
    every = {cls: documented(cls) for cls in QUICKLY}
    assert all({*cls().get_params()} <= set(said) for cls, said in every.items())
    for name in {name for said in every.values() for name in said} - OWN_WORDS_IN_ALL:
        own = [cls for cls in every if name in OWN_WORDS.get(cls, ())]
        shared = {said[name] for cls, said in every.items() if name in said and cls not in own}
        assert len(shared) <= 1, name
        for cls in own:  # else it is not its own
            assert every[cls][name] not in shared, (cls.__name__, name)


@pytest.mark.parametrize("cls", QUICKLY)
def test_every_parameter_is_documented_with_its_default(cls):
    documented = re.findall(r"(?m)^    (\w+) : .*default=(.*)$", cls.__doc__)
    defaults = {name: value.strip() for name, value in documented}
    parameters = inspect.signature(cls).parameters
    assert sorted(defaults) == sorted(parameters)
    for name, parameter in parameters.items():
        assert ast.literal_eval(defaults[name]) == parameter.default


# ---------------------------------------------------------------------- metadata routing


@pytest.fixture
def routing():
    with sklearn.config_context(enable_metadata_routing=True):
        yield


@pytest.mark.usefixtures("routing")
def test_routing_without_weights(X):
    search = GridSearchCV(NCEDensity(**QUICK_NCE), {"n_members": [1, 2]}, cv=2).fit(X)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


@pytest.mark.usefixtures("routing")
def test_weights_reach_fit_and_score(X):
    seen = []

    class Spy(NCEDensity):
        def fit(self, X, y=None, sample_weight=None):
            seen.append(("fit", np.array(sample_weight)))
            return super().fit(X, y, sample_weight)

        def score(self, X, y=None, sample_weight=None):
            seen.append(("score", np.array(sample_weight)))
            return super().score(X, y, sample_weight)

    weight = np.linspace(0.5, 2.0, len(X))
    estimator = Spy(**QUICK_NCE).set_fit_request(sample_weight=True)
    estimator.set_score_request(sample_weight=True)
    cv = KFold(2)
    search = GridSearchCV(estimator, {"n_members": [2]}, cv=cv, refit=False)
    search.fit(X, sample_weight=weight)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    expected = [(w, weight[part]) for split in cv.split(X) for w, part in
                zip(("fit", "score"), split, strict=True)]  # fmt: skip
    assert [kind for kind, _ in seen] == [kind for kind, _ in expected]
    for (_, got), (_, given) in zip(seen, expected, strict=True):
        np.testing.assert_array_equal(got, given)


@pytest.mark.usefixtures("routing")
def test_requests_are_declared_for_every_method_with_weights():
    requests = NCEDensity().get_metadata_routing()
    for method in ("fit", "score"):
        assert "sample_weight" in getattr(requests, method).requests


def test_score_is_weighted(fitted, X):
    weight = np.linspace(0.0, 2.0, len(X))
    expected = (weight * fitted.score_samples(X)).sum() / weight.sum()
    assert fitted.score(X, sample_weight=weight) == pytest.approx(expected, abs=1e-12)


def test_fit_is_silent_where_nothing_is_wrong(X):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NCEDensity(**QUICK_NCE | {"n_partition_samples": "auto"}).fit(X)
