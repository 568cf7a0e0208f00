r"""Contrastive objectives: telling data from noise teaches a density.

The letters of all three functions. A model :math:`\tilde p = q e^f` (not normalised), a noise
distribution :math:`p_n`, and the *log-ratio* :math:`r(x) = \log \tilde p(x) - \log p_n(x)`, so that

- a tilt of a base that is its own noise has :math:`r = f` (``log q`` cancels);
- a pure energy has :math:`r = f - \log p_n`.

Log-ratios come in with the samples on the last axis; leading axes (one per member of an ensemble)
are free, and ``log_partition`` has exactly those leading axes. The losses are to be minimised.

The two-sample objectives return a pair ``(data, noise)``, one value per sample, whose *means add
up* to the objective: ``data.mean(-1) + noise.mean(-1)``. Weights, ablations and tests of variance
need nothing else.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["nce_losses", "ranking_nce_losses", "self_normalized_losses"]


def nce_losses(
    log_ratio_data: Tensor,
    log_ratio_noise: Tensor,
    log_partition: Tensor,
    noise_ratio: float = 1.0,
) -> tuple[Tensor, Tensor]:
    r"""Binary noise-contrastive estimation with a learned log Z.

    A sample is data with log-odds :math:`r - \log Z - \log \nu`. In log-sum-exp form the losses are

    .. math::
        \mathrm{LSE}(r, \log Z + \log\nu) - r \quad\text{(data)}, \qquad
        \nu\,[\mathrm{LSE}(r, \log Z + \log\nu) - \log Z - \log\nu] \quad\text{(noise)},

    which at :math:`\nu = 1` is the loss of Gutmann and Hyvärinen (2010).

    Parameters
    ----------
    log_ratio_data : Tensor of shape (..., n_data)
        Log-ratios at the data.
    log_ratio_noise : Tensor of shape (..., n_noise)
        Log-ratios at the noise samples.
    log_partition : Tensor of shape (...)
        The learned log Z, a parameter like any other.
    noise_ratio : float, default=1.0
        :math:`\nu`, noise samples per data row *in the objective*. The number of samples that
        estimates the mean over the noise may differ: it changes the variance, not the objective.

    Returns
    -------
    data : Tensor of shape (..., n_data)
        Losses of the data.
    noise : Tensor of shape (..., n_noise)
        Losses of the noise, already multiplied by ``noise_ratio``.

    See Also
    --------
    ranking_nce_losses : Without a learned log Z.
    self_normalized_losses : A bound on the likelihood in place of a classifier.
    skebm.NCEDensity : Trains with it.

    References
    ----------
    Gutmann, M. and Hyvärinen, A. (2010). Noise-contrastive estimation: a new estimation principle
    for unnormalized statistical models. AISTATS. https://proceedings.mlr.press/v9/gutmann10a.html

    Examples
    --------
    >>> import torch
    >>> from skebm.objectives import nce_losses
    >>> zeros = torch.zeros(3)  # f = 0, and the noise is the base
    >>> data, noise = nce_losses(zeros, zeros, torch.tensor(0.0))
    >>> data, noise  # the classifier can only guess: log 2
    (tensor([0.6931, 0.6931, 0.6931]), tensor([0.6931, 0.6931, 0.6931]))
    """
    threshold = (log_partition + math.log(noise_ratio)).unsqueeze(-1)
    # -logsigmoid(a - b) is LSE(a, b) - a; softplus would cut its tail off at 2e-9
    data = -logsigmoid(log_ratio_data - threshold)
    noise = -noise_ratio * logsigmoid(threshold - log_ratio_noise)
    return data, noise


def ranking_nce_losses(log_ratio_data: Tensor, log_ratio_noise: Tensor) -> Tensor:
    r"""Ranking noise-contrastive estimation: which of these m + 1 rows is the data?

    The loss of a data row with log-ratio :math:`r_0` among noise rows :math:`r_1 \dots r_m` is

    .. math:: \mathrm{LSE}(r_0, r_1, \dots, r_m) - r_0 .

    No log Z is learned: it cancels. With growing m the gradient tends to that of the negative
    log-likelihood.

    Parameters
    ----------
    log_ratio_data : Tensor of shape (..., n_data)
        Log-ratios at the data.
    log_ratio_noise : Tensor of shape (..., n_data, m) or (..., 1, m)
        Log-ratios at the rivals of each data row; with 1 in the last axis but one, every data row
        competes with the same m noise rows (many rivals at the price of few evaluations).

    Returns
    -------
    Tensor of shape (..., n_data)
        Losses, ``log(m + 1)`` each when f is zero and the noise is the base.

    See Also
    --------
    nce_losses : Binary, with a learned log Z.
    self_normalized_losses : A bound on the likelihood.

    References
    ----------
    Ma, Z. and Collins, M. (2018). Noise contrastive estimation and negative sampling for
    conditional models: consistency and statistical efficiency. EMNLP.
    https://aclanthology.org/D18-1405/

    Examples
    --------
    >>> import torch
    >>> from skebm.objectives import ranking_nce_losses
    >>> data, rivals = torch.tensor([0.0, 5.0]), torch.zeros(1, 9)
    >>> ranking_nce_losses(data, rivals)  # log 10 where the row looks like its rivals
    tensor([2.3026, 0.0589])
    """
    rivals = torch.logsumexp(log_ratio_noise, dim=-1)
    return torch.logaddexp(log_ratio_data, rivals) - log_ratio_data


def self_normalized_losses(
    log_ratio_data: Tensor, log_ratio_noise: Tensor, log_partition: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Self-normalised likelihood: a lower bound on the log-likelihood, linear in Z.

    Because :math:`\log Z \le c + e^{-c} Z - 1` for every c, with equality at
    :math:`c = \log Z`, and :math:`Z = E_{p_n} e^r`, minus the bound splits into

    .. math:: c - r \quad\text{(data)}, \qquad e^{r - c} - 1 \quad\text{(noise)},

    unbiased for any number of noise samples (a logarithm of a mean would not be). Minimised over c
    it is the negative log-likelihood (relative to :math:`p_n`).

    Parameters
    ----------
    log_ratio_data : Tensor of shape (..., n_data)
        Log-ratios at the data.
    log_ratio_noise : Tensor of shape (..., n_noise)
        Log-ratios at the noise samples.
    log_partition : Tensor of shape (...)
        The learned c.

    Returns
    -------
    data : Tensor of shape (..., n_data)
        Losses of the data.
    noise : Tensor of shape (..., n_noise)
        Losses of the noise. They grow exponentially in f: a spiky f diverges here before it does
        in the other objectives.

    See Also
    --------
    nce_losses : A classifier in place of the bound.
    ranking_nce_losses : The same without a learned log Z.

    References
    ----------
    Senetaire, H., Jeha, P., Mattei, P.-A. and Frellsen, J. (2025). Learning energy-based models by
    self-normalising the likelihood. https://arxiv.org/abs/2503.07021

    Examples
    --------
    >>> import torch
    >>> from skebm.objectives import self_normalized_losses
    >>> ones = torch.ones(3)  # log-ratios of 1 everywhere: log Z is 1
    >>> data, noise = self_normalized_losses(ones, ones, torch.tensor(1.0))
    >>> data.mean() + noise.mean()
    tensor(0.)
    >>> data, noise = self_normalized_losses(ones, ones, torch.tensor(0.0))
    >>> data.mean() + noise.mean()  # any other c is worse
    tensor(0.7183)
    """
    c = log_partition.unsqueeze(-1)
    return c - log_ratio_data, torch.expm1(log_ratio_noise - c)
