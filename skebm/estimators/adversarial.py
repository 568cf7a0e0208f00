"""Adversarial training with a bound on log Z."""

from collections.abc import Callable
from dataclasses import field
from functools import partial
from numbers import Real
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from skebm._sklearn_compat import Interval, StrOptions
from skebm._threads import limit_threads
from skebm._typing import FloatArray, RandomState
from skebm.energies import Network
from skebm.partition import rows_by_importance
from skebm.training import Recipe
from skebm.training.adversarial import settled_generator, train_adversarially

from ._base import parameters
from ._generators import FlowDensity, ImplicitSampler
from ._tilted import TiltedDensity

GENERATOR_MALA_STEPS = 100


@parameters
class AdversarialEBM(TiltedDensity):
    r"""Normalised density from a game of an energy with a generator: no chains, no noise to choose.

    .. math:: \log p(x) = \log q_0(x) + f(x) - \log Z \quad\text{(nats, in the units of X)}

    q_0 is a normalizing flow fitted by maximum likelihood. The energy raises f at the rows and
    lowers it at samples of a generator g, which follows the model: it raises

    .. math:: E_g [f + \log q_0] + H(g) \le \log Z,

    a bound on log Z that is tight where g is the model [1]_. As in :class:`~skebm.NCEDensity`,
    log Z is measured afterwards, the estimator is the mean of `n_members` cross-fitted members, and
    f is kept only if the held-out likelihood gains by more than two standard errors; that is a test
    and no guarantee that new rows gain. By the same rule a generator that is a flow, and has become
    a better density than both, is the model in their place.

    Parameters
    ----------
    generator : {"flow", "implicit"}, default="flow"
        "flow": starts as q_0; its entropy is exact. "implicit": a network of noise, z = g(u) +
        sigma eps, quick to sample; its entropy is estimated from below, with the posterior of u
        sampled by importance (:class:`skebm.bases.ImplicitGenerator`): for few columns.
    generator_learning_rate : float or "auto", default="auto"
        "auto" is 5e-4 for flows and 1e-3 for implicit generators.
    gradient_penalty : float, default=0.05
        Weight of the mean of the squared gradient of f, at the rows and at the samples of the
        generator. With less of it f cuts deeper, until the generator cannot follow any more.
    flow : str, zuko flow or callable, default="coupling"
        What the base, and a generator that is a flow, are: "coupling", or with zuko installed one
        of "nsf", "maf", "nice" and "gf", a flow of zuko without context, or a callable that makes
        one from n_features.
    base : {"flow"} or None, default="flow"
        None is the pure energy-based model, exp(f) / Z with a confining Gaussian of three standard
        deviations.
    energy_model : str, Network, torch.nn.Module, callable or None, default="auto"
        What f is in the game, and how it is trained. "periodic" ("auto"): a network on periodic
        embeddings of the columns, :class:`~skebm.Network`; its `batch_size` is also that of the
        flow. "mlp": a network on piecewise-linear embeddings. A torch module (instance, or a class
        or factory called with n_features), (n, n_features) -> (n,) or (n, 1), which is copied and
        never trained itself. None: no game, the flow alone. Settings such as
        ``energy_model__learning_rate`` are searched where a `Network` is given. Energies see
        Gaussianised columns clipped to five standard deviations.
    n_members : int, default=4
        Members of the cross-fitted ensemble. 1 is the plain model with a validation split.
    n_partition_samples : int or "auto", default="auto"
        Samples per member for log Z. "auto" draws until its standard error is below 0.01 nats, and
        anneals where the effective sample size stays below one per cent.
    recalibration : bool, default=True
        Whether the factor on f, and the weights of separate modes where training hardly sees them,
        are set by held-out likelihood after training; what does not help there is left out.
    smoothing : float or "scott", default=0.0
        h > 0 fits the density of X + h eps, eps normal with the standard deviations of the columns.
        "scott" is n^(-1 / (d + 4)). Density estimation wants 0.
    contamination : float or "auto", default="auto"
        Share of the training rows that `predict` and `fit_predict` call outliers; rows with the
        score at which the share ends are none, so that with ties it is less. "auto" takes the
        threshold from out-of-fold scores instead, so that 5 % of *new* rows of the same
        distribution fall below it.
    device : str, default="auto"
        "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", "mps". Networks train, and the
        model scores and samples, on the device; all else is fitted on the CPU.
    n_jobs : int or None, default=None
        Candidates of the base, and members, that are fitted side by side by joblib: in threads, or
        where ``joblib.parallel_config`` says. None is as many as that says, one within a search
        that runs side by side itself, and elsewhere ``torch.get_num_threads()``; -1 is all cores.
        The result is the same to the bit. The networks of all members train as one, and take the
        threads of torch.
    memory : None, str or object with the joblib.Memory interface, default=None
        Used to cache bases and trained energies, so that fits to the same rows with the same seed
        share what their settings have in common, as those of a search do (:ref:`searches`). A
        string is the path of the directory; by default, nothing is cached. It acts only where
        `random_state` is given.
    random_state : int, RandomState instance or None, default=None
        An int makes fits bit-identical on one machine.
    warm_start : bool, default=False
        Whether a second `fit` keeps flow and columns, and goes on from the trained energies.
        The generator starts anew, and settles on the model at the end all the same.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    generator_ : object
        The generator after the game, with `sample` in the units of X; a flow also has
        `score_samples` and `score`.
    log_partition_bound_ : ndarray of shape (n_members,)
        The lower bound on log Z of the fitted model that the generator gives, in nats. How far it
        lies below `log_partition_` is the divergence from the generator to the model (and, for
        implicit generators, what their entropy is underestimated by).
    log_partition_bound_std_error_ : ndarray of shape (n_members,)
        Its standard error.
    log_partition_ : ndarray of shape (n_members,)
        Measured log Z of every member, in nats; 0 where no tilt was accepted.
    log_partition_std_error_ : ndarray of shape (n_members,)
        Its standard error.
    effective_sample_size_ : ndarray of shape (n_members,)
        Effective number of samples behind log Z (where it was annealed: of importance samples that
        would give the same error); inf where log Z is exact.
    history_ : dict of ndarrays
        ``n_iter``, ``held_out_log_likelihood`` (nats per row, out of fold, before recalibration;
        the first entry is the base) and ``train_loss`` (minus the value of the game and the
        penalty; no likelihood, because the bound moves).
    training_log_ : list of dict
        What skorch's callbacks see of the training, one dict per epoch; its ``batches`` are filled
        only where there are callbacks, and times are left out. ``History(training_log_)`` of
        ``skorch.history`` is indexed as skorch's own. Only where networks were trained.
    n_iter_ : int
        Epochs of the state kept; 0 if none was accepted.
    accepted_ : str
        What was kept: "tilt"; "recalibration", the base with its modes weighted anew and no energy;
        "base"; or "flow" or "generator", where a game has made a better density of one.
    held_out_gain_ : float
        Gain of the held-out log-likelihood over the base, in nats per row: of what was accepted, or
        of the tilt that was rejected; 0 where training found none.
    held_out_gain_std_error_ : float
        Its standard error; a tilt is accepted where the gain is more than twice that.
    offset_ : float
        Threshold of `predict` on `score_samples`.
    out_of_fold_offset_ : float
        Threshold of `fit_predict` on `out_of_fold_scores_`: `offset_`, or where `contamination` is
        a number, what that share of these scores lies below.
    out_of_fold_scores_ : ndarray of shape (n_rows,)
        Log-density of every training row (of positive weight) under the member that has not seen
        it; NaN for rows that were never held out (with one member, beyond 50,000 per member, or in
        a large table of which `fit` looks at a sample).
        This, and not `score_samples`, ranks the rows of the training table itself.
    out_of_fold_members_ : ndarray of shape (n_rows,), int
        Which member that is; -1 for rows that were never held out.
    out_of_fold_decision_function_ : ndarray of shape (n_rows,)
        `out_of_fold_scores_` above `out_of_fold_offset_`, negative for what `fit_predict` calls an
        outlier, and comparable between rows that have values in different columns.
    model_ : torch.nn.Module
        The fitted density on standardised columns.
    n_features_in_ : int
        Number of columns seen in `fit`.
    feature_names_in_ : ndarray of shape (`n_features_in_`,)
        Names of the columns, where X had any.

    See Also
    --------
    FlowContrastiveDensity : A game with a discriminator; usually the better density.
    NCEDensity : No game at all; usually the better density still.

    References
    ----------
    .. [1] Grathwohl, W., Kelly, J., Hashemi, M., Norouzi, M., Swersky, K. and Duvenaud, D. (2021).
           No MCMC for me: amortized sampling for fast and stable training of energy-based models.
           ICLR.

    Examples
    --------
    >>> from skebm import AdversarialEBM, Network
    >>> from skebm.datasets import make_two_moons
    >>> X = make_two_moons(n_samples=400, random_state=0)
    >>> network = Network(max_epochs=5)
    >>> density = AdversarialEBM(energy_model=network, n_members=1, random_state=0).fit(X)
    >>> density.score_samples(X[:2]).shape
    (2,)
    >>> density.generator_.sample(3, random_state=0).shape
    (3, 2)
    """

    generator: Literal["flow", "implicit"] = "flow"
    generator_learning_rate: float | Literal["auto"] = "auto"
    gradient_penalty: float = 0.05
    flow: str | nn.Module | Callable[..., nn.Module] = "coupling"
    base: Literal["flow"] | None = "flow"

    # what a fit sets
    generator_: FlowDensity | ImplicitSampler = field(init=False)
    log_partition_bound_: FloatArray = field(init=False)
    log_partition_bound_std_error_: FloatArray = field(init=False)

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **TiltedDensity._parameter_constraints,
        "generator": [StrOptions({"flow", "implicit"})],
        "generator_learning_rate": [
            StrOptions({"auto"}),
            Interval(Real, 0, None, closed="neither"),
        ],
        "gradient_penalty": [Interval(Real, 0, None, closed="left")],
        "flow": [str, callable, nn.Module],
        "base": [StrOptions({"flow"}), None],
    }

    def _recipe(self) -> Recipe:
        network = self._resolve_energy_model(Network(), network_only=True)
        train = None
        if network is not None:
            train = partial(
                train_adversarially, network=network, kind=self.generator,
                generator_learning_rate=self.generator_learning_rate,
                gradient_penalty=self.gradient_penalty,
            )  # fmt: skip
        return self._basic_recipe(
            train, flow=self.flow, finish=self._results,
            flow_batch_size=(network or Network()).batch_size,
        )  # fmt: skip

    def _results(self, task, trained, model):
        """The generator as it follows the fitted model, and the bound that it gives."""
        settled = settled_generator(task, trained, model, self.generator)
        kind = ImplicitSampler if settled.is_implicit else FlowDensity
        return {
            "generator_": kind(task.columns, *settled.parts),
            "log_partition_bound_": settled.bound.numpy(),
            "log_partition_bound_std_error_": settled.bound_std_error.numpy(),
        }

    @torch.inference_mode(False)
    def sample(
        self,
        n_samples: int = 1,
        random_state: RandomState = None,
        *,
        n_steps: int | None = None,
        start: Literal["base", "generator"] = "base",
        output: Literal["auto", "array"] = "auto",
        given: Any = None,
    ) -> Any:
        """Draw new rows from the model.

        Parameters
        ----------
        n_samples : int, default=1
        random_state : int, RandomState instance or None, default=None
            An int gives the same rows at every call.
        n_steps : int, default=None
            Steps of the Metropolis-adjusted Langevin algorithm under the model, from the start. By
            default 100 from an implicit generator, whose draws nothing else corrects, and 0
            otherwise.
        start : {"base", "generator"}, default="base"
            "base": rows that the base proposes, kept by their importance. "generator": rows that
            the generator proposes; those of a flow are kept by their importance, too, those of an
            implicit generator have no density and are taken as they are.
        output : {"auto", "array"}, default="auto"
            "auto" is a frame where `fit` was given one.
        given : mapping or None, default=None
            Cells by the names of their columns (the numbers of an array): the others are drawn
            given these, as by :meth:`condition`, whatever `n_steps` and `start` are.

        Returns
        -------
        DataFrame or ndarray of shape (n_samples, n_features)
            In random order. For the draws of the generator as they are, see `generator_`.
        """
        if given is not None:
            return super().sample(n_samples, random_state, output=output, given=given)
        if start not in ("base", "generator"):
            raise ValueError(f"start={start!r} must be 'base' or 'generator'.")
        implicit = start == "generator" and isinstance(
            getattr(self, "generator_", None), ImplicitSampler
        )
        if n_steps is None:
            n_steps = GENERATOR_MALA_STEPS if implicit else 0
        if start == "base":
            return super().sample(n_samples, random_state, n_steps=n_steps, output=output)
        rng = self._sampling_rng(random_state, n_samples=n_samples, n_steps=n_steps)
        if implicit:
            rows = self.generator_.sample(n_samples, rng.initial_seed())
        else:
            rows = self._rows_by_importance(n_samples, rng.initial_seed())
        x = self._tensor(rows)
        with limit_threads(1):
            x = self._walk(x, n_steps, rng)
        return self._restored(x, output, rng)

    def _rows_by_importance(self, n, seed):
        """Rows of a generator that is a flow, kept as `sample` keeps those of the base."""
        rng = np.random.RandomState(seed % 2**32)

        def propose(n):
            rows = self.generator_.sample(n, rng)
            log_weights = self._log_density(rows) - self.generator_.score_samples(rows)  # pyright: ignore[reportAttributeAccessIssue]
            weights = torch.as_tensor(np.exp(log_weights - log_weights.max()))
            return torch.as_tensor(rows)[None], (weights / weights.mean())[None]

        def uniform(shape):
            return torch.as_tensor(rng.random_sample(shape))

        (rows,) = rows_by_importance(propose, torch.tensor([n]), uniform)
        return rng.permutation(rows.numpy())
