"""Recurrent layers as scikit-learn estimators (``pip install 'fastlstm[sklearn]'``).

Sequences are a 3-D array (n, T, D), n sequences of T steps with D features; a table (n, T) of one feature per step; or
a list of n arrays (T_i, D) of different lengths. aeon and sktime hold (n, D, T): ``X.transpose(0, 2, 1)``, and
``[x.T for x in X]`` for a list.

Importing this module imports scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.metrics import accuracy_score, r2_score
from sklearn.preprocessing import LabelEncoder, StandardScaler
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets

from . import _checks, nn
from ._estimators import Recurrent, keep
from ._samples import Sequences, joined, labels, like, numbers, read_targets
from ._types import Array

__all__ = ["RecurrentClassifier", "RecurrentRegressor"]


class RecurrentClassifier(ClassifierMixin, Recurrent):
    """Classify sequences by a recurrent layer and a linear one on its last hidden state.

    Parameters
    ----------
    cell : {"lstm", "slstm", "gru", "rnn"}
        The recurrent layer.
    hidden_size : int
        Its units.
    num_layers : int
        Layers on top of each other.
    bidirectional : bool
        Read each sequence from both ends.
    dropout : float
        Probability with which in training an output of each recurrent layer is zeroed, that of the last one before the
        linear layer.
    layer_options : dict, optional
        Further arguments of `fastlstm.LSTM`, `SLSTM`, `GRU` or `RNN`, those that are no parameters here:
        ``{"forget_bias": 1, "peepholes": True}``.
    many_to_many : bool
        A class for each step instead of one for each sequence; y is then (n, T), or a list of arrays (T_i,).
    standardize : bool
        Bring each feature to mean 0 and standard deviation 1 before the layer, by the constants of the first fit.
    epochs : int
        Passes over the sequences; with early_stopping at most.
    batch_size : int
        Sequences per step of the optimiser (AdamW).
    learning_rate : float
        The highest rate of the schedule.
    schedule : {"constant", "linear", "cosine", "one_cycle"} or callable
        Its course over all epochs, see `fastlstm.nn.schedule`.
    weight_decay : float
        Decoupled weight decay.
    grad_clip : float or None
        Largest norm of all gradients together.
    early_stopping : bool
        Put validation_fraction of the sequences aside, score them after each epoch, stop after ``patience`` epochs
        without a score better by more than ``tol``, and restore the weights of the best epoch.
    validation_fraction : float
        Between 0 and 1. Classes are put aside in equal shares.
    patience : int
    tol : float
    scoring : str, callable or None
        For early_stopping: scikit-learn's name of a score, or a function (estimator, X, y), which also gets
        ``sample_weight=`` where there are weights; with many_to_many the latter. None: `score`.
    class_weight : dict, "balanced" or None
        Weights of the classes, as in scikit-learn.
    random_state : int, RandomState or None
        Source of weights, order, dropout and the validation part.
    n_jobs : int or None
        Threads: None takes `fastlstm.get_num_threads`, -1 all processors. The result does not depend on it.
    verbose : int
        1: a line per epoch, and a bar with loss and sequences per second where the output is a terminal.
    warm_start : bool
        `fit` goes on from the weights of the last one; what the network is made of must be as it was.
    callbacks : sequence of callables, optional
        Called after each epoch with the estimator and the epoch's record; a true result ends the training.

    Attributes
    ----------
    classes_ : ndarray (K,)
    model_ : fastlstm.nn.Sequential
        The network: usable alone, with `state_dict`, and its layer with `stream`.
    history_ : list of dict
        Of each epoch: epoch, loss, lr, seconds, sequences_per_second, with early_stopping validation_score.
    best_score_ : float or None
        The best validation score.
    n_iter_ : int
        Epochs.
    n_features_in_ : int
        D; T for a table (n, T), as scikit-learn counts it.

    Notes
    -----
    The layer computes in float64 where X is float64 or of integers beyond 16 bits, else in float32, at twice the speed:
    ``X.astype("float32")``. Sequences of different lengths are put into batches by length; padding is never computed.
    Sequences of weight 0 are left out. Each weight counts against the mean of all, whatever its batch.

    Examples
    --------
    >>> import numpy as np
    >>> from fastlstm.sklearn import RecurrentClassifier
    >>> X = np.random.default_rng(0).normal(size=(200, 10, 1))
    >>> y = np.where(X.sum(axis=(1, 2)) > 0, "up", "down")
    >>> RecurrentClassifier(hidden_size=16, random_state=0).fit(X, y).score(X, y) > 0.9
    True
    """

    classes_: Array

    def __init__(
        self, cell: str = "lstm", hidden_size: int = 64, *, num_layers: int = 1, bidirectional: bool = False,
        dropout: float = 0.0, layer_options: Mapping[str, Any] | None = None, many_to_many: bool = False,
        standardize: bool = True, epochs: int = 50, batch_size: int = 32, learning_rate: float = 1e-2,
        schedule: str | Callable[[float], float] = "one_cycle", weight_decay: float = 0.0,
        grad_clip: float | None = 1.0, early_stopping: bool = False, validation_fraction: float = 0.1,
        patience: int = 10, tol: float = 0.0, scoring: Any = None, class_weight: Any = None, random_state: Any = None,
        n_jobs: int | None = None, verbose: int = 0, warm_start: bool = False,
        callbacks: Sequence[Callable[[Any, dict[str, Any]], Any]] | None = None,
    ) -> None:  # fmt: skip
        keep(self, locals())

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Train one epoch more on these sequences, with the optimiser as it was.

        The learning rate is constant, nothing is put aside, and what standardizes is that of the first call.

        Parameters
        ----------
        X, y, sample_weight
            As for `fit`.
        classes : array (K,)
            All classes there are; needed in the first call.
        """
        if isinstance(self.class_weight, str):
            raise ValueError(f"class_weight: partial_fit expects a dict or None, got {self.class_weight!r}: it does "
                             "not know all labels")  # fmt: skip
        fresh = not hasattr(self, "model_")
        if fresh and classes is None:
            raise ValueError("classes: expected all classes in the first call of partial_fit, got None")
        if classes is not None:
            encoder = LabelEncoder().fit(classes)
            if not fresh and not np.array_equal(encoder.classes_, self.classes_):
                raise ValueError(f"classes: expected {self.classes_}, as before, got {encoder.classes_}")
            self._encoder, self.classes_ = encoder, encoder.classes_
        return self._partial_fit(X, y, sample_weight, fresh)

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        if not (self.warm_start and hasattr(self, "model_")):
            self.__dict__.pop("_encoder", None)
        return super().fit(X, y, sample_weight)

    fit.__doc__ = Recurrent.fit.__doc__

    def _read_y(self, y: Any, X: Sequences, fresh: bool) -> Any:
        def encode(y: Array) -> Array:
            y = labels(y)
            check_classification_targets(y)
            if not hasattr(self, "_encoder"):
                self._encoder = LabelEncoder().fit(y)
                self.classes_ = self._encoder.classes_
            return np.asarray(self._encoder.transform(y))

        return read_targets(y, X, self.many_to_many, encode)

    def _given_y(self, target: Any) -> Any:
        return self._each(self._encoder.inverse_transform, target)

    def _stratify(self, target: Any) -> Any:
        return None if self.many_to_many else target

    def _weigh(self, weight: Array | None, target: Any) -> Any:
        if self.class_weight is None:
            return weight
        every = joined(target) if self.many_to_many else target
        shares = compute_class_weight(self.class_weight, classes=self.classes_, y=self.classes_[every])
        if not (shares >= 0).all():
            raise ValueError(f"class_weight: expected numbers >= 0, got {self.class_weight!r}")
        if not self.many_to_many:
            return shares[target] if weight is None else shares[target] * weight
        rows = np.ones(len(target)) if weight is None else weight
        return like(shares[every] * np.repeat(rows, [len(t) for t in target]), target)

    def _outputs(self) -> int:
        return len(self.classes_)

    def _loss(self, output: Array, target: Array, **weight: Any) -> tuple[float, Array]:
        return nn.softmax_cross_entropy(output, target, **weight)

    def _predicted(self, output: Any) -> Any:
        return self._each(lambda rows: self.classes_[rows.argmax(axis=1)], output)

    _metric = staticmethod(accuracy_score)
    score = Recurrent.score  # the mixin's knows no targets at each step

    def predict_proba(self, X: Any) -> Any:
        """The probability of each class, in the order of ``classes_``: (n, K); with many_to_many (n, T, K) or a list.

        Parameters
        ----------
        X : array (n, T, D), array (n, T), or list of n arrays (T_i, D)
        """

        def softmax(rows: Array) -> Array:
            p: Array = np.exp(rows - rows.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            return p

        return self._each(softmax, self._infer(X))

    def predict_log_proba(self, X: Any) -> Any:
        """The logarithm of `predict_proba`, also where that is 0 by rounding."""

        def log_softmax(rows: Array) -> Array:
            rows = rows - rows.max(axis=1, keepdims=True)
            rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
            return rows

        return self._each(log_softmax, self._infer(X))


class RecurrentRegressor(RegressorMixin, Recurrent):
    """Predict one number or several for each sequence, by a recurrent layer and a linear one on its last hidden state.

    Parameters
    ----------
    loss : {"mse", "mae", "huber"}
        Of the targets in units of their standard deviation.
    many_to_many : bool
        Predict for each step; y is then (n, T), (n, T, K), or a list of arrays (T_i,) or (T_i, K).
    standardize : bool
        Bring each feature, and each target, to mean 0 and standard deviation 1, by the constants of the first fit.
        Predictions are in the units of y.

    Notes
    -----
    The other parameters, the attributes (but for ``classes_``) and the notes are those of `RecurrentClassifier`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastlstm.sklearn import RecurrentRegressor
    >>> X = [np.random.default_rng(i).normal(size=(5 + i % 7, 2)) for i in range(200)]
    >>> y = [x[:, 0].mean() for x in X]
    >>> RecurrentRegressor("gru", 16, random_state=0).fit(X, y).score(X, y) > 0.9
    True
    """

    def __init__(
        self, cell: str = "lstm", hidden_size: int = 64, *, num_layers: int = 1, bidirectional: bool = False,
        dropout: float = 0.0, layer_options: Mapping[str, Any] | None = None, many_to_many: bool = False,
        standardize: bool = True, loss: str = "mse", epochs: int = 50, batch_size: int = 32,
        learning_rate: float = 1e-2, schedule: str | Callable[[float], float] = "one_cycle",
        weight_decay: float = 0.0, grad_clip: float | None = 1.0, early_stopping: bool = False,
        validation_fraction: float = 0.1, patience: int = 10, tol: float = 0.0, scoring: Any = None,
        random_state: Any = None, n_jobs: int | None = None, verbose: int = 0, warm_start: bool = False,
        callbacks: Sequence[Callable[[Any, dict[str, Any]], Any]] | None = None,
    ) -> None:  # fmt: skip
        keep(self, locals())

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train one epoch more on these sequences, with the optimiser as it was.

        The learning rate is constant, nothing is put aside, and what standardizes is that of the first call.

        Parameters
        ----------
        X, y, sample_weight
            As for `fit`.
        """
        return self._partial_fit(X, y, sample_weight, not hasattr(self, "model_"))

    def _check(self) -> None:
        super()._check()
        _checks.choice("loss", self.loss, ("mse", "mae", "huber"))

    def _read_y(self, y: Any, X: Sequences, fresh: bool) -> Any:
        target = read_targets(y, X, self.many_to_many, numbers)
        shape = (joined(target) if self.many_to_many else target).shape[1:]
        if fresh:
            self._target_shape = shape
        elif shape != self._target_shape:
            raise ValueError(f"y: expected targets of shape {self._target_shape}, as before, got {shape}")
        return target

    def _prepare_targets(self, target: Any, weight: Array | None, X: Sequences) -> None:
        rows = joined(target) if self.many_to_many else target
        rows = rows.reshape(len(rows), -1)
        self._mean, self._deviation = np.zeros(rows.shape[1]), np.ones(rows.shape[1])
        if self.standardize:
            if weight is not None and self.many_to_many:
                weight = np.repeat(weight, X.lengths)
            scaler = StandardScaler().fit(rows, sample_weight=weight)
            self._mean, self._deviation = scaler.mean_, scaler.scale_

    def _scaled(self, target: Any) -> Any:
        def scale(rows: Array) -> Array:
            return ((rows.reshape(len(rows), -1) - self._mean) / self._deviation).astype(self.model_.dtype)

        return self._each(scale, target)

    def _given_y(self, target: Any) -> Any:
        return target

    def _outputs(self) -> int:
        return len(self._mean)

    def _loss(self, output: Array, target: Array, **weight: Array) -> tuple[float, Array]:
        return {"mse": nn.mse, "mae": nn.mae, "huber": nn.huber}[self.loss](output, target, **weight)

    def _predicted(self, output: Any) -> Any:
        def unscale(rows: Array) -> Array:
            rows = (rows * self._deviation + self._mean).astype(rows.dtype)
            return rows.reshape(len(rows), *self._target_shape)

        return self._each(unscale, output)

    _metric = staticmethod(r2_score)
    score = Recurrent.score  # the mixin's knows no targets at each step
