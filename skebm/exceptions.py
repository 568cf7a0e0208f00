"""What can go wrong while fitting, and while loading what was fitted."""

__all__ = ["DivergenceError", "InconsistentVersionWarning", "LowEffectiveSampleSizeWarning"]


class DivergenceError(ArithmeticError):
    """Training produced a loss that is not a finite number; the message says what to lower.

    See Also
    --------
    LowEffectiveSampleSizeWarning : A doubt about log Z, and no error.

    Examples
    --------
    >>> import numpy as np
    >>> from skebm import NCEDensity, Network
    >>> from skebm.exceptions import DivergenceError
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> network = Network(learning_rate=1e30, max_epochs=3)
    >>> try:
    ...     NCEDensity(energy_model=network, n_members=1, random_state=0).fit(X)
    ... except DivergenceError:
    ...     print("a smaller learning rate would help")
    a smaller learning rate would help
    """


class LowEffectiveSampleSizeWarning(UserWarning):
    """An importance-sampling estimate rests on too few samples for its error to be trusted.

    See Also
    --------
    skebm.partition.LogPartition : Its `ess` is the size in question.
    DivergenceError : Training that failed.

    Examples
    --------
    To stop at a log Z that rests on too few samples, make the warning an error:

    >>> import warnings
    >>> import numpy as np
    >>> from skebm import NCEDensity
    >>> from skebm.exceptions import LowEffectiveSampleSizeWarning
    >>> X = np.random.default_rng(0).normal(size=(200, 2))
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", LowEffectiveSampleSizeWarning)
    ...     est = NCEDensity(energy_model=None, n_members=1, random_state=0).fit(X)
    """


class InconsistentVersionWarning(UserWarning):
    """A fitted estimator was stored by another version of skebm than the one that loads it.

    See Also
    --------
    skebm.TRUSTED_TYPES : For a store that runs no code but ours.

    Examples
    --------
    To refuse what another version has stored, make the warning an error:

    >>> import pickle
    >>> import warnings
    >>> from skebm import NCEDensity
    >>> from skebm.exceptions import InconsistentVersionWarning
    >>> stored = pickle.dumps(NCEDensity())
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", InconsistentVersionWarning)
    ...     est = pickle.loads(stored)
    """
