import copy
import inspect
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.gaussian_process.kernels import RBF
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks
from torch import nn

import skebm
from skebm.energies import (
    Boosting,
    EnergyModelMixin,
    MLPEnergy,
    ModuleStack,
    Network,
    PeriodicEmbedding,
    PiecewiseLinearEmbedding,
    SoftTrees,
    resolve_energy_model,
)

D, K = 3, 4
ROWS = [
    torch.randn(50 + k, D, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    for k in range(K)
]


class MyModule(nn.Module):
    def __init__(self, n_features, width=8, activation=nn.SiLU):
        super().__init__()
        self.width = width
        self.net = nn.Sequential(
            nn.Linear(n_features, width), activation(), nn.Dropout(0.2), nn.Linear(width, 1)
        )

    def forward(self, z):
        return self.net(z)


def factory(n_features, width=5):
    return nn.Sequential(nn.Linear(n_features, width), nn.Tanh(), nn.Linear(width, 1))


SPECIFICATIONS = {
    "Network": Network(),
    "Network, all given": Network(
        hidden_layer_sizes=(8, 4), embedding="periodic", learning_rate=1e-2, weight_decay=0.0,
        batch_size=32, max_epochs=7, patience=None, callbacks=[],
    ),
    "Network, class": Network(MyModule, module__width=64, module__activation=nn.Tanh),
    "Network, instance": Network(factory(D)),
    "Network, factory": Network(factory),
    "Boosting": Boosting(),
    "Boosting, all given": Boosting(
        learning_rate=0.05, max_iter=50, max_leaf_nodes=15, min_samples_leaf=5,
        l2_regularization=0.0, max_features=1.0, early_stopping=False,
    ),
}  # fmt: skip

# Checks of scikit-learn that need no `fit`.
CHECKS = [
    estimator_checks.check_estimator_cloneable,
    estimator_checks.check_estimator_repr,
    estimator_checks.check_get_params_invariance,
    estimator_checks.check_parameters_default_constructible,
]


@pytest.mark.parametrize("specification", SPECIFICATIONS.values(), ids=SPECIFICATIONS)
class TestEverySpecification:
    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_checks_of_scikit_learn(self, specification, check):
        check(type(specification).__name__, specification)

    def test_constructor_only_stores(self, specification):
        given = specification.get_params(deep=False)
        stored = vars(type(specification)(**given))
        assert stored.keys() == given.keys()
        assert all(stored[name] is value for name, value in given.items())

    def test_clone_has_equal_parameters_of_its_own(self, specification):
        copied = clone(specification)
        assert copied is not specification
        assert copied.get_params().keys() == specification.get_params().keys()
        assert repr(copied) == repr(specification)
        copied.set_params(learning_rate=0.5)
        assert specification.learning_rate != 0.5

    def test_parameters_survive_a_round_trip(self, specification):
        again = type(specification)().set_params(**specification.get_params())
        assert again.get_params() == specification.get_params()

    def test_pickles(self, specification):
        assert repr(pickle.loads(pickle.dumps(specification))) == repr(specification)

    def test_html(self, specification):
        assert type(specification).__name__ in specification._repr_html_()

    def test_every_parameter_has_a_constraint_and_is_valid(self, specification):
        specification.validate()
        names = inspect.signature(type(specification)).parameters.keys() - {"module_parameters"}
        assert specification._parameter_constraints.keys() == names

    def test_auto_settings_are_told_from_given_ones(self, specification):
        own = specification.setting("learning_rate", 123.0)
        given = specification.learning_rate
        assert own == (123.0 if given == "auto" else given)


def test_public_names():
    assert skebm.Network is Network
    assert skebm.Boosting is Boosting


def test_setting_left_to_the_method_may_be_none():
    assert Network().setting("max_epochs", None) is None
    assert Network(max_epochs=0).setting("max_epochs", None) == 0
    assert Network(embedding=None).setting("embedding", "periodic") is None


class TestRepr:
    def test_only_what_differs(self):
        assert repr(Network()) == "Network()"
        assert repr(Boosting()) == "Boosting()"
        assert repr(Network(embedding=None, batch_size=32)) == (
            "Network(batch_size=32, embedding=None)"
        )

    def test_arguments_of_the_module(self):
        assert "module__width=64" in repr(Network(MyModule, module__width=64))


class TestArgumentsOfTheModule:
    def test_constructor_names_an_argument_it_does_not_know(self):
        with pytest.raises(TypeError, match="unexpected argument 'width'.* module__width"):
            Network(MyModule, width=64)

    def test_other_arguments_are_keywords(self):
        with pytest.raises(TypeError):
            Network(MyModule, (8, 8))

    def test_listed_under_their_full_names(self):
        params = Network(MyModule, module__width=64).get_params()
        assert params["module__width"] == 64
        assert params["module"] is MyModule

    def test_set_params_takes_new_ones_and_changes_old_ones(self):
        network = Network(MyModule, module__width=64)
        assert network.set_params(module__activation=nn.Tanh, module__width=8) is network
        assert network.module__width == 8
        assert network.get_params()["module__activation"] is nn.Tanh
        assert clone(network).get_params() == network.get_params()

    def test_set_params_refuses_other_names_and_changes_nothing(self):
        network = Network(MyModule, module__width=64)
        with pytest.raises(ValueError, match="Invalid parameter 'width'"):
            network.set_params(module__width=8, width=8)
        assert network.module__width == 64

    @pytest.mark.parametrize("module", [MyModule, factory, partial(factory)])
    def test_reach_the_module(self, module):
        stack = Network(module, module__width=11).build(ROWS, embedding=None, seed=0)
        assert [p.shape for p in stack.members[0].parameters()][:2] == [(11, D), (11,)]


def assert_same(built, expected):
    """Bit for bit the same energy: type, weights and buffers, and values in training."""
    assert type(built) is type(expected)
    one, other = built.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    with torch.no_grad():
        for energy in (built, expected):
            g = torch.Generator().manual_seed(5)
            for parameter in energy.parameters():
                parameter += torch.randn(parameter.shape, generator=g)
    z = torch.randn(K, 20, D, generator=torch.Generator().manual_seed(6))
    in_training = built(z)  # before any other call: each advances the stream of dropout
    assert in_training.shape == (K, 20)
    assert in_training.std() > 0
    assert torch.equal(in_training, expected(z))
    assert torch.equal(built.eval()(z), expected.eval()(z))


class TestBuild:
    """Networks are what the modules of this room give for one stream, embedding first."""

    def expected(self, kind, seed, sizes=(128, 128)):
        g = torch.Generator().manual_seed(seed)
        if kind == "periodic":
            embedding = PeriodicEmbedding(D, K, rng=g)
        elif kind == "piecewise_linear":
            embedding = PiecewiseLinearEmbedding(ROWS)
        else:
            embedding = None
        return MLPEnergy(D, K, hidden_layer_sizes=sizes, embedding=embedding, rng=g)

    @pytest.mark.parametrize("kind", ["periodic", "piecewise_linear", None])
    def test_embedding_of_the_method_where_it_is_auto(self, kind):
        assert_same(Network().build(ROWS, embedding=kind, seed=3), self.expected(kind, 3))

    @pytest.mark.parametrize("kind", ["periodic", "piecewise_linear", None])
    @pytest.mark.parametrize("own", ["periodic", "piecewise_linear", None])
    def test_embedding_given_wins(self, kind, own):
        network = Network(embedding=kind, hidden_layer_sizes=[8, 7])
        expected = self.expected(kind, 4, (8, 7))
        assert_same(network.build(ROWS, embedding=own, seed=4), expected)

    @pytest.mark.parametrize("module", [MyModule, factory, MyModule(D)])
    def test_modules_of_users(self, module):
        built = Network(module).build(ROWS, embedding="periodic", seed=9)
        assert_same(built, ModuleStack(module, D, K, seed=9))

    def test_arguments_of_the_module_are_those_of_a_partial(self):
        built = Network(MyModule, module__width=4).build(ROWS, embedding=None, seed=2)
        assert_same(built, ModuleStack(partial(MyModule, width=4), D, K, seed=2))

    def test_starts_at_zero(self):
        z = torch.randn(K, 20, D, generator=torch.Generator().manual_seed(6))
        for network in (Network(), Network(embedding=None), Network(MyModule)):
            built = network.build(ROWS, embedding="periodic", seed=0)
            assert torch.equal(built(z), torch.zeros(K, 20))

    def test_instance_is_copied_never_trained(self):
        module = MyModule(D)
        before = copy.deepcopy(module.state_dict())
        built = Network(module).build(ROWS, embedding=None, seed=0)
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(1.0)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    def test_seeds_differ_and_leave_the_global_generators_alone(self):
        before = torch.get_rng_state()
        for network in (Network(), Network(MyModule)):
            one, two = (network.build(ROWS, embedding="periodic", seed=s) for s in (0, 1))
            weights = zip(one.parameters(), two.parameters(), strict=True)
            assert any(not torch.equal(a, b) for a, b in weights)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize(
        ("network", "message"),
        [
            (Network(lambda n_features: "net"), r"energy_model\(3\) must return a torch.nn.Module"),
            (Network(nn.Linear(D + 1, 1)), r"energy_model failed on rows of shape \(3, 3\)"),
            (Network(nn.Linear, module__out_features=2), r"energy_model must map .* \(3, 2\)"),
        ],
    )
    def test_errors_name_the_parameter_of_the_estimator(self, network, message):
        with pytest.raises(ValueError, match=message):
            network.build(ROWS, embedding=None, seed=0)


class TestClassifier:
    @pytest.mark.parametrize(("n_rows", "rate"), [(5_000, 0.1), (5_001, 0.2)])
    def test_defaults(self, n_rows, rate):
        classifier = Boosting().classifier(n_rows, 7)
        expected = HistGradientBoostingClassifier(
            learning_rate=rate, max_iter=600, max_leaf_nodes=31, max_features=0.5,
            l2_regularization=1.0, min_samples_leaf=20, early_stopping=False, random_state=7,
        )  # fmt: skip
        assert classifier.get_params() == expected.get_params()

    def test_every_setting_arrives(self):
        given = {
            "learning_rate": 0.3, "max_iter": 11, "max_leaf_nodes": 9, "min_samples_leaf": 3,
            "l2_regularization": 0.5, "max_features": 0.7,
        }  # fmt: skip
        params = Boosting(**given).classifier(10_000, 0).get_params()
        assert given.items() <= params.items()

    @pytest.mark.parametrize("early_stopping", [True, False])
    def test_does_not_stop_by_its_own_loss(self, early_stopping):
        classifier = Boosting(early_stopping=early_stopping).classifier(20_000, 0)
        assert classifier.early_stopping is False

    @pytest.mark.parametrize("edge", [{"max_leaf_nodes": 63, "max_features": 1}, {}])
    def test_what_is_valid_fits_and_can_be_read(self, edge):
        boosting = Boosting(max_iter=3, min_samples_leaf=1, **edge)
        boosting.validate()
        z = torch.randn(500, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        y = (z[:, 0] * z[:, 1] + 0.3 * z[:, 2] > 0).numpy()
        classifier = boosting.classifier(len(z), 0).fit(z.numpy(), y)
        trees = SoftTrees.from_hist_gradient_boosting(classifier)
        logit = torch.as_tensor(classifier.decision_function(z.numpy()))
        torch.testing.assert_close(trees(z), logit)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "name"),
        [
            ({"module": 3}, "module"),
            ({"module": "mlp"}, "module"),
            ({"hidden_layer_sizes": 0}, "hidden_layer_sizes"),
            ({"hidden_layer_sizes": -1}, "hidden_layer_sizes"),
            ({"hidden_layer_sizes": 2.5}, "hidden_layer_sizes"),
            ({"hidden_layer_sizes": True}, "hidden_layer_sizes"),
            ({"hidden_layer_sizes": (8, 0)}, "hidden_layer_sizes"),
            ({"hidden_layer_sizes": (8.0,)}, "hidden_layer_sizes"),
            ({"hidden_layer_sizes": [[8, 8]]}, "hidden_layer_sizes"),
            ({"embedding": "linear"}, "embedding"),
            ({"learning_rate": 0.0}, "learning_rate"),
            ({"learning_rate": "best"}, "learning_rate"),
            ({"weight_decay": -1e-3}, "weight_decay"),
            ({"batch_size": 0}, "batch_size"),
            ({"batch_size": 2.5}, "batch_size"),
            ({"max_epochs": -1}, "max_epochs"),
            ({"patience": 0}, "patience"),
            ({"callbacks": "log"}, "callbacks"),
            ({"callbacks": [7]}, "callbacks"),
        ],
    )
    def test_network(self, settings, name):
        network = Network(**settings)  # the constructor checks nothing
        with pytest.raises(ValueError, match=name):
            network.validate()

    @pytest.mark.parametrize(
        ("settings", "name"),
        [
            ({"learning_rate": 0}, "learning_rate"),
            ({"max_iter": -1}, "max_iter"),
            ({"max_leaf_nodes": 1}, "max_leaf_nodes"),
            ({"max_leaf_nodes": 64}, "max_leaf_nodes"),
            ({"max_leaf_nodes": None}, "max_leaf_nodes"),
            ({"min_samples_leaf": 0}, "min_samples_leaf"),
            ({"l2_regularization": -1.0}, "l2_regularization"),
            ({"max_features": 0.0}, "max_features"),
            ({"max_features": 2}, "max_features"),
            ({"early_stopping": "auto"}, "early_stopping"),
        ],
    )
    def test_boosting(self, settings, name):
        boosting = Boosting(**settings)
        with pytest.raises(ValueError, match=name):
            boosting.validate()

    @pytest.mark.parametrize("module", [MyModule, MyModule(D), factory])
    @pytest.mark.parametrize(
        "setting",
        [{"hidden_layer_sizes": (8,)}, {"embedding": "periodic"}, {"embedding": None}],
    )
    def test_settings_of_the_perceptron_beside_a_module(self, module, setting):
        (name,) = setting
        with pytest.raises(ValueError, match=rf"{name}=.* cannot act with module="):
            Network(module, **setting).validate()

    @pytest.mark.parametrize("sizes", [(128, 128), [128, 128], np.array([128, 128])])
    def test_defaults_in_other_words_are_no_settings(self, sizes):
        Network(MyModule, hidden_layer_sizes=sizes, embedding="auto").validate()

    @pytest.mark.parametrize("module", [None, MyModule(D)])
    def test_arguments_without_a_class_or_factory(self, module):
        with pytest.raises(ValueError, match="module__width cannot act with module="):
            Network(module, module__width=8).validate()

    def test_limits_that_are_valid(self):
        Network(
            hidden_layer_sizes=(), embedding=None, max_epochs=1, patience=None, weight_decay=0
        ).validate()
        Network(hidden_layer_sizes=np.array([8, 4]), callbacks=()).validate()
        Boosting(max_iter=1, max_leaf_nodes=2, max_features=1, l2_regularization=0).validate()


class TestResolve:
    def test_names(self):
        default = Network(batch_size=17)
        assert resolve_energy_model("auto", default) is default
        for name, expected in {
            "boosting": Boosting(),
            "mlp": Network(embedding="piecewise_linear"),
            "periodic": Network(embedding="periodic"),
        }.items():
            resolved = resolve_energy_model(name, default)
            assert type(resolved) is type(expected)
            assert resolved.get_params() == expected.get_params()
            resolved.set_params(learning_rate=9.0)  # no object is shared between estimators
            assert resolve_energy_model(name, default).learning_rate == "auto"

    @pytest.mark.parametrize(
        "module", [MyModule, MyModule(D), factory, partial(factory, width=2), lambda n: None]
    )
    def test_modules(self, module):
        resolved = resolve_energy_model(module, Boosting())
        assert isinstance(resolved, Network)
        assert resolved.module is module

    def test_module_class_with_get_params(self):
        class Both(MyModule):
            def get_params(self):
                return {}

        for module in (Both, Both(D)):
            assert resolve_energy_model(module, Boosting()).module is module

    @pytest.mark.parametrize(
        "energy_model",
        [
            Network(batch_size=3),
            Boosting(max_iter=3),
            LogisticRegression(),
            HistGradientBoostingClassifier(),
            make_pipeline(StandardScaler(), LogisticRegression()),
            GridSearchCV(RandomForestClassifier(), {"max_depth": [2, 3]}),
        ],
    )
    def test_as_it_is(self, energy_model):
        assert resolve_energy_model(energy_model, Boosting()) is energy_model

    @pytest.mark.parametrize(
        "energy_model",
        ["trees", None, 3, RandomForestRegressor(), StandardScaler(), RBF(), [Network()]],
    )
    def test_refuses_anything_else(self, energy_model):
        with pytest.raises(ValueError, match="energy_model must be") as raised:
            resolve_energy_model(energy_model, Boosting())
        words = ("auto", "boosting", "mlp", "periodic", "Network", "Boosting", "torch.nn.Module")
        assert all(word in str(raised.value) for word in (*words, "classifier", "got"))

    @pytest.mark.parametrize("cls", [Network, Boosting, RandomForestClassifier])
    def test_class_instead_of_instance(self, cls):
        with pytest.raises(ValueError, match=rf"is a class; pass an instance, {cls.__name__}\(\)"):
            resolve_energy_model(cls, Boosting())


class Estimator(EnergyModelMixin, BaseEstimator):
    """Fits nothing; its score says which settings arrived."""

    def __init__(self, energy_model="auto", smoothing=0.0):
        self.energy_model = energy_model
        self.smoothing = smoothing

    def fit(self, X, y=None):
        self.energy_model.validate()
        return self

    def score(self, X, y=None):
        model = self.energy_model
        if isinstance(model, Boosting):
            return -model.max_iter
        return sum(model.hidden_layer_sizes) + getattr(model, "module__width", 0)


class TestSearch:
    X = np.zeros((6, 2))

    def search(self, estimator, grid):
        return GridSearchCV(estimator, grid, cv=2, error_score="raise").fit(self.X)

    def test_settings_of_a_network(self):
        sizes = [(8,), (16, 16), (4, 4)]
        grid = {"energy_model__hidden_layer_sizes": sizes, "smoothing": [0.0, 0.1]}
        search = self.search(Estimator(Network()), grid)
        assert search.best_params_["energy_model__hidden_layer_sizes"] == (16, 16)
        assert search.best_estimator_.energy_model.hidden_layer_sizes == (16, 16)
        assert search.estimator.energy_model.hidden_layer_sizes == (128, 128)

    @pytest.mark.parametrize(
        "energy_model", [Network(MyModule), Network(MyModule, module__width=1)]
    )
    def test_arguments_of_a_module(self, energy_model):
        search = self.search(Estimator(energy_model), {"energy_model__module__width": [4, 32, 16]})
        assert search.best_estimator_.energy_model.module__width == 32
        assert getattr(energy_model, "module__width", 1) == 1

    def test_settings_of_boosting_and_whole_energies(self):
        search = self.search(Estimator(Boosting()), {"energy_model__max_iter": [300, 100]})
        assert search.best_params_ == {"energy_model__max_iter": 100}
        search = self.search(Estimator(), {"energy_model": [Boosting(), Network()]})
        assert repr(search.best_params_["energy_model"]) == "Network()"

    def test_energy_and_its_settings_at_once(self):
        estimator = Estimator()
        estimator.set_params(energy_model=Network(), energy_model__batch_size=7)
        assert estimator.energy_model.batch_size == 7
        assert estimator.get_params()["energy_model__batch_size"] == 7

    def test_parameters_of_a_classifier(self):
        estimator = Estimator(LogisticRegression()).set_params(energy_model__C=2.0)
        assert estimator.energy_model.C == 2.0


class TestEnergyWithoutParameters:
    @pytest.mark.parametrize(
        ("energy_model", "what", "instead"),
        [
            ("auto", "'auto' is a name", "Network() (or Boosting())"),
            ("boosting", "'boosting' is a name", "Boosting()"),
            ("mlp", "'mlp' is a name", "Network(embedding='piecewise_linear')"),
            ("periodic", "'periodic' is a name", "Network(embedding='periodic')"),
            ("trees", "'trees' is a name", "Network() (or Boosting())"),
            (MyModule, "MyModule is a bare module", "Network(MyModule)"),
            (MyModule(D), "MyModule is a bare module", "Network(MyModule)"),
            (factory, "factory is a bare module", "Network(factory)"),
            (Network, "Network is a class", "Network()"),
            (
                RandomForestClassifier,
                "RandomForestClassifier is a class",
                "RandomForestClassifier()",
            ),
            (None, "None has no parameters", "Network() (or Boosting())"),
        ],
    )
    def test_says_what_to_pass(self, energy_model, what, instead):
        estimator = Estimator(energy_model)
        with pytest.raises(ValueError, match="and search its parameters") as raised:
            estimator.set_params(smoothing=0.5, energy_model__hidden_layer_sizes=(8,))
        assert f"energy_model={what}" in str(raised.value)
        assert f"has no parameters; pass energy_model={instead} and" in str(raised.value)
        assert estimator.smoothing == 0.0

    def test_name_that_is_set_in_the_same_call(self):
        with pytest.raises(ValueError, match="'mlp' is a name"):
            Estimator(Network()).set_params(energy_model="mlp", energy_model__batch_size=7)

    def test_other_parameters_are_set(self):
        assert Estimator().set_params(smoothing=0.5, energy_model="mlp").energy_model == "mlp"
        with pytest.raises(ValueError, match="Invalid parameter 'energy'"):
            Estimator().set_params(energy=3)
