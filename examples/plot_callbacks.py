"""
Callbacks of skorch
===================

Networks are trained by skorch, and ``Network(callbacks=[...])`` takes its callbacks: learning rate
schedules, early stopping, checkpoints, and yours.
"""

# %%
# A schedule, a clock, and one of our own
# ---------------------------------------
# A callback may watch ``valid_loss``, minus the gain on held-out rows in nats per row, and write
# into the history. This one writes how large the weights are.

import matplotlib.pyplot as plt
import numpy as np
from skorch.callbacks import Callback, EpochTimer, LRScheduler
from torch.optim.lr_scheduler import CosineAnnealingLR

from skebm import NCEDensity, Network
from skebm.datasets import Pinwheel


class SizeOfWeights(Callback):
    """Write the norm of all parameters into the history of every epoch."""

    def on_epoch_end(self, net, **kwargs):
        squares = [p.detach().square().sum() for p in net.module_.parameters()]
        net.history.record("size", float(sum(squares)) ** 0.5)


pinwheel = Pinwheel()
X = pinwheel.sample(800, random_state=0)
n_epochs = 60
network = Network(
    max_epochs=n_epochs,
    patience=15,
    learning_rate=1e-2,
    callbacks=[
        SizeOfWeights(),
        LRScheduler(CosineAnnealingLR, T_max=n_epochs),
        EpochTimer(),
    ],
)
density = NCEDensity(
    base="gaussian", energy_model=network, n_members=2, random_state=0
).fit(X)

# %%
# What they saw
# -------------
# ``training_log_`` is a list with one dict for every epoch, as skorch's history is. The learning
# rate rises for some epochs, as in every training here, and then goes by the schedule.

print(density.summary())
print(sorted(density.training_log_[-1]))

log = density.training_log_
curves = {
    "train_loss": "training loss",
    "size": "size of the weights",
    "event_lr": "learning rate",
}
figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
for ax, (key, label) in zip(axes, curves.items(), strict=True):
    ax.plot([epoch[key] for epoch in log], color="#5b3b8c")
    ax.set(xlabel="epoch", ylabel=label)

rates = np.array([epoch["event_lr"] for epoch in log])
assert (np.diff(rates[10:]) <= 0).all()
assert rates[-1] < 1e-4
assert all(epoch["size"] > 0 for epoch in log)
assert density.accepted_ == "tilt"

# %%
# What is refused
# ---------------
# ``EpochScoring`` scores predictions, and an energy makes none. It is refused by name, and not
# ignored.

from skorch.callbacks import EpochScoring

try:
    scoring = Network(callbacks=[EpochScoring("accuracy")])
    NCEDensity(energy_model=scoring, n_members=1).fit(X)
except ValueError as error:
    message = str(error)
    print(message)
assert "EpochScoring" in message
