"""A scikit-learn transformer that trains a VAE, for pipelines and grid searches."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags, check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from pyro_vae.core.component import evaluating
from pyro_vae.core.device import derive_seed, seeded
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import above_zero, whole
from pyro_vae.data.rows import mask_nan, rows_for
from pyro_vae.data.spread import units_for
from pyro_vae.data.values import Data, validate_unmasked
from pyro_vae.evidence.estimate import log_evidence
from pyro_vae.likelihoods import Likelihood
from pyro_vae.nn import mlp
from pyro_vae.posteriors import DiagNormal, Posterior
from pyro_vae.priors import Prior, StandardNormal
from pyro_vae.train.fit import fit
from pyro_vae.train.trial import default_batch_size
from pyro_vae.use.makers import class_of, count_outputs, learned_normal

STEPS, PASSES = 1000, 10
"""The smallest number of steps and of passes over the data, if ``epochs`` is not given."""

AT_ONCE = 4096
"""The number of rows that are encoded or decoded at a time."""

NUMBERS = (np.float64, np.float32)
"""The types of X that the VAE uses too; other types are converted to the first one."""


class VAETransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """A VAE with the interface of scikit-learn, which transforms rows to posterior means.

    .. math:: \\texttt{transform}: x \\mapsto \\mathbb E_{q(z|x)} z, \\qquad
        \\texttt{inverse\\_transform}: z \\mapsto \\mathbb E_{p(x|z)} x, \\qquad
        \\texttt{score\\_samples}: x \\mapsto \\log p(x)

    ``score`` is the mean of log p(x) in nats, so that a grid search compares numbers of latents, components and epochs
    by held-out evidence. NaN in X marks a missing value: it is left out of the likelihood, and the encoder sees the
    mean of its column (0 without ``standardize``). The VAE has the precision of X, float64 or float32.

    All methods are deterministic after ``fit``. ``transform`` and ``inverse_transform`` treat rows independently;
    ``score_samples`` is a Monte-Carlo estimate, whose draws for a row depend on the other rows. It therefore fails two
    checks of :func:`sklearn.utils.estimator_checks.check_estimator`, which :func:`expected_failed_checks` lists.

    Args:
        n_components: the number of latents.
        hidden: the widths of the encoder's hidden layers; the decoder has them in reverse order.
        prior: a class of :mod:`pyro_vae.priors`, or a partial of one, called with the number of latents
            (:class:`~pyro_vae.priors.VampPrior` with the data); by default StandardNormal.
        likelihood: a class of :mod:`pyro_vae.likelihoods`, or a partial of one, called with the decoder network; by
            default a Normal with a learned scale.
        posterior: a class of :mod:`pyro_vae.posteriors`, or a partial of one, called with the encoder network; by
            default DiagNormal.
        epochs: passes over the data; by default enough for 1000 steps, and at least 10.
        batch_size: rows per step; by default as in :func:`pyro_vae.fit`.
        learning_rate: of Adam.
        standardize: whether the networks see standardized values; densities stay in the units of the data.
        num_particles: draws per row for log p(x), at least 2.
        device: ``"auto"`` selects CUDA if available, else the CPU.
        random_state: the source of the seed of the weights, the order of the rows and all draws: an integer, a
            ``RandomState``, or None for a different result each time.
        verbose: whether to show a progress bar during training.

    Attributes:
        vae_: the trained :class:`~pyro_vae.VAE`.
        fit_: the result of :func:`pyro_vae.fit`, with the history.
        seed_: the seed of this training, drawn from ``random_state``.
        n_features_in_: the number of columns of X.
        feature_names_in_: the names of the columns of X, if it has names.

    References:
        | API design for machine learning software (Buitinck et al., 2013), https://arxiv.org/abs/1309.0238

    Example:
        >>> x = np.random.default_rng(0).normal(size=(60, 2)) @ [[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]
        >>> model = VAETransformer(n_components=2, hidden=(8,), epochs=5, random_state=0).fit(x)
        >>> z = model.transform(x)
        >>> z.shape, model.inverse_transform(z).shape, model.score_samples(x).shape
        ((60, 2), (60, 3), (60,))
        >>> list(model.get_feature_names_out())
        ['vaetransformer0', 'vaetransformer1']
    """

    def __init__(
        self,
        n_components: int = 8,
        *,
        hidden: Sequence[int] = (128,),
        prior: Callable[[Any], Prior] | None = None,
        likelihood: Callable[[nn.Module], Likelihood] | None = None,
        posterior: Callable[[nn.Module], Posterior] | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        learning_rate: float = 1e-3,
        standardize: bool = True,
        num_particles: int = 500,
        device: str | torch.device = "auto",
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.n_components = n_components
        self.hidden = hidden
        self.prior = prior
        self.likelihood = likelihood
        self.posterior = posterior
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.standardize = standardize
        self.num_particles = num_particles
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train a VAE.

        Args:
            X: shape ``(datum, feature)``, at least 2 rows; NaN for missing.
            y: ignored.

        Raises:
            DataError: if a value is outside the support of the likelihood, or a row has no observed value.
            SettingsError: if a setting is out of its range.
        """
        data = self._data(X, reset=True, least=2)
        latents, rows = whole("n_components", self.n_components, 1), len(data.x)
        rate = above_zero("learning_rate", self.learning_rate)
        batch_size = default_batch_size(rows) if self.batch_size is None else whole("batch_size", self.batch_size, 1)
        epochs = self.epochs if self.epochs is not None else max(PASSES, -(-STEPS // -(-rows // batch_size)))
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        with seeded(derive_seed(seed, "weights"), torch.device("cpu")):
            vae = _vae_of(
                data, latents, self.hidden, self.prior or StandardNormal, self.likelihood or learned_normal,
                self.posterior or DiagNormal, standardize=self.standardize,
            ).to(data.x.dtype)  # fmt: skip
        self.fit_ = fit(
            vae, data, epochs=epochs, batch_size=batch_size, seed=seed, progress=bool(self.verbose), device=self.device,
            optimizer=partial(torch.optim.Adam, lr=rate, fused=True),
        )  # fmt: skip
        self.vae_, self.seed_, self._n_features_out = vae, seed, latents
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Return the posterior mean of each row, shape ``(datum, n_components)``.

        Args:
            X: shape ``(datum, feature)``, NaN for missing.
        """
        rows = rows_for(self.vae_, self._data(X)).like(self.vae_)
        return self._in_pieces(lambda part: self.vae_.posterior(part).mean, rows)

    def inverse_transform(self, X: Any) -> np.ndarray:
        """Return the mean of p(x|z) of each row of latents, shape ``(datum, feature)``.

        Args:
            X: latents, shape ``(datum, n_components)``.
        """
        check_is_fitted(self)
        latents = Rows(torch.from_numpy(check_array(X, dtype=NUMBERS, copy=True))).like(self.vae_)
        # There are no rows to decode to; the likelihood uses only their number and width.
        blank = torch.zeros(1, self.n_features_in_).to(latents.x)
        return self._in_pieces(lambda z: self.vae_.likelihood(z.x, Rows(blank.expand(len(z), -1))).mean, latents)

    def score_samples(self, X: Any) -> np.ndarray:
        """Estimate log p(x) of each row by importance weighting, in nats, shape ``(datum,)``.

        ``pyro_vae.log_evidence(model.vae_, X)`` and ``pyro_vae.score`` also return its Monte-Carlo error and k̂.

        Args:
            X: shape ``(datum, feature)``, NaN for missing.
        """
        data, seed = self._data(X), derive_seed(self.seed_, "log p(x)")
        found = log_evidence(self.vae_, data, num_particles=self.num_particles, seed=seed)
        values: np.ndarray = found.log_evidence.values.astype(np.float64)
        return values

    def score(self, X: Any, y: Any = None) -> float:
        """Return the mean of log p(x) over rows, in nats.

        Args:
            X: shape ``(datum, feature)``, NaN for missing.
            y: ignored.
        """
        return float(self.score_samples(X).mean())

    def _data(self, X: Any, *, reset: bool = False, least: int = 1) -> Data:
        """Validate X as scikit-learn does, and return it with the names of its columns and a mask of missing values."""
        if not reset:
            check_is_fitted(self)
        validate_unmasked(X, "X")
        x = validate_data(
            self, X, reset=reset, dtype=NUMBERS, ensure_all_finite="allow-nan", ensure_min_samples=least, copy=True
        )
        names = getattr(self, "feature_names_in_", None)
        data = Data(torch.from_numpy(x), columns=None if names is None else [*map(str, names)], source="X")
        return mask_nan(data) if np.isnan(x).any() else data

    @torch.no_grad()
    def _in_pieces(self, function: Callable[[Rows], Tensor], rows: Rows) -> np.ndarray:
        with evaluating(self.vae_, min(AT_ONCE, len(rows))):
            found = torch.cat([function(part).flatten(1).cpu() for part in rows.split(AT_ONCE)])
        array: np.ndarray = found.numpy()
        return array

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def expected_failed_checks(estimator: VAETransformer) -> dict[str, str]:
    """List the checks of scikit-learn that fail by design, with the reason.

    Args:
        estimator: any estimator; the checks are the same for all.

    Example:
        >>> list(expected_failed_checks(VAETransformer()))
        ['check_methods_sample_order_invariance', 'check_methods_subset_invariance']
    """
    reason = "score_samples is a Monte-Carlo estimate, whose draws for a row depend on the other rows"
    return dict.fromkeys(["check_methods_sample_order_invariance", "check_methods_subset_invariance"], reason)


def _vae_of(
    data: Data,
    latents: int,
    hidden: Sequence[int],
    prior: Callable[[Any], Prior],
    likelihood: Callable[[nn.Module], Likelihood],
    posterior: Callable[[nn.Module], Posterior],
    *,
    standardize: bool,
) -> VAE:
    """Build a VAE with these components, with networks as wide as the components need."""
    features, widths = data.x.shape[1], list(hidden)
    made_prior = prior(data if getattr(class_of(prior), "takes_data", False) else latents)
    decoder = likelihood(mlp(latents, widths[::-1], count_outputs(likelihood, features)))
    encoder = posterior(mlp(features, widths, count_outputs(posterior, latents)))
    units = units_for(decoder, data) if standardize else None
    return VAE(prior=made_prior, decoder=decoder, encoder=encoder, standardize=units)
