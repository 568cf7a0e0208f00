"""FlowContrastiveDensity: the game, what each of its stages is worth, and the flow it leaves."""

import copy
import math
import pickle
import warnings
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from sklearn.base import clone
from skorch.callbacks import Callback

from skebm import Boosting, FlowContrastiveDensity, Network
from skebm._engine import Budget
from skebm.bases import _flow_training
from skebm.datasets import Rings
from skebm.energies import CorrectedEnergy, MemberEnergies
from skebm.estimators._generators import FlowDensity
from skebm.training import distributions, flow_contrastive, games

NETWORK = {
    "hidden_layer_sizes": (32,), "learning_rate": 0.01, "max_epochs": 30, "batch_size": 128,
    "patience": 1000,
}  # fmt: skip
TREES = Boosting(learning_rate=0.01, max_iter=30)

pytestmark = pytest.mark.filterwarnings("ignore:the standard error of log Z")


@pytest.fixture(autouse=True, scope="module")
def small_flows():
    """Flows that fit in a fraction of a second, and leave the energies something to learn."""
    with pytest.MonkeyPatch.context() as patch:
        small = partial(distributions.build_flow, n_layers=2, hidden=(16,), n_bins=4)
        patch.setattr(distributions, "build_flow", small)
        patch.setattr(_flow_training, "FLOW_BUDGET", Budget(epochs=10, steps=1))
        patch.setattr(flow_contrastive, "HEAD_START", 20)
        yield


def density(**options):
    """An estimator; options are those of its network, too."""
    network = {name: options.pop(name, value) for name, value in NETWORK.items()}
    options = {"energy_model": Network(**network), "n_partition_samples": 20_000} | options
    return FlowContrastiveDensity(**{"n_members": 2, "random_state": 0} | options)


@cache
def rings():
    return Rings().sample(1000, random_state=0)


@cache
def new_rings():
    return Rings().sample(4000, random_state=1)


@cache
def fitted(**options):
    return density(**options).fit(rings())


@cache
def plane(low=-9.0, high=9.0, n=201):
    """Cell centres, (n^2, 2), and the area of a cell."""
    t = np.linspace(low, high, n)
    return np.stack(np.meshgrid(t, t), -1).reshape(-1, 2), (t[1] - t[0]) ** 2


def log_mass(log_density):
    points, area = plane()
    return math.log(np.exp(log_density(points)).sum() * area)


def integrates_to_one(estimator):
    error = math.sqrt(np.square(estimator.log_partition_std_error_).sum()) / 2
    return abs(log_mass(estimator.score_samples)) < 0.02 + 3.0 * error


# ---------------------------------------------------------------------- the game


def test_jensen_shannon_is_of_the_value():
    estimator = fitted()
    history = estimator.history_
    n_game = np.flatnonzero(np.isfinite(history["jensen_shannon"])).max()
    assert n_game == 30
    assert all(len(values) == 61 for values in history.values())
    assert history["n_iter"].tolist() == list(range(61))
    divergence = history["jensen_shannon"]
    assert np.isnan(divergence[0])
    assert np.isnan(divergence[n_game + 1 :]).all()
    divergence = divergence[1 : n_game + 1]
    value = -history["train_loss"][1 : n_game + 1] / 2  # of two members
    np.testing.assert_allclose(divergence, math.log(2) + value / 2)
    assert (divergence > -0.05).all()
    assert (divergence < math.log(2) + 0.05).all()
    assert divergence[-1] > 0.02  # rings are no such flow


def test_jensen_shannon_of_a_flow_that_is_right_is_nothing():
    rows = np.random.default_rng(0).normal(size=(1000, 2))
    estimator = density(learning_rate=0.002, max_epochs=10, refinement=False).fit(rows)
    assert np.nanmax(np.abs(estimator.history_["jensen_shannon"])) < 0.02


def test_the_game_moves_the_flow_and_does_not_ruin_it():
    estimator = fitted(generator_learning_rate=0.003)
    before = estimator.base_score_samples(new_rings())
    after = estimator.flow_.score_samples(new_rings())
    assert np.abs(after - before).mean() > 0.01
    assert after.mean() > before.mean() - 0.05


# ---------------------------------------------------------------------- the density


def test_energy_is_far_better_than_its_flow_on_rings():
    estimator = fitted()
    assert estimator.n_iter_ > 0
    assert estimator.score(new_rings()) > estimator.base_score_samples(new_rings()).mean() + 0.2
    assert estimator.score(new_rings()) > estimator.flow_.score(new_rings()) + 0.2


@pytest.mark.parametrize("seed", range(4))
def test_never_much_below_its_flow(seed):
    rng = np.random.default_rng(seed)
    rows, new = (rng.standard_t(5, size=(n, 2)) @ [[1.0, 0.5], [0.0, 1.0]] for n in (120, 3000))
    estimator = density(random_state=seed, max_epochs=15).fit(rows)
    gain = estimator.score_samples(new) - estimator.base_score_samples(new)
    assert gain.mean() > -0.01


@pytest.mark.parametrize("options", [{}, {"base": None}])
def test_the_flow_integrates_to_one(options):
    assert abs(log_mass(fitted(**options).flow_.score_samples)) < 0.01


def measured_log_z(model):
    """Of f before recalibration."""
    model.calibrate(1.0, model.mode_weights[:0], [])
    with torch.no_grad():
        _, log_weights = model.draw(20_000, [torch.Generator().manual_seed(k) for k in range(2)])
    return log_weights.logsumexp(1).numpy() - math.log(20_000)


def test_learned_log_z_is_the_measured_one():
    estimator = fitted()
    measured = measured_log_z(copy.deepcopy(estimator.model_))
    np.testing.assert_allclose(estimator.log_partition_learned_, measured, atol=0.1)


def test_without_a_base_it_is_a_density_all_the_same():
    estimator = fitted(base=None)
    assert estimator.n_iter_ > 0
    # mass where the flow has none is taken away in the refinement
    assert estimator.score(new_rings()) > estimator.base_score_samples(new_rings()).mean() + 1.0
    stages = estimator.stages_
    assert stages["flow"] == pytest.approx(fitted().stages_["flow"], abs=0.1)
    assert stages["energy_refined"] > stages["energy_after_game"] + 0.2


# ---------------------------------------------------------------------- stages


def test_stages_only_rise():
    estimator = fitted()
    stages = estimator.stages_
    assert list(stages) == ["flow", "flow_after_game", "energy_after_game", "energy_refined"]
    assert all(type(value) is float for value in stages.values())
    assert stages["flow"] <= stages["energy_after_game"] + 1e-6
    assert stages["energy_after_game"] <= stages["energy_refined"] + 1e-6
    level = estimator.history_["held_out_log_likelihood"]
    assert level[0] == pytest.approx(stages["flow"], abs=1e-6)
    assert np.nanmax(level[:31]) == pytest.approx(stages["energy_after_game"], abs=1e-5)
    assert np.nanmax(level) == pytest.approx(stages["energy_refined"], abs=1e-5)


@pytest.mark.parametrize("patience", [1000, None])
def test_without_refinement(patience):
    estimator = fitted(refinement=False, max_epochs=10, patience=patience)
    assert set(estimator.stages_) == {"flow", "flow_after_game", "energy_after_game"}
    assert all(math.isfinite(value) for value in estimator.stages_.values())
    assert len(estimator.history_["n_iter"]) == 11
    assert np.isfinite(estimator.history_["jensen_shannon"][1:]).all()
    assert estimator.log_partition_learned_.shape == (2,)


@pytest.mark.parametrize(("patience", "learns"), [(1000, False), (None, True), (None, False)])
def test_refinement_goes_on_and_the_better_energy_is_kept(patience, learns, monkeypatch):
    train, started = flow_contrastive.train_against_noise, []

    def spy(task, network, **options):
        started.append(copy.deepcopy(options["start"].energy))
        if not learns:
            network = clone(network).set_params(learning_rate=1e-30)
        return train(task, network, **options)

    monkeypatch.setattr(flow_contrastive, "train_against_noise", spy)
    options = {"patience": patience, "max_epochs": 20}
    refined, game = density(**options).fit(rings()), fitted(refinement=False, **options)
    (start,) = started
    stages = refined.stages_
    assert stages["energy_after_game"] == pytest.approx(game.stages_["energy_after_game"])
    if patience is None:
        assert refined.n_iter_ in (0, *range(21, 41))
        if learns:
            assert stages["energy_refined"] > stages["energy_after_game"]
        else:  # it has begun where the game ended
            assert stages["energy_refined"] == pytest.approx(stages["energy_after_game"], abs=1e-6)
        return
    assert refined.n_iter_ == game.n_iter_ <= 20
    assert stages["energy_refined"] == stages["energy_after_game"]
    for kept, wanted in zip(
        refined.model_.energy.parameters(), game.model_.energy.parameters(), strict=True
    ):
        torch.testing.assert_close(kept, wanted)
    for kept, wanted in zip(start.parameters(), game.model_.energy.parameters(), strict=True):
        torch.testing.assert_close(kept, wanted)
    np.testing.assert_array_equal(refined.log_partition_learned_, game.log_partition_learned_)


@cache
def boosted():
    return fitted(correction=TREES)


def test_trees_go_on_where_the_network_ended():
    estimator, network = boosted(), fitted()
    stages = estimator.stages_
    assert list(stages) == [*network.stages_, "energy_boosted", "flow_boosted"]
    assert stages["energy_boosted"] == stages["flow_boosted"]
    for name, value in network.stages_.items():
        assert stages[name] == pytest.approx(value, abs=1e-9)
    assert stages["energy_boosted"] > stages["energy_refined"]
    energy = estimator.model_.energy
    assert isinstance(energy, CorrectedEnergy)
    first, second = energy.first.parameters(), network.model_.energy.parameters()
    for kept, wanted in zip(first, second, strict=True):
        torch.testing.assert_close(kept, wanted)
    # what follows the epochs of game and refinement is iterations
    history = estimator.history_
    assert np.nanmax(history["held_out_log_likelihood"]) == pytest.approx(
        stages["energy_boosted"], abs=0.02
    )
    assert 60 < estimator.n_iter_ <= 90
    assert history["n_iter"][-1] == 120
    assert np.isnan(history["train_loss"][61:]).all()


def test_density_with_trees():
    estimator = boosted()
    assert integrates_to_one(estimator)
    assert estimator.score(new_rings()) > fitted().score(new_rings()) - 0.01
    assert np.isfinite(estimator.stein_score(new_rings()[:50])).all()
    # the mean log-density of samples is that by quadrature
    log_p = estimator.score_samples(plane()[0])
    drawn = estimator.score_samples(estimator.sample(4000, random_state=0))
    expected = np.average(log_p, weights=np.exp(log_p))
    assert drawn.mean() == pytest.approx(expected, abs=4 * drawn.std() / 4000**0.5 + 0.02)
    twin = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_array_equal(
        twin.score_samples(new_rings()[:50]), estimator.score_samples(new_rings()[:50])
    )


def test_learned_log_z_with_trees_is_that_of_what_they_corrected():
    estimator = boosted()
    model = copy.deepcopy(estimator.model_)
    model.energy = model.energy.first
    np.testing.assert_allclose(estimator.log_partition_learned_, measured_log_z(model), atol=0.05)


def test_trees_that_do_not_help_are_left_out(monkeypatch):
    train = flow_contrastive.train_classifiers

    def spoilt(*args, **options):
        found = train(*args, **options)
        return replace(found, held=[f - 1.0 for f in found.held])

    monkeypatch.setattr(flow_contrastive, "train_classifiers", spoilt)
    estimator = density(correction=TREES).fit(rings())
    stages = estimator.stages_
    assert stages["energy_boosted"] == stages["energy_refined"]
    assert not isinstance(estimator.model_.energy, CorrectedEnergy)
    np.testing.assert_array_equal(estimator.log_partition_learned_, fitted().log_partition_learned_)


def test_trees_on_the_flow_alone_may_be_better(monkeypatch):
    train = flow_contrastive.train_classifiers

    def spoilt(*args, start, **options):
        found = train(*args, start=start, **options)
        return found if start.energy is None else replace(found, held=[f - 1.0 for f in found.held])

    monkeypatch.setattr(flow_contrastive, "train_classifiers", spoilt)
    trees = Boosting(learning_rate=0.05, max_iter=60)  # that learn more than the networks
    estimator = density(correction=trees, max_epochs=5).fit(rings())
    stages = estimator.stages_
    assert stages["flow_boosted"] > stages["energy_boosted"] == stages["energy_refined"]
    assert isinstance(estimator.model_.energy, MemberEnergies)
    assert estimator.model_.energy.softness is not None
    # they are judged against the base, whose integral is one
    np.testing.assert_array_equal(estimator.log_partition_learned_, np.zeros(2))
    np.testing.assert_allclose(estimator.log_partition_, 0.0, atol=0.1)
    assert integrates_to_one(estimator)
    first = estimator.score(new_rings())
    # has no network to go on from: all but the flow starts anew
    estimator.set_params(warm_start=True).fit(rings())
    assert estimator.score(new_rings()) > first - 0.1
    assert estimator.stages_["flow_boosted"] == pytest.approx(stages["flow_boosted"], abs=0.1)


def test_warm_start_goes_on_from_the_network_below_the_trees(monkeypatch):
    estimator = copy.deepcopy(boosted()).set_params(warm_start=True)
    wanted, seen = copy.deepcopy(estimator.model_.energy.first), []
    build = games.build_energy
    monkeypatch.setattr(games, "build_energy", lambda *args: seen.append(build(*args)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        estimator.fit(rings())
    for kept, parameter in zip(seen[0].parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(kept, parameter.to(kept.dtype))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, Boosting), ({"base": None}, type(None)), ({"refinement": False}, type(None)),
        ({"energy_model": Network()}, type(None)), ({"correction": None}, type(None)),
        ({"correction": TREES, "refinement": False}, Boosting),
    ],
)  # fmt: skip
def test_where_there_are_trees_by_default(options, wanted):
    train = FlowContrastiveDensity(**options)._recipe().train
    assert type(train.keywords["correction"]) is wanted


@pytest.mark.parametrize("option", ["base", "energy_model"])
def test_trees_need_a_base_and_an_energy(option):
    with pytest.raises(ValueError, match="correction=Boosting.*needs a base and an energy_model"):
        FlowContrastiveDensity(correction=TREES, **{option: None}).fit(rings())


def test_trees_on_the_flow_alone_are_for_few_rows_and_a_judge(monkeypatch):
    options = {"correction": Boosting(max_iter=5, early_stopping=False), "max_epochs": 5}
    blind = density(**options).fit(rings()[:200])
    assert list(blind.stages_)[-1] == "energy_boosted"
    assert "flow_boosted" in boosted().stages_
    monkeypatch.setattr(flow_contrastive, "MANY_ROWS", 199)
    options = {"correction": Boosting(max_iter=5), "max_epochs": 20}
    assert list(density(**options).fit(rings()[:200]).stages_)[-1] == "energy_boosted"


def test_without_patience_nothing_warns_and_history_begins_with_the_flow():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        estimator = density(patience=None, max_epochs=5).fit(rings()[:200])
    assert estimator.n_iter_ in (0, 10)
    level = estimator.history_["held_out_log_likelihood"]
    assert level[0] == pytest.approx(estimator.stages_["flow"], abs=1e-6)


class Plan(Callback):
    """Reads how long a training would wait, and ends it."""

    def on_epoch_end(self, net, **_):
        self.patience = net.patience
        raise KeyboardInterrupt


@pytest.mark.parametrize(("asked", "wanted"), [(1, 100), (150, 150)])
def test_patience_is_of_many_steps_where_epochs_are_short(asked, wanted):
    seen = Plan()
    network = Network(batch_size=128, patience=asked, callbacks=[seen])
    density(energy_model=network, refinement=False).fit(rings()[:500])  # epochs of two steps
    assert seen.patience == wanted


def test_without_an_energy_it_is_the_flow_alone(monkeypatch):
    estimator = fitted(energy_model=None)
    scores = estimator.score_samples(new_rings())
    np.testing.assert_allclose(estimator.flow_.score_samples(new_rings()), scores, atol=1e-9)
    np.testing.assert_array_equal(estimator.base_score_samples(new_rings()), scores)
    # before a game the flow is trained for less long, and otherwise the same
    monkeypatch.setattr("skebm.estimators.flow_contrastive.FLOW_EFFORT", 1.0)
    game = density(batch_size=Network().batch_size, max_epochs=1).fit(rings())
    np.testing.assert_array_equal(game.base_score_samples(new_rings()), scores)
    level = pytest.approx(estimator.out_of_fold_scores_.mean(), abs=1e-9)
    assert estimator.stages_ == {"flow": level}
    assert game.stages_["flow"] == level
    assert estimator.n_iter_ == 0
    assert (estimator.log_partition_ == 0).all()
    assert not hasattr(estimator, "log_partition_learned_")
    with pytest.raises(ValueError, match="energy_model=None is the base alone"):
        density(energy_model=None, base=None).fit(rings())


def start_of(estimator):
    """The flow before the game."""
    return FlowDensity(estimator._columns, estimator.model_.bases)


def test_a_flow_at_rest_stays_what_it_was():
    estimator = fitted(accuracy_threshold=1.0, max_epochs=10)
    scores = estimator.flow_.score_samples(new_rings())
    np.testing.assert_array_equal(scores, start_of(estimator).score_samples(new_rings()))
    assert estimator.stages_["flow_after_game"] == estimator.stages_["flow"]
    moved = fitted(accuracy_threshold=0.0, max_epochs=10).flow_.score_samples(new_rings())
    assert (moved != scores).all()


def test_head_start_of_the_energy(monkeypatch):
    monkeypatch.setattr(flow_contrastive, "HEAD_START", 10_000)
    estimator = density(max_epochs=5, refinement=False).fit(rings())
    np.testing.assert_array_equal(
        estimator.flow_.score_samples(new_rings()), start_of(estimator).score_samples(new_rings())
    )


def test_a_flow_that_has_become_better_than_the_energy_is_the_model(monkeypatch):
    # an energy that cannot learn, against a flow that was stopped early
    monkeypatch.setattr(_flow_training, "FLOW_BUDGET", Budget(epochs=1, steps=1))
    estimator = density(
        generator_learning_rate=0.01, learning_rate=1e-6, refinement=False,
        accuracy_threshold=0.0, max_epochs=30,
    ).fit(rings())  # fmt: skip
    assert estimator.stages_["flow_after_game"] > estimator.stages_["flow"]
    assert estimator.n_iter_ == 0
    scores = estimator.score_samples(new_rings())
    np.testing.assert_allclose(scores, estimator.flow_.score_samples(new_rings()), atol=1e-9)
    start = density(max_epochs=1, refinement=False).fit(rings())
    assert scores.mean() > start.base_score_samples(new_rings()).mean()


# ---------------------------------------------------------------------- flow_


def test_the_flow_is_a_density_in_the_units_of_X():
    rows = np.insert(rings() * [100.0, 0.01] + [3e4, -7.0], 1, 5.0, axis=1)
    new = np.insert(new_rings() * [100.0, 0.01] + [3e4, -7.0], 1, 5.0, axis=1)
    flow = density(energy_model=None).fit(rows).flow_
    scores = flow.score_samples(new)
    assert scores.shape == (4000,)
    assert scores.dtype == np.float64
    # scales 100 and .01 cancel
    expected = fitted(energy_model=None).flow_.score_samples(new_rings())
    n = len(rows)
    expected += math.log((n + 1) / (n + 2))  # that a constant column is what it was
    np.testing.assert_allclose(scores, expected, atol=0.2)
    assert flow.score(new) == pytest.approx(scores.mean(), abs=1e-12)
    drawn = flow.sample(50, random_state=0)
    assert drawn.shape == (50, 3)
    assert drawn.dtype == np.float64
    assert (drawn[:, 1] == 5.0).all()
    np.testing.assert_array_equal(drawn, flow.sample(50, random_state=0))
    assert (drawn[:, 0] != flow.sample(50, random_state=1)[:, 0]).all()
    assert flow.sample().shape == (1, 3)
    new[:7, 1] += 1e-9
    lost = scores - flow.score_samples(new)
    np.testing.assert_allclose(lost, np.where(np.arange(4000) < 7, math.log(n + 1), 0.0), atol=1e-9)


def test_samples_of_the_flow_follow_it():
    # mean of its log-density: by samples, and by quadrature
    flow = fitted().flow_
    points, area = plane()
    scores = flow.score_samples(points)
    expected = (np.exp(scores) * scores).sum() * area
    drawn = flow.score_samples(flow.sample(4000, random_state=0))
    assert drawn.mean() == pytest.approx(expected, abs=4 * drawn.std() / 4000**0.5 + 0.01)


def test_the_flow_refuses_what_it_cannot_score():
    flow = fitted(energy_model=None).flow_
    for rows, message in (
        (np.zeros((3, 3)), "3 features.*expecting 2"), (np.zeros(2), "2D array"),
        (np.full((2, 2), np.nan), "NaN"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            flow.score_samples(rows)
    for n in (0, -1, 2.5, "ten"):
        with pytest.raises(ValueError, match="n_samples"):
            flow.sample(n)


@pytest.mark.parametrize("name", ["nsf", "class"])
def test_flows_of_zuko(name, monkeypatch):
    zuko = pytest.importorskip("zuko")
    small = {"transforms": 1, "hidden_features": (8,)}
    build_flow = partial(distributions.build_flow.func, **small)
    monkeypatch.setattr(distributions, "build_flow", build_flow)
    monkeypatch.setattr(_flow_training, "FLOW_BUDGET", Budget(epochs=2, steps=1))
    options = {
        "flow": zuko.flows.NICE if name == "class" else name,
        "max_epochs": 2, "n_partition_samples": 1000,
    }  # fmt: skip
    estimator = density(**options).fit(rings()[:200])
    assert np.isfinite(estimator.score_samples(new_rings())).all()
    assert estimator.flow_.sample(5, random_state=0).shape == (5, 2)
    again = density(**options).fit(rings()[:200])
    np.testing.assert_array_equal(
        again.score_samples(new_rings()), estimator.score_samples(new_rings())
    )


# ---------------------------------------------------------------------- state


def test_pickle():
    estimator, rows = fitted(), new_rings()[:100]
    data = pickle.dumps(estimator)
    assert len(data) < 300_000
    assert b"skorch" not in data
    other = pickle.loads(data)
    for one, two in ((other, estimator), (other.flow_, estimator.flow_)):
        np.testing.assert_array_equal(one.score_samples(rows), two.score_samples(rows))
        np.testing.assert_array_equal(one.sample(9, random_state=0), two.sample(9, random_state=0))


def test_refit_keeps_nothing_of_the_first():
    estimator = density(max_epochs=3).fit(rings()[:100])
    estimator.set_params(energy_model=None).fit(rings()[:100])
    plain = density(energy_model=None).fit(rings()[:100])
    assert set(vars(estimator)) == set(vars(plain))
    assert estimator.stages_ == plain.stages_
    np.testing.assert_array_equal(
        estimator.score_samples(new_rings()), plain.score_samples(new_rings())
    )


@pytest.mark.parametrize("base", ["flow", None])
def test_warm_start_goes_on_with_the_same_flow(base):
    options = {"base": base, "max_epochs": 5, "refinement": False}  # it ends before the flow plays
    estimator = density(warm_start=True, **options).fit(rings())
    first, level = estimator.stages_, estimator.score(new_rings())
    scores = estimator.flow_.score_samples(new_rings())
    estimator.fit(rings())
    assert estimator.stages_["flow"] == pytest.approx(first["flow"], abs=0.1)  # other folds
    assert estimator.score(new_rings()) > level - 0.02
    np.testing.assert_allclose(estimator.flow_.score_samples(new_rings()), scores, atol=1e-9)


def test_warm_start_goes_on_with_log_z(monkeypatch):
    estimator = copy.deepcopy(fitted()).set_params(warm_start=True)
    measured, seen = estimator.log_partition_.copy(), []

    def losses(of_data, of_flow, log_partition):
        seen.append(log_partition.detach().clone().numpy())
        return nce_losses(of_data, of_flow, log_partition)

    nce_losses = flow_contrastive.nce_losses
    monkeypatch.setattr(flow_contrastive, "nce_losses", losses)
    estimator.set_params(energy_model__max_epochs=1, refinement=False).fit(rings())
    np.testing.assert_allclose(seen[0], measured, atol=1e-6)
    assert np.abs(measured).max() > 0.01


# ---------------------------------------------------------------------- odd rows


def test_the_flow_of_weights_ties_and_one_column():
    rng = np.random.default_rng(0)
    rows = np.r_[rng.poisson(3.0, 300), rng.poisson(12.0, 100)].astype(float)[:, None]
    weight = np.r_[np.full(300, 0.2), np.full(100, 3.0)]
    flow = density(max_epochs=10).fit(rows, sample_weight=weight).flow_
    share = (flow.sample(3000, random_state=0) > 7.0).mean()
    assert share == pytest.approx(np.average(rows[:, 0] > 7, weights=weight), abs=0.08)
    # no spikes at the integers
    assert flow.score_samples(rows).max() < math.log(0.3)


def test_out_of_fold_scores_are_those_of_new_rows():
    """Neither the flows nor their coordinates have seen the rows that they are judged on."""
    rng = np.random.default_rng(0)
    gaps, flagged = [], []
    for seed in range(3):
        X, fresh = rng.normal(size=(60, 8)), rng.normal(size=(2000, 8))
        estimator = density(energy_model=None, random_state=seed).fit(X)
        gaps.append(estimator.out_of_fold_scores_.mean() - estimator.score(fresh))
        flagged.append((estimator.predict(fresh) < 0).mean())
    # the mean of members scores new rows a little better than the one member a held-out row has
    assert np.mean(gaps) < 0.25
    assert np.mean(flagged) < 0.1
