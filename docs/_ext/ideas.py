"""Small pictures of ideas, for chapters that the gallery has none for.

Each is drawn in a second or so when a build begins, and is narrow, so that its text can be read on
a phone.
"""

import math
from pathlib import Path

import numpy as np

INK, OURS, OTHER, THIRD = "#5b6472", "#5b3b8c", "#c45f1d", "#2a9d8f"


def _normal(x, mean, std):
    return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


def draw_nce(figure):
    """The log-odds of a classifier are a log-ratio of densities."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import SplineTransformer

    rng = np.random.default_rng(0)
    n = 2000
    x = rng.choice([-1.5, 1.5], n) + 0.6 * rng.standard_normal(n)
    noise = x.std() * rng.standard_normal(n)
    splines = SplineTransformer(n_knots=10, extrapolation="linear")
    classifier = make_pipeline(splines, LogisticRegression(C=10.0, max_iter=1000))
    classifier.fit(np.concatenate([x, noise])[:, None], np.repeat([1, 0], n))
    grid = np.linspace(-3.5, 3.5, 200)
    truth = 0.5 * (_normal(grid, -1.5, 0.6) + _normal(grid, 1.5, 0.6))
    above, below = figure.subplots(2, sharex=True, height_ratios=[1, 1.2])
    bins = np.linspace(-3.5, 3.5, 50)
    above.hist(x, bins, color=OURS, alpha=0.6, label="rows")
    above.hist(noise, bins, color=INK, histtype="step", linewidth=1.5, label="noise")
    above.set_ylabel("count")
    below.plot(grid, np.log(truth / _normal(grid, 0, x.std())), color=INK, ls="--")
    below.plot(grid, classifier.decision_function(grid[:, None]), color=OURS)
    below.lines[0].set_label("log-ratio of densities")
    below.lines[1].set_label("log-odds of the classifier")
    below.set(xlabel="x", ylabel="nats", ylim=(-5, 2))
    return [above, below]


def draw_score(figure):
    """Two weights, one score."""
    x = np.linspace(-6, 6, 400)
    above, below = figure.subplots(2, sharex=True)
    for weight, color, style in ((0.5, INK, "--"), (0.9, OURS, "-")):
        parts = weight * _normal(x, -3, 0.8), (1 - weight) * _normal(x, 3, 0.8)
        p = sum(parts)
        score = (parts[0] * (-3 - x) + parts[1] * (3 - x)) / 0.64 / p
        label = f"weights {weight:g} and {1 - weight:.1f}"
        above.plot(x, p, style, color=color, label=label)
        below.plot(x, score, style, color=color)
    above.set_ylabel("density")
    below.set(xlabel="x", ylabel="score")
    return [above, below]


def draw_log_z(figure):
    """Importance sampling before and after draws have met the density."""
    rng = np.random.default_rng(1)
    mean, std = 4.2, 0.2
    draws = rng.standard_normal(100_000)
    log_w = -0.5 * ((draws - mean) / std) ** 2 - math.log(std) + 0.5 * draws**2
    sizes = np.unique(np.geomspace(30, len(draws), 60).astype(int))
    value, error = [], []
    for m in sizes:
        w = np.exp(log_w[:m] - log_w[:m].max())
        value.append(math.log(w.mean()) + log_w[:m].max())
        error.append(math.sqrt(max(0.0, (w**2).sum() / w.sum() ** 2 - 1 / m)))
    value, error = np.array(value), np.array(error)
    above, below = figure.subplots(2, height_ratios=[1, 1.3])
    x = np.linspace(-4, 6, 400)
    above.plot(x, _normal(x, 0, 1), color=INK, ls="--", label="proposal q")
    above.plot(x, _normal(x, mean, std), color=OURS, label="density p")
    few = draws[:300]
    above.plot(few, np.full(len(few), -0.1), "|", color=INK, markersize=8, label="300 draws of q")
    above.set(xlabel="x", ylabel="density", ylim=(-0.25, None))
    below.fill_between(sizes, value - 2 * error, value + 2 * error, color=OURS, alpha=0.25, lw=0)
    below.plot(sizes, value, color=OURS, label="by draws, ± 2 errors")
    below.axhline(0, color=INK, ls=":", label="the truth")
    below.set(xscale="log", xlabel="draws of q", ylabel="log Z (nats)")
    below.set_yscale("symlog", linthresh=1)
    return [above, below]


def draw_kinks(figure):
    """A second derivative does not see the kinks of a ReLU network."""
    import torch

    from skebm.derivatives import derivatives

    z = torch.linspace(-3, 3, 401)[:, None]
    panels = figure.subplots(3, sharex=True)
    for function, label, color, style in (
        (torch.nn.functional.silu, "SiLU: smooth", OURS, "-"),
        (torch.nn.functional.relu, "ReLU: kinks at -1 and 1", OTHER, "--"),
    ):
        with torch.no_grad():
            curves = derivatives(lambda z, s=function: (s(2 * z - 2) + s(-2 * z - 2)).sum(-1), z)
        for ax, curve in zip(panels, curves, strict=True):
            ax.plot(z[:, 0], curve.reshape(-1), style, color=color, label=label)
    for ax, name in zip(panels, ("f", "gradient", "Laplacian"), strict=True):
        ax.set_ylabel(name)
    panels[-1].set_xlabel("z")
    return panels


def draw_copies(figure):
    """Held-out copies flatter a narrow bandwidth."""
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neighbors import KernelDensity

    rng = np.random.default_rng(0)
    x = rng.choice([-1.5, 1.5], 300)[:, None] + 0.6 * rng.standard_normal((300, 1))
    copies = x[rng.integers(0, 300, 300)]
    widths = np.geomspace(0.005, 1, 25)
    folds = KFold(5, shuffle=True, random_state=0)
    ax = figure.subplots()
    for rows, label, color, style in (
        (copies, "a bootstrap sample, with its copies", OTHER, "--"),
        (np.unique(copies, axis=0), "the same rows, each once", OURS, "-"),
    ):
        score = [
            cross_val_score(KernelDensity(bandwidth=h), rows, cv=folds).sum() / len(rows)
            for h in widths
        ]
        ax.plot(widths, score, style, color=color, label=label)
        best = int(np.argmax(score))
        ax.plot(widths[best], score[best], "o", color=color)
    ax.set(xscale="log", xlabel="bandwidth", ylabel="held-out log-density (nats)")
    ax.set_ylim(-4, None)
    return [ax]


def draw_tails(figure):
    """The tail of a column beyond its outer quantile."""
    from scipy.stats import t

    from skebm import NCEDensity

    rows = t(2).rvs((3000, 1), random_state=0)
    est = NCEDensity(energy_model=None, n_members=2, random_state=0).fit(rows)
    x = np.geomspace(1, 300, 200)
    ax = figure.subplots()
    ax.plot(x, t(2).logpdf(x), color=INK, ls="--", label="truth, Student's t")
    ax.plot(x, est.score_samples(x[:, None]), color=OURS, label="skebm")
    middle = np.quantile(rows, [0.159, 0.841])
    log_normal = np.log(_normal(x[x < 20], middle.mean(), (middle[1] - middle[0]) / 2))
    ax.plot(x[x < 20], log_normal, color=OTHER, ls=":", label="a Gaussian")
    beyond = np.sort(rows[rows > np.quantile(rows, 0.99)])
    ax.plot(beyond, np.full(len(beyond), -19.0), "|", color=INK, markersize=9)
    ax.lines[-1].set_label("the largest 1 % of rows")
    ax.set(xscale="log", xlabel="x", ylabel="log-density (nats)", ylim=(-20, 0))
    return [ax]


def draw_devices(figure):
    """What of a fit computes where."""
    ax = figure.subplots()
    stages = {
        "bases": 0,
        "trees, classifiers": 0,
        "networks, games": 1,
        "threshold": 0,
        "score_samples, sample": 1,
    }
    for i, (stage, on_device) in enumerate(stages.items()):
        ax.barh(i, 1, left=on_device, color=OURS if on_device else "#c9ced6", height=0.66)
        color = "white" if on_device else "black"
        ax.text(0.5 + on_device, i, stage, ha="center", va="center", color=color)
    ax.axhline(3.5, color=INK, linewidth=1, ls="--")
    ax.set(xlim=(0, 2), xticks=[0.5, 1.5], xticklabels=["on the CPU", "on the device"])
    ax.set_yticks([1.5, 4], ["fit", "use"])
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.invert_yaxis()
    ax.spines[:].set_visible(False)
    return []


def draw_floors(figure):
    """How often each floor of a fit is fitted in the search of the page."""
    ax = figure.subplots()
    floors = ["bases, folds", "energies", "recalibration, log Z,\nthreshold"]
    place = np.arange(3)
    for shift, counts, label, color in (
        (0.2, [4, 4, 4], "without memory", "#b9bfc8"),
        (-0.2, [1, 2, 4], "with memory", OURS),
    ):
        bars = ax.barh(place + shift, counts, 0.36, color=color, label=label)
        ax.bar_label(bars, padding=3)
    ax.set_yticks(place, floors)
    ax.set(xlabel="fits per fold, of four candidates", xlim=(0, 4.6))
    return [ax]


def draw_three(figure):
    """Three densities of one column."""
    from sklearn.mixture import GaussianMixture
    from sklearn.model_selection import GridSearchCV
    from sklearn.neighbors import KernelDensity

    from skebm import NCEDensity
    from skebm.datasets import Claw

    truth = Claw()
    rows, x = truth.sample(1000, random_state=0), np.linspace(-3, 3, 600)
    panels = figure.subplots(3, sharex=True)
    kernels = GridSearchCV(KernelDensity(), {"bandwidth": np.geomspace(0.03, 1, 15)})
    mixture = GridSearchCV(GaussianMixture(random_state=0), {"n_components": [1, 2, 4, 6, 8, 12]})
    ours = NCEDensity(n_members=2, random_state=0)
    fresh = truth.sample(10_000, random_state=1)
    models = {"KernelDensity": kernels, "GaussianMixture": mixture, "NCEDensity": ours}
    for ax, (name, model) in zip(panels, models.items(), strict=True):
        model.fit(rows)
        model = getattr(model, "best_estimator_", model)
        gap = (truth.log_density(fresh) - model.score_samples(fresh)).mean()
        ax.plot(x, np.exp(truth.log_density(x[:, None])), color=INK, ls="--", label="truth")
        ax.plot(x, np.exp(model.score_samples(x[:, None])), color=OURS, label="estimate")
        ax.set_title(f"{name}: {gap:.3f} nats from the truth", fontsize=9, loc="left")
        ax.set_ylabel("density")
    panels[-1].set_xlabel("x")
    return panels


def draw_stored(figure):
    """A kernel density is its rows."""
    from sklearn.neighbors import KernelDensity

    rows = np.random.default_rng(3).normal(size=(12, 1))
    x = np.linspace(-3.6, 4.2, 500)
    ax = figure.subplots()
    kernels = [_normal(x, row, 0.25) / len(rows) for row in rows[:, 0]]
    for kernel in kernels:
        ax.fill_between(x, kernel, color=OURS, alpha=0.18, lw=0)
    density = np.exp(KernelDensity(bandwidth=0.25).fit(rows).score_samples(x[:, None]))
    ax.plot(x, density, color=OURS, label="the stored density")
    ax.plot(rows, np.full(len(rows), -0.02), "|", color=INK, markersize=12, label="the rows in it")
    ax.set(xlabel="x", ylabel="density")
    return [ax]


def draw_units(figure):
    """One distribution in two units: log-densities differ, and so do peaks."""
    x = np.linspace(0.02, 6, 500)
    z = np.log(x)
    of_z = _normal(z, 0.3, 0.6)
    panels = figure.subplots(2)
    for ax, where, density, name in (
        (panels[0], x, of_z / x, "x (centimetres)"),
        (panels[1], z, of_z, "log x"),
    ):
        ax.plot(where, density, color=OURS)
        ax.fill_between(where, density, color=OURS, alpha=0.15, lw=0)
        for row, color, marker in ((0.7, OTHER, "o"), (2.8, THIRD, "s")):
            i = np.abs(x - row).argmin()
            label = f"x = {row}: {np.log(density[i]):.2f} nats"
            ax.plot(where[i], density[i], marker, color=color, label=label)
        ax.set(xlabel=name, ylabel="density", ylim=(0, 0.8))
    return panels


def draw_energies(figure):
    """Trees and networks tilt one Gaussian towards a step and a bump."""
    from skebm import Boosting, NCEDensity, Network

    rng = np.random.default_rng(0)
    n = 1500
    bump = rng.random(n) < 0.4
    rows = np.where(bump, 2 + 0.25 * rng.standard_normal(n), rng.uniform(-2, 0.5, n))[:, None]
    x = np.linspace(-3, 3.5, 500)
    truth = 0.4 * _normal(x, 2, 0.25) + 0.6 * ((x > -2) & (x < 0.5)) / 2.5
    energies = {
        "trees": Boosting(),
        "a network on periodic embeddings": Network(
            embedding="periodic", learning_rate=1e-2, max_epochs=100
        ),
    }
    panels = figure.subplots(len(energies), sharex=True)
    for ax, (name, energy) in zip(panels, energies.items(), strict=True):
        est = NCEDensity(base="gaussian", energy_model=energy, n_members=2, random_state=0)
        est.fit(rows)
        ax.plot(x, truth, color=INK, ls="--", label="truth")
        base = np.exp(est.base_score_samples(x[:, None]))
        ax.plot(x, base, color=OTHER, ls=":", label="base")
        ax.plot(x, np.exp(est.score_samples(x[:, None])), color=OURS, label="model")
        ax.set_title(name, loc="left")
        ax.set_ylabel("density")
    panels[-1].set_xlabel("x")
    return panels


PICTURES = {
    draw_nce: 3.6,
    draw_score: 3.4,
    draw_log_z: 4.2,
    draw_kinks: 4.0,
    draw_copies: 2.9,
    draw_tails: 3.0,
    draw_devices: 2.8,
    draw_floors: 2.4,
    draw_three: 4.6,
    draw_stored: 2.6,
    draw_units: 3.8,
    draw_energies: 4.0,
}
"""The functions, with the heights of their figures in inches."""


def draw(app):
    import matplotlib.pyplot as plt

    folder = Path(app.srcdir, "generated")
    folder.mkdir(exist_ok=True)
    for picture, height in PICTURES.items():
        with plt.rc_context({"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 9}):
            figure = plt.figure(figsize=(4.8, height), layout="constrained")
            told = []
            for ax in picture(figure):
                ax.spines[["top", "right"]].set_visible(False)
                labels = ax.get_legend_handles_labels()[1]
                if labels and labels != told:
                    _legend(figure, ax, labels)
                told = told or labels
            figure.savefig(folder / f"idea_{picture.__name__[5:]}.png", dpi=180)
            plt.close(figure)


def _legend(figure, ax, labels):
    """Above the axes, or above all of them where these have titles: where no data are."""
    n_columns = 3 if sum(map(len, labels)) < 30 else 2 if max(map(len, labels)) < 30 else 1
    style = {"frameon": False, "handlelength": 1.6, "columnspacing": 1.2, "ncols": n_columns}
    if ax.get_title(loc="left"):
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper left", **style)
    else:
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, **style)


def setup(app):
    app.connect("builder-inited", draw)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
