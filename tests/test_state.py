"""Modules as arrays, without an estimator."""

import copy
import pickle

import joblib
import numpy as np
import pytest
import torch
from torch import nn

from skebm._state import from_arrays, to_arrays
from skebm.bases import (
    GaussianMixtureBase,
    StackedBase,
    TorchDistributionBase,
    build_flow,
)
from skebm.energies import MemberEnergies, ModuleStack, Network

X = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    """A module of a user."""

    def __init__(self, n_features):
        super().__init__()
        self.scale = nn.Parameter(torch.full((n_features,), 2.0))

    def forward(self, z):
        return (self.scale * z).sum(1)


def network(module=None, **settings):
    rows = [X.float(), X.float()]
    energy = Network(module, **settings).build(rows, embedding="piecewise_linear", seed=0)
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter += 0.1
    return energy.double()


def layers(n_features):
    return nn.Sequential(nn.Linear(n_features, 4), nn.BatchNorm1d(4), nn.SiLU(), nn.Linear(4, 1))


def flow(kind):
    return build_flow(kind, 2, 2, rng=torch.Generator().manual_seed(0)).double()


MODULES = {
    "mlp": lambda: network(hidden_layer_sizes=(8,)).eval(),
    "layers": lambda: network(layers).eval(),
    "user": lambda: network(Scaled),
    "coupling flow": lambda: flow("coupling"),
    "autoregressive flow": lambda: flow("autoregressive"),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_comes_back_as_it_was(name):
    module, x = MODULES[name](), X.expand(2, -1, -1)
    evaluate = nn.Module.__call__ if "flow" not in name else type(module).log_prob
    module.requires_grad_(name == "mlp")
    again = from_arrays(pickle.loads(pickle.dumps(to_arrays(module))))
    assert type(again) is type(module)
    assert torch.equal(evaluate(again, x), evaluate(module, x))
    for one, two in zip(module.modules(), again.modules(), strict=True):
        assert set(vars(one)) == set(vars(two))
        assert one.training == two.training
    ours, theirs = (
        {name: (p.requires_grad, p.dtype, p.shape) for name, p in m.named_parameters()}
        for m in (module, again)
    )
    assert ours == theirs
    assert module.state_dict().keys() == again.state_dict().keys()
    if name != "user":
        assert joblib.hash(to_arrays(again)) == joblib.hash(to_arrays(module))


def test_built_in_modules_are_made_of_arrays_alone():
    for name in ("mlp", "layers", "coupling flow", "autoregressive flow"):
        assert not any("module" in part for part in to_arrays(MODULES[name]()))
    inside = to_arrays(MODULES["user"]())
    assert [type(part["module"]) for part in inside if "module" in part] == [Scaled, Scaled]


def test_what_is_shared_stays_shared():
    base = GaussianMixtureBase([1.0], [[0.0, 0.0]], [[[1.0, 0.5], [0.5, 1.0]]])
    stack = from_arrays(to_arrays(StackedBase([base, base], [0.5, 0.5])))
    assert stack.components[0] is stack.components[1]
    members = MemberEnergies([nn.Linear(2, 1), nn.Linear(2, 1)])
    assert len(set(map(id, from_arrays(to_arrays(members)).members))) == 2


def test_what_arrays_cannot_say_is_kept():
    # a distribution of torch holds tensors outside of buffers, and so does a recurrent layer
    normal = torch.distributions.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    for module in (TorchDistributionBase(normal), nn.LSTM(2, 3).double()):
        again = from_arrays(pickle.loads(pickle.dumps(to_arrays(nn.ModuleList([module])))))[0]
        ours, theirs = (
            m.log_prob(X) if hasattr(m, "log_prob") else m(X)[0] for m in (module, again)
        )
        assert torch.equal(ours, theirs)
    coarse = nn.Linear(2, 1).bfloat16()  # numpy has no such numbers
    again = from_arrays(pickle.loads(pickle.dumps(to_arrays(coarse))))
    assert torch.equal(again.weight, coarse.weight)
    pytest.importorskip("zuko")
    flow = build_flow("maf", 2, rng=torch.Generator().manual_seed(0)).member(0)
    again = from_arrays(pickle.loads(pickle.dumps(to_arrays(flow))))
    assert torch.equal(again.log_prob(X), flow.log_prob(X))


def test_arrays_that_cannot_be_written_to_are_copied(recwarn):
    parts = copy.deepcopy(to_arrays(MODULES["mlp"]()))
    for part in parts:
        for array, _ in (*part["parameters"].values(), *part["buffers"].values()):
            array.flags.writeable = False
    x = X.expand(2, -1, -1)
    assert torch.equal(from_arrays(parts)(x), MODULES["mlp"]()(x))
    assert not recwarn.list


@pytest.mark.parametrize(
    "name", ["os.system", "skebm.NCEDensity", "torch.nn.modules.os", "skebm._state.importlib", ""]
)
def test_names_of_anything_else_than_modules_are_refused(name):
    parts = to_arrays(nn.Linear(1, 1))
    parts[0]["class"] = name
    with pytest.raises(ValueError, match="no module of skebm or torch"):
        from_arrays(parts)


def test_arrays_share_memory_so_that_copies_are_made_once():
    module = ModuleStack(nn.Linear(2, 1), 2)
    array, _ = to_arrays(module)[0]["parameters"]["gain"]
    assert np.shares_memory(array, module.gain.detach().numpy())
