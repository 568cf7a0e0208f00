"""
Digits from latent variables
============================

:class:`~skebm.ImplicitVAE` makes every row from a few latent variables, by a network. So it
can say what it remembers of a row, place rows in a plane, and draw new ones; and it measures
log p(x), with a standard error for each row. Here are the digits of scikit-learn, pictures
of 8 x 8 pixels.
"""

# %%
# Data, and a fit
# ---------------
# Grey levels are whole numbers from 0 to 16. A density of them could be made as high as one
# likes, so that each level is spread over the step above it.

import matplotlib.pyplot as plt
import numpy as np
from scipy.special import logsumexp
from scipy.stats import norm
from sklearn.datasets import load_digits
from sklearn.decomposition import FactorAnalysis
from sklearn.model_selection import train_test_split

from skebm import ImplicitVAE

X, y = load_digits(return_X_y=True)
X = (X + np.random.default_rng(0).random(X.shape)) / 17
X_train, X_test, y_train, y_test = train_test_split(
    X, y, test_size=0.25, random_state=0
)

# %%
# The ordinary, Gaussian encoder is the quicker one, and enough here.

vae = ImplicitVAE(n_components=12, encoder="gaussian", random_state=0).fit(
    X_train
)

# %%
# Factor analysis is the same with a linear decoder, and is where the training starts. Nats
# per picture, of rows held out:

log_density, std_error = vae.score_samples(X_test, return_std=True)
factors = FactorAnalysis(n_components=12).fit(X_train).score(X_test)
print(f"factor analysis  {factors:.2f}")
print(f"ImplicitVAE      {log_density.mean():.2f}")
print(f"std error of a row's log p(x), median: {np.median(std_error):.3f}")

# %%
# What it remembers, and what it makes up
# ---------------------------------------
# Twelve numbers stand for the 64 pixels. ``reconstruct`` goes from a row to these and back.
# ``sample`` draws them from their prior, and adds the noise of the pixels, which is a part
# of the density. The last line has other draws, as means without that noise.


def draw_row(axes, images, titles=None):
    """Show pictures side by side."""
    for j, (ax, image) in enumerate(zip(axes, images, strict=True)):
        ax.imshow(image.reshape(8, 8), cmap="Greys", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        if titles is not None:
            ax.set_title(titles[j], fontsize=9)


shown = X_test[[np.flatnonzero(y_test == digit)[0] for digit in range(10)]]
prior = np.random.default_rng(1).normal(size=(10, 12))
rows = {
    "rows": shown,
    "reconstructed": vae.reconstruct(shown),
    "samples": vae.sample(10, random_state=0),
    "means": vae.inverse_transform(prior),
}
figure, axes = plt.subplots(4, 10, figsize=(10, 4.4), layout="constrained")
for line, (name, images) in zip(axes, rows.items(), strict=True):
    draw_row(line, images)
    line[0].set_ylabel(name)

# %%
# Odd digits
# ----------
# The pictures of lowest and of highest density. The standard error is that of the
# integral over the latent variables; it says nothing of how good the model is.

order = np.argsort(log_density)
figure, axes = plt.subplots(2, 8, figsize=(10, 3.2), layout="constrained")
for line, chosen, name in zip(
    axes, (order[:8], order[-8:]), ("lowest", "highest"), strict=True
):
    titles = [f"{log_density[i]:.1f} ± {std_error[i]:.2f}" for i in chosen]
    draw_row(line, X_test[chosen], titles)
    line[0].set_ylabel(name)

# %%
# The lowest are easy to read. But they have ink near an edge where nearly all pictures have
# none. There the variance of the noise is small, and a dark pixel costs many nats. A low
# density tells what is rare, not what is hard to read.
#
# A plane of digits
# -----------------
# With two latent variables rows lie in a plane. ``transform`` places them there without
# having seen what digit they are. The normal distribution function makes the plane a square
# in which equal areas have equal probability. On the right the decoder walks over the same
# square.

# the default encoder; fewer epochs than the default
plane = ImplicitVAE(n_components=2, random_state=0, max_epochs=250).fit(X_train)
places = norm.cdf(plane.transform(X_test))

steps = (np.arange(10) + 0.5) / 10
grid = np.stack(np.meshgrid(steps, steps[::-1]), axis=-1).reshape(-1, 2)
decoded = plane.inverse_transform(norm.ppf(grid)).reshape(10, 10, 8, 8)
decoded = np.pad(decoded, ((0, 0), (0, 0), (1, 1), (1, 1)))  # space between

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5), layout="constrained")
for digit in range(10):
    own = places[y_test == digit]
    left.scatter(*own.T, s=14, color=plt.cm.tab10(digit), label=digit)
left.set(
    xlim=(0, 1), ylim=(0, 1), aspect="equal", title="posterior means",
    xlabel=r"$\Phi(z_1)$", ylabel=r"$\Phi(z_2)$",
)  # fmt: skip
figure.legend(loc="outside left center", handletextpad=0.1)
right.imshow(
    decoded.transpose(0, 2, 1, 3).reshape(100, 100),
    cmap="Greys", vmin=0, vmax=1, extent=(0, 1, 0, 1),
)  # fmt: skip
right.set(title="decoded", xlabel=r"$\Phi(z_1)$")
print(f"two latent variables: {plane.score(X_test):.2f} nats per picture")

# %%
# Is log p(x) right?
# ------------------
# In two dimensions the integral over z can be done on a fine grid. What was measured should
# differ from it by about its standard error.

shown = X_test[:40]
measured, error = plane.score_samples(shown, return_std=True)

ticks = np.linspace(-5, 5, 401)
z = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
scale = np.sqrt(plane.noise_variance_)
means = plane.inverse_transform(z) / scale
rows = shown / scale
squares = (rows**2).sum(1)[:, None] - 2 * rows @ means.T + (means**2).sum(1)
log_joint = norm.logpdf(z).sum(1) - 0.5 * squares
log_joint -= np.log(np.sqrt(2 * np.pi) * scale).sum()
exact = logsumexp(log_joint, axis=1) + 2 * np.log(ticks[1] - ticks[0])

figure, ax = plt.subplots(figsize=(8, 3), layout="constrained")
ax.errorbar(np.arange(40), measured - exact, yerr=error, fmt="o", ms=4)
ax.axhline(0, color="0.5", lw=1)
_ = ax.set(xlabel="row", ylabel="measured - exact (nats)")
print("mean log p(x), measured:", measured.mean().round(4))
print("mean log p(x), on a grid:", exact.mean().round(4))
print("root mean square of difference / std error:", end=" ")
print(np.sqrt((((measured - exact) / error) ** 2).mean()).round(2))
