"""Forecasts of series by a recurrent layer, and how good they are (``pip install 'fastlstm[sklearn]'``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self, cast

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, clone
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_array, check_is_fitted

from . import _checks, nn
from ._estimators import keep
from ._samples import Sequences
from ._types import Array
from .sklearn import RecurrentRegressor

__all__ = ["RecurrentForecaster", "Rolling", "last_value", "rolling_origin", "seasonal_naive"]


class _Beside(nn.Sequential):
    """A network of whole sequences, and beside it a linear layer of all their values: the sum of both outputs."""

    def __call__(self, x: ArrayLike, lengths: ArrayLike | None = None) -> Array:
        network, linear = self.modules
        return network(x) + linear(self._flat(x))

    def forward(self, x: ArrayLike, lengths: ArrayLike | None = None) -> tuple[Array, list[Any]]:
        network, linear = self.modules
        y, tape = network.forward(x)
        straight, flat = linear.forward(self._flat(x))
        return y + straight, [tape, flat]

    def backward(self, tape: list[Any], dy: ArrayLike, *, need_dx: bool = True) -> Array | None:
        dx, straight = (np.asarray(m.backward(t, dy, need_dx=need_dx)) for m, t in zip(self.modules, tape, strict=True))
        return dx + straight.reshape(dx.shape[1], dx.shape[0], -1).swapaxes(0, 1) if need_dx else None

    @staticmethod
    def _flat(x: ArrayLike) -> Array:
        """(T, N, D) as (N, T*D)."""
        return np.swapaxes(x, 0, 1).reshape(np.shape(x)[1], -1)


class _Quantiles(RecurrentRegressor):
    """Predicts quantiles of each target, trained by the pinball loss."""

    levels: Array
    autoregressive: bool

    def _joined(self, parts: list[nn.Module], X: Sequences) -> nn.Sequential:
        if not self.autoregressive:
            return super()._joined(parts, X)
        before = 1 if self.standardize else 0
        linear = nn.Linear(X.lengths[0] * X.features, self._outputs(), bias=False, dtype=X.dtype)
        linear.flat_params.fill(0)
        return nn.Sequential(*parts[:before], _Beside(nn.Sequential(*parts[before:]), linear))

    def _outputs(self) -> int:
        return len(self._mean) * len(self.levels)

    def _shaped(self, output: Array) -> Array:
        return output.reshape(len(output), -1, len(self.levels))

    def _loss(self, output: Array, target: Array, **weight: Array) -> tuple[float, Array]:
        loss, gradient = nn.quantile(self._shaped(output), target, self.levels, **weight)
        return loss, gradient.reshape(output.shape)

    def _predicted(self, output: Array) -> Array:
        return self._shaped(output) * self._deviation[:, None] + self._mean[:, None]


class RecurrentForecaster(BaseEstimator):
    """Forecast a series: a recurrent layer reads ``window`` values and gives quantiles of the next ``horizon``.

    Parameters
    ----------
    horizon : int
        Steps ahead; all of them come from one reading of the window.
    window : int
        Values that are read.
    season : int or None
        Steps of a season, 12 for months. Each value is then also read as its difference to that of a season before.
    difference : {None, "last", "season"}
        What is forecast: the values themselves; their differences to the last one read (a series with a trend); or to
        those of a season before.
    quantiles : sequence of float
        Between 0 and 1, with 0.5, which is what `predict` gives.
    autoregressive : bool
        Add a linear function of all values of the window to what the recurrent layer says (Lai et al. 2018): what is
        linear need not be learnt by gates.
    n_estimators : int
        Networks, from different weights, whose quantiles are averaged: worth it where series are short.
    cell, hidden_size, num_layers, dropout, layer_options, epochs, batch_size, learning_rate, schedule, weight_decay, \
    grad_clip, early_stopping, validation_fraction, patience, random_state, n_jobs, verbose
        As for `RecurrentClassifier`; a sequence is a window. With early_stopping windows are put aside at random.

    Attributes
    ----------
    networks_ : list
        Fitted regressors of windows; each has ``model_`` and ``history_``.

    Notes
    -----
    A series is an array (T,) without gaps; each is scaled by its mean and standard deviation, so that several of
    different sizes can be learnt together. Exogenous features are known ahead: holidays, prices, a weather forecast.
    Where series are short the network has seen their windows often and is too sure: look at the ``coverage`` of
    `rolling_origin` before you rely on an interval.

    The samples of scikit-learn's predictors are independent rows and those of a forecaster are not, so this has
    scikit-learn's parameters (`clone`, `set_params`), but is no regressor: `rolling_origin` is its cross-validation.

    Examples
    --------
    >>> import numpy as np
    >>> from fastlstm.forecast import RecurrentForecaster
    >>> y = np.sin(np.arange(300) / 5)
    >>> f = RecurrentForecaster(horizon=10, window=32, random_state=0).fit(y)
    >>> bool(abs(f.predict() - np.sin(np.arange(300, 310) / 5)).max() < 0.1)
    True
    """

    def __init__(
        self, horizon: int = 12, window: int = 24, *, season: int | None = None, difference: str | None = None,
        quantiles: Sequence[float] = (0.1, 0.5, 0.9), autoregressive: bool = True, n_estimators: int = 1,
        cell: str = "gru", hidden_size: int = 16, num_layers: int = 1, dropout: float = 0.0,
        layer_options: Mapping[str, Any] | None = None, epochs: int = 50, batch_size: int = 32,
        learning_rate: float = 1e-2, schedule: str | Callable[[float], float] = "one_cycle",
        weight_decay: float = 0.0, grad_clip: float | None = 1.0, early_stopping: bool = False,
        validation_fraction: float = 0.1, patience: int = 10, random_state: Any = None, n_jobs: int | None = None,
        verbose: int = 0,
    ) -> None:  # fmt: skip
        keep(self, locals())

    # the parameters that a network takes as they are
    _FOR_NETWORK = (
        "cell", "hidden_size", "num_layers", "dropout", "layer_options", "epochs", "batch_size", "learning_rate",
        "schedule", "weight_decay", "grad_clip", "early_stopping", "validation_fraction", "patience", "n_jobs",
        "verbose",
    )  # fmt: skip

    def fit(self, series: ArrayLike | Sequence[ArrayLike], exog: Any = None) -> Self:
        """Train on all windows of a series, or of several.

        Parameters
        ----------
        series : array (T,), or list of arrays (T_i,)
        exog : array (T, E), or list of arrays (T_i, E), optional
            Features of each step.
        """
        self._check()
        self._several = _is_list(series)
        rows, features = self._read(series, exog, 0)
        self._features = features[0].shape[1]
        self._moments = [_moments(row) for row in rows]
        parts = [self._windows(*pair) for pair in zip(rows, features, self._moments, strict=True)]
        X = np.concatenate([x for x, _ in parts])
        if not len(X):
            raise ValueError(f"series: expected at least {self._least + self.horizon} values, for one window and its "
                             f"horizon, got {max(map(len, rows))}")  # fmt: skip
        target = np.concatenate([t for _, t in parts])
        random_state = check_random_state(self.random_state)
        self.networks_ = []
        for _ in range(self.n_estimators):
            network = _Quantiles(
                random_state=random_state.randint(2**31 - 1),
                **{name: getattr(self, name) for name in self._FOR_NETWORK},
            )
            network.autoregressive = self.autoregressive
            network.levels = np.asarray(self.quantiles, float)
            if self.early_stopping:
                network.scoring = _pinball
            self.networks_.append(network.fit(X, target))
        self._series, self._exog = rows, features
        return self

    def predict(self, horizon: int | None = None, series: Any = None, exog: Any = None) -> Any:
        """The medians of the next steps.

        Parameters
        ----------
        horizon : int, optional
            At most that of the constructor, which is the default.
        series : array (T,) or list of arrays, optional
            What to go on from, at least ``window`` values (and a season); by default what `fit` was given.
        exog : array (T + horizon, E) or list of arrays, optional
            Features of the series and of the steps after it, as many as the constructor's horizon; without ``series``
            (horizon, E), of the latter alone.

        Returns
        -------
        forecast : ndarray (horizon,), or a list of them for a list
        """
        at = self._median()
        found = self.predict_quantiles(horizon, series, exog)
        return [q[:, at] for q in found] if isinstance(found, list) else found[:, at]

    def predict_quantiles(self, horizon: int | None = None, series: Any = None, exog: Any = None) -> Any:
        """The quantiles of the next steps, in the order of ``quantiles``.

        Parameters
        ----------
        horizon, series, exog
            As for `predict`.

        Returns
        -------
        quantiles : ndarray (horizon, Q), or a list of them for a list
        """
        check_is_fitted(self, "networks_")
        horizon = self.horizon if horizon is None else _checks.integer("horizon", horizon, 1, self.horizon)
        several = self._several if series is None else _is_list(series)
        rows, features = self._to_go_on(series, exog)
        moments = self._moments if series is None or not self._several else [_moments(row) for row in rows]
        moments = moments * len(rows) if len(moments) != len(rows) else moments
        out = []
        for row, extra, (mean, deviation) in zip(rows, features, moments, strict=True):
            if len(row) < self._least:
                raise ValueError(f"series: expected at least {self._least} values, got {len(row)}")
            scaled = (row - mean) / deviation
            x = self._encode(scaled, extra, np.array([len(row)]))
            q = np.mean([network.predict(x)[0] for network in self.networks_], axis=0)
            q = q + self._reference(scaled, np.array([len(row)]))[0][:, None]
            order = np.argsort(np.argsort(self.quantiles))
            q = np.sort(q, axis=1)[:, order]  # networks do not know that quantiles do not cross
            out.append((q * deviation + mean)[:horizon])
        return out if several else out[0]

    # ---- what stands in a window ----

    def _check(self) -> None:
        _checks.integer("horizon", self.horizon, 1)
        _checks.integer("window", self.window, 1)
        _checks.integer("n_estimators", self.n_estimators, 1)
        _checks.flag("autoregressive", self.autoregressive)
        if self.season is not None:
            _checks.integer("season", self.season, 1)
        if self.difference not in (None, "last", "season"):
            raise ValueError(f"difference: expected None, 'last' or 'season', got {self.difference!r}")
        if self.difference == "season" and self.season is None:
            raise ValueError("season: expected the steps of a season, for difference='season', got None")
        levels = np.asarray(self.quantiles, float)
        if levels.ndim != 1 or not ((levels > 0) & (levels < 1)).all() or 0.5 not in levels:
            raise ValueError(f"quantiles: expected numbers between 0 and 1, with 0.5, got {self.quantiles!r}")

    def _median(self) -> int:
        return int(list(self.quantiles).index(0.5))

    @property
    def _least(self) -> int:
        """Values that a forecast needs."""
        return int(self.window + (self.season or 0))

    def _windows(self, row: Array, extra: Array, moments: tuple[float, float]) -> tuple[Array, Array]:
        """All windows of a series (n, window, D), and what follows them (n, horizon)."""
        scaled = (row - moments[0]) / moments[1]
        ends = np.arange(self._least, len(row) - self.horizon + 1)
        after = scaled[ends[:, None] + np.arange(self.horizon)]
        return self._encode(scaled, extra, ends), after - self._reference(scaled, ends)

    def _encode(self, scaled: Array, extra: Array, ends: Array) -> Array:
        """The windows that end before these steps, as the network reads them, float32."""
        steps = ends[:, None] + np.arange(-self.window, 0)
        values = scaled[steps]
        if self.difference == "last":
            parts = [values - values[:, -1:]]
        elif self.difference == "season":
            parts = [values - scaled[ends[:, None] - np.arange(self.season, 0, -1)].mean(axis=1, keepdims=True)]
        else:
            parts = [values]
        if self.season is not None:
            parts.append(values - scaled[steps - self.season])
        windows = np.stack(parts, axis=-1)
        if self._features:  # of the step, and of the one that is forecast when the window has come to this step
            windows = np.concatenate([windows, extra[steps], extra[steps + self.horizon]], axis=-1)
        return windows.astype(np.float32)

    def _reference(self, scaled: Array, ends: Array) -> Array:
        """What forecasts are relative to, (n, horizon)."""
        if self.difference == "last":
            return np.repeat(scaled[ends - 1][:, None], self.horizon, axis=1)
        if self.difference == "season":
            return np.asarray(scaled[ends[:, None] - self.season + np.arange(self.horizon) % self.season])
        return np.zeros((len(ends), self.horizon))

    # ---- arguments ----

    def _read(self, series: Any, exog: Any, ahead: int) -> tuple[list[Array], list[Array]]:
        """Series and features, checked, each a list; features have ``ahead`` rows more."""
        many = _is_list(series)
        rows = [_values("series", row, 1)[:, 0] for row in (series if many else [series])]
        if exog is None:
            return rows, [np.zeros((len(row) + ahead, 0)) for row in rows]
        extras = [_values("exog", extra, 2) for extra in (exog if many else [exog])]
        if len(extras) != len(rows):
            raise ValueError(f"exog: expected one for each of {len(rows)} series, got {len(extras)}")
        for row, extra in zip(rows, extras, strict=True):
            if len(extra) != len(row) + ahead or extra.shape[1] != extras[0].shape[1]:
                expected = (len(row) + ahead, extras[0].shape[1])
                raise ValueError(f"exog: expected shape {expected}, got {extra.shape}")
        return rows, extras

    def _to_go_on(self, series: Any, exog: Any) -> tuple[list[Array], list[Array]]:
        """The series to go on from, and features of them and of the whole horizon."""
        if (exog is None) == (self._features > 0):
            expected = f"{self._features} features, as in fit" if self._features else "None, as in fit"
            raise ValueError(f"exog: expected {expected}, got {_checks.describe(exog)}")
        if series is not None:
            rows, extras = self._read(series, exog, self.horizon)
        else:
            rows = self._series
            extras = self._exog
            if exog is not None:
                ahead = [_values("exog", e, 2) for e in (exog if self._several else [exog])]
                shape = (self.horizon, self._features)
                if len(ahead) != len(rows) or any(e.shape != shape for e in ahead):
                    raise ValueError(f"exog: expected shape {shape} for each of {len(rows)} series, the steps ahead")
                extras = [np.concatenate(pair) for pair in zip(extras, ahead, strict=True)]
        if extras[0].shape[1] != self._features:
            raise ValueError(f"exog: expected {self._features} features, as in fit, got {extras[0].shape[1]}")
        return rows, extras


def _pinball(network: _Quantiles, X: Array, y: Array) -> float:
    """Minus the pinball loss in units of y, as scikit-learn's scorers have it."""
    return -nn.quantile(network.predict(X), y, network.levels)[0]


def _moments(row: Array) -> tuple[float, float]:
    return float(row.mean()), float(row.std()) or 1.0


def _is_list(series: Any) -> bool:
    return isinstance(series, (list, tuple)) and len(series) > 0 and np.ndim(series[0]) > 0


def _values(name: str, values: Any, ndim: int) -> Array:
    """Finite float64 of 1 or 2 axes, as (T, .)."""
    values = np.asarray(values)
    if values.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} {'axis' if ndim == 1 else 'axes'}, got shape {values.shape}")
    rows = values[:, np.newaxis] if ndim == 1 else values
    return np.asarray(check_array(rows, dtype=np.float64, input_name=name))


class Rolling(NamedTuple):
    """Forecasts from several origins, beside what came.

    Attributes
    ----------
    origins : ndarray (k,)
        Index of the first step that is forecast.
    truth, forecast : ndarray (k, horizon)
    quantiles : ndarray (k, horizon, Q) or None
        Of a `RecurrentForecaster`.
    """

    origins: Array
    truth: Array
    forecast: Array
    quantiles: Array | None

    @property
    def mae(self) -> float:
        """Mean absolute error over origins and steps."""
        return float(abs(self.forecast - self.truth).mean())

    @property
    def rmse(self) -> float:
        """Root of the mean squared error over origins and steps."""
        return float(np.sqrt(np.square(self.forecast - self.truth).mean()))

    @property
    def coverage(self) -> Array:
        """Share of the truth below each quantile, which is to be the quantile itself."""
        if self.quantiles is None:
            raise ValueError("quantiles: expected those of a RecurrentForecaster, got None")
        return np.asarray((self.truth[..., None] <= self.quantiles).mean(axis=(0, 1)))


def rolling_origin(
    method: RecurrentForecaster | Callable[[Array], ArrayLike], series: ArrayLike, horizon: int, origins: int = 20,
    step: int = 1, *, exog: ArrayLike | None = None, refit_every: int = 1,
) -> Rolling:  # fmt: skip
    """Forecast the end of a series again and again, each time from what came before.

    Parameters
    ----------
    method : RecurrentForecaster, or function
        A forecaster is cloned and fitted on what stands before the origin. A function is given that and returns
        ``horizon`` values.
    series : array (T,)
    horizon : int
    origins : int
        The last one is ``horizon`` steps before the end.
    step : int
        Steps from one origin to the next.
    exog : array (T, E), optional
        For a forecaster.
    refit_every : int
        A forecaster is fitted at every this many origins, and goes on with its weights from the others.

    Returns
    -------
    Rolling
        With ``mae``, ``rmse``, ``coverage``.

    References
    ----------
    Tashman 2000, Out-of-sample tests of forecasting accuracy.
    """
    values = _values("series", series, 1)[:, 0]
    extra = None if exog is None else _values("exog", exog, 2)
    horizon, origins = _checks.integer("horizon", horizon, 1), _checks.integer("origins", origins, 1)
    step, refit_every = _checks.integer("step", step, 1), _checks.integer("refit_every", refit_every, 1)
    if extra is not None and len(extra) != len(values):
        raise ValueError(f"exog: expected {len(values)} rows, as series, got {len(extra)}")
    steps = getattr(method, "horizon", horizon)  # it reads exog of all steps ahead
    if extra is not None and horizon != steps:
        raise ValueError(f"horizon: expected {steps}, the forecaster's, with exog, got {horizon}")
    begins = len(values) - horizon - step * np.arange(origins)[::-1]
    if begins[0] < 1:
        raise ValueError(f"series: expected more than {horizon + step * (origins - 1)} values for {origins} origins, "
                         f"got {len(values)}")  # fmt: skip
    forecasts, quantiles, fitted = [], [], cast(Any, None)
    for k, begin in enumerate(begins):
        if not isinstance(method, RecurrentForecaster):
            forecasts.append(np.asarray(method(values[:begin]), float))
            continue
        if k % refit_every == 0:
            fitted = clone(method).fit(values[:begin], None if extra is None else extra[:begin])
        known = None if extra is None else extra[: begin + horizon]
        quantiles.append(fitted.predict_quantiles(horizon, values[:begin], known))
        forecasts.append(quantiles[-1][:, fitted._median()])
    for forecast in forecasts:
        if forecast.shape != (horizon,):
            raise ValueError(f"method: expected forecasts of shape ({horizon},), got {forecast.shape}")
    truth = np.stack([values[begin : begin + horizon] for begin in begins])
    return Rolling(begins, truth, np.stack(forecasts), np.stack(quantiles) if quantiles else None)


def last_value(past: Array, horizon: int) -> Array:
    """The forecast that nothing changes."""
    return np.full(horizon, past[-1])


def seasonal_naive(past: Array, horizon: int, season: int) -> Array:
    """The forecast that the last season comes again."""
    return np.resize(past[-season:], horizon)
