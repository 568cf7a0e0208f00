"""Contrastive divergence: maximum likelihood, with samples in place of log Z."""

from torch import Tensor

__all__ = ["contrastive_divergence_losses"]


def contrastive_divergence_losses(
    f_data: Tensor, f_chains: Tensor, energy_regularization: float = 0.0
) -> tuple[Tensor, Tensor]:
    r"""Contrastive divergence (Hinton 2002), for chains of any origin.

    The gradient of the log-likelihood of :math:`q e^f / Z` is that of the mean of f over the data
    minus its mean over the model. With chains in place of the model it is minus the gradient of

    .. math:: -f + \alpha f^2 \quad\text{(data)}, \qquad f + \alpha f^2 \quad\text{(chains)},

    averaged over each and added up. Chains are data to the loss: whatever moved them is not
    differentiated. Started at the rows and moved k steps they make it CD-k; carried on from step to
    step, persistent contrastive divergence (Tieleman 2008).

    **The value means nothing.** It estimates no likelihood and can rise while the model improves:
    it is zero at the base, zero at the solution, and anything in between. Watch the held-out
    likelihood.

    Parameters
    ----------
    f_data : Tensor of shape (..., n_data)
        f, minus the residual energy, at the data.
    f_chains : Tensor of shape (..., n_chains)
        f at the chains.
    energy_regularization : float, default=0.0
        :math:`\alpha`, which keeps f from drifting to where chains cannot follow (Du & Mordatch
        2019, equation 4).

    Returns
    -------
    data : Tensor of shape (..., n_data)
    chains : Tensor of shape (..., n_chains)

    See Also
    --------
    skebm.samplers.run : Moves the chains.
    nce_losses : Draws of the noise in place of chains.

    References
    ----------
    Hinton, G. (2002). Training products of experts by minimizing contrastive divergence. Neural
    Computation 14(8).

    Tieleman, T. (2008). Training restricted Boltzmann machines using approximations to the
    likelihood gradient. ICML.

    Du, Y. and Mordatch, I. (2019). Implicit generation and modeling with energy-based models.
    NeurIPS. https://arxiv.org/abs/1903.08689

    Examples
    --------
    >>> import torch
    >>> from skebm.objectives import contrastive_divergence_losses
    >>> data, chains = contrastive_divergence_losses(torch.tensor([1.0, 3.0]), torch.tensor([0.5]))
    >>> data.mean() + chains.mean()
    tensor(-1.5000)
    """
    alpha = energy_regularization
    return alpha * f_data.square() - f_data, alpha * f_chains.square() + f_chains
