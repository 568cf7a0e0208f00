"""
An energy of your own, and one that is kept
===========================================

A torch module can be the tilt. It is worth writing where you know something about the rows that
trees and a plain network would have to learn. Here, rows lie on rings, and the module sees nothing
but the radius.
"""

# %%
# The module
# ----------
# It maps rows to one number each; a larger one means more likely. What it sees are the columns made
# nearly standard normal, clipped to five standard deviations.

import matplotlib.pyplot as plt
import numpy as np
import torch

from skebm import NCEDensity, Network
from skebm.datasets import Rings
from skebm.plotting import DensityDisplay, TrainingCurveDisplay


class Radial(torch.nn.Module):
    """A function of the radius alone: sines and cosines of it, and a perceptron."""

    def __init__(self, n_features, width=64, n_frequencies=4):
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1.0, n_frequencies + 1))
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(2 * n_frequencies, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, width),
            torch.nn.SiLU(),
            torch.nn.Linear(width, 1),
        )

    def forward(self, z):
        phase = z.norm(dim=1, keepdim=True) * self.frequencies
        return self.layers(torch.cat([phase.sin(), phase.cos()], dim=1))


rings = Rings()
X = rings.sample(1000, random_state=0)
fresh = rings.sample(5000, random_state=1)

# %%
# On a Gaussian base
# ------------------
# Everything but mean and covariance is left to the module. ``summary`` says that it was kept.

gaussian = {"base": "gaussian", "n_members": 2, "random_state": 0}
own = NCEDensity(energy_model=Network(Radial), **gaussian).fit(X)
print(own.summary())
assert own.accepted_ == "tilt"

figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 4), sharex=True, sharey=True, layout="constrained"
)
base = NCEDensity(energy_model=None, **gaussian).fit(X)
DensityDisplay.from_estimator(base, X, grid_resolution=120, ax=left)
DensityDisplay.from_estimator(own, X, grid_resolution=120, ax=right)
left.set_title("the base, one Gaussian")
_ = right.set_title("tilted by a function of the radius")

# %%
# How good is it?
# ---------------
# Divergence from the truth, in nats, beside the two energies that come with the package.


def divergence(model):
    gap = rings.log_density(fresh) - model.score_samples(fresh)
    return gap.mean(), gap.std() / len(gap) ** 0.5


kl = {"base": divergence(base), "own": divergence(own)}
for name in ("boosting", "periodic"):
    kl[name] = divergence(NCEDensity(energy_model=name, **gaussian).fit(X))
for name, (value, error) in kl.items():
    print(f"{name:<10} {value:.3f} +- {error:.3f}")
assert kl["own"][0] < kl["base"][0] - 0.7

# %%
# On the default base
# -------------------
# A stack of mixtures and kernel densities knows most of a ring already. What the module adds is
# small, and still more than two standard errors.

best = NCEDensity(energy_model=Network(Radial), n_members=2, random_state=0).fit(
    X
)
print(best.summary())
print(f"divergence {divergence(best)[0]:.3f}")
assert best.accepted_ == "tilt"
assert divergence(best)[0] < min(value for value, _ in kl.values())

# %%
# When training ends
# ------------------
# After every epoch the likelihood of held-out rows is measured; the best state is kept. A curve
# that falls from the start says that the learning rate is too high, or that nothing is to be
# learned.

_ = TrainingCurveDisplay.from_estimator(own)

# %%
# Settings of the module are searched like those of any network:
# ``NCEDensity(energy_model=Network(Radial))`` has the parameters
# ``energy_model__module__width`` and ``energy_model__learning_rate``. What to do when a module is
# rejected is in :ref:`own_energy`.

assert np.isfinite(own.history_["held_out_log_likelihood"]).any()
