"""What the classifier and the regressor share: reading, building, training. Needs the extra [sklearn]."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from joblib import effective_n_jobs
from sklearn.base import BaseEstimator
from sklearn.metrics import check_scoring
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted

from . import _checks, nn, threads
from ._samples import Scale, Sequences, joined, like, of_steps, read_sequences, take
from ._types import Array
from .layers import CELLS

# What is the estimator's own of a layer's arguments, and what its network hangs on.
OWN = ("input_size", "hidden_size", "num_layers", "batch_first", "dropout", "bidirectional", "dtype", "rng")
LASTING = ("cell", "hidden_size", "num_layers", "bidirectional", "dropout", "layer_options", "many_to_many",
           "standardize")  # fmt: skip


class Recurrent(BaseEstimator):
    """What the estimators share; not for direct use.

    A subclass reads its targets and says what a loss, an output and a prediction are.
    """

    model_: nn.Sequential
    history_: list[dict[str, Any]]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.target_tags.required = True
        return tags

    # ---- what a subclass has ----

    def _read_y(self, y: Any, X: Sequences, fresh: bool) -> Any:
        """The targets as the loss takes them; with fresh they say what the outputs are."""
        raise NotImplementedError

    def _stratify(self, target: Any) -> Any:
        """What the validation part is to have in equal shares."""

    def _weigh(self, weight: Array | None, target: Any) -> Any:
        """The weights of sequences, or of steps."""
        return weight

    def _outputs(self) -> int:
        """Width of the last layer."""
        raise NotImplementedError

    def _loss(self, output: Array, target: Array, **weight: Array) -> tuple[float, Array]:
        raise NotImplementedError

    # ---- fit ----

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train from new weights, or with warm_start from those of the last fit.

        Parameters
        ----------
        X : array (n, T, D), array (n, T), or list of n arrays (T_i, D)
        y : array (n,) or (n, K)
            With many_to_many one for each step: (n, T), or a list of arrays (T_i,).
        sample_weight : array (n,), optional
            Of each sequence, >= 0.

        Returns
        -------
        self
            Ctrl-C ends the training, not the program, and a line on stderr says so: the estimator is fitted then, with
            the weights of the best epoch so far with early_stopping, else with those of the last step.
        """
        self._check()
        fresh = not (self.warm_start and hasattr(self, "model_"))
        if not fresh:
            self._check_lasting()
        X, target, weight = self._read(X, y, sample_weight, fresh)
        held_out = None
        if self.early_stopping:
            X, target, weight, held_out = self._split(X, target, weight)
        if fresh:
            self._build(X, target, weight)
        self._optimiser = self._new_optimiser()
        self.history_, self.best_score_ = [], None
        stopping = None
        if held_out is not None:
            stopping = nn.EarlyStopping(lambda _: self._score_held_out(*held_out), self.patience, self.tol)
        self._train(X, target, weight, self.epochs, self.schedule, stopping)
        del self._optimiser  # as large as the model, twice
        return self

    def _partial_fit(self, X: Any, y: Any, sample_weight: Any, fresh: bool) -> Self:
        """One epoch more, with the optimiser as it was."""
        self._check()
        if not fresh:
            self._check_lasting()
        X, target, weight = self._read(X, y, sample_weight, fresh)
        if fresh:
            self._build(X, target, weight)
            self.history_, self.best_score_ = [], None
        if not hasattr(self, "_optimiser"):
            self._optimiser = self._new_optimiser()
        self._train(X, target, weight, len(self.history_) + 1, "constant", None)
        return self

    def _check(self) -> None:
        """The parameters that no one else checks."""
        _checks.choice("cell", self.cell, tuple(CELLS))
        _checks.integer("epochs", self.epochs, 1)
        _checks.integer("batch_size", self.batch_size, 1)
        _checks.number("learning_rate", self.learning_rate, open_low=True)
        _checks.number("weight_decay", self.weight_decay)
        _checks.fraction("dropout", self.dropout)
        nn.schedule(self.schedule)
        if self.grad_clip is not None:
            _checks.number("grad_clip", self.grad_clip, open_low=True)
        for name in ("bidirectional", "many_to_many", "standardize", "early_stopping", "warm_start"):
            _checks.flag(name, getattr(self, name))
        if not 0 < _checks.fraction("validation_fraction", self.validation_fraction):
            raise ValueError("validation_fraction: expected a number between 0 and 1, got 0")
        _checks.integer("patience", self.patience, 1)
        _checks.number("tol", self.tol)
        if self.n_jobs is not None:
            _checks.integer("n_jobs", self.n_jobs, -(2**31))
        if not isinstance(self.callbacks or (), Sequence) or not all(map(callable, self.callbacks or ())):
            raise TypeError(f"callbacks: expected a list of functions, got {self.callbacks!r:.60}")
        if self.many_to_many and isinstance(self.scoring, str):
            raise ValueError("scoring: expected None or a function of (estimator, X, y) with many_to_many, got "
                             f"{self.scoring!r}: scikit-learn's scores know no steps")  # fmt: skip
        self._check_layer()

    def _check_layer(self) -> None:
        options = self.layer_options or {}
        if not isinstance(options, Mapping):
            raise TypeError(f"layer_options: expected a dict or None, got {_checks.describe(options)}")
        known = [name for name in inspect.signature(CELLS[self.cell]).parameters if name not in OWN]
        for name in options:
            if name not in known:
                raise ValueError(f"layer_options: expected names among {', '.join(known)}, got {name!r}")

    def _check_lasting(self) -> None:
        """The network that goes on is that of the parameters it was built with."""
        for name, value in self._built_with.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}: expected {value!r}, as the network that goes on has, got "
                                 f"{getattr(self, name)!r}")  # fmt: skip

    def _read(self, X: Any, y: Any, sample_weight: Any, fresh: bool) -> tuple[Sequences, Any, Array | None]:
        """Sequences, targets and weights; those of weight 0 are left out, as if they were not there."""
        if y is None:
            name = type(self).__name__
            raise ValueError(f"This {name} estimator requires y to be passed, but the target y is None")
        X = read_sequences(self, X, fresh)
        target = self._read_y(y, X, fresh)
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, X.data, dtype=np.float64, ensure_non_negative=True)
        weight = self._weigh(sample_weight, target)
        if weight is None:
            return X, target, None
        size = np.array([np.sum(w) for w in weight])
        if not size.any():
            raise ValueError("sample_weight: expected at least one sequence whose weight is not 0")
        if not size.all():
            rows = np.flatnonzero(size)
            X, target, weight = X[rows], take(target, rows), take(weight, rows)
        every = of_steps(weight, X.lengths) if self.many_to_many else weight
        mean = every[every > 0].mean()  # as `_weighted_loss` has it
        scaled: Any = [w / mean for w in weight] if isinstance(weight, list) else weight / mean
        return X, target, scaled

    def _split(self, X: Sequences, target: Any, weight: Any) -> tuple[Any, ...]:
        random_state = check_random_state(self.random_state)
        train, rest = train_test_split(
            np.arange(len(X)), test_size=self.validation_fraction, random_state=random_state,
            stratify=self._stratify(target),
        )  # fmt: skip
        held_out = X[rest], self._given_y(take(target, rest)), None if weight is None else take(weight, rest)
        return X[train], take(target, train), None if weight is None else take(weight, train), held_out

    def _given_y(self, target: Any) -> Any:
        """`_read_y` undone."""
        raise NotImplementedError

    def _score_held_out(self, X: Sequences, y: Any, weight: Any) -> float:
        if self.scoring is None:
            return self._score(y, self._predicted(X.infer(self.model_, self.many_to_many)), weight)
        data = X.data[:, :, 0] if self._table else X.data
        given = {} if weight is None or np.ndim(weight[0]) else {"sample_weight": weight}
        return float(check_scoring(self, self.scoring)(self, data, y, **given))

    def _build(self, X: Sequences, target: Any, weight: Any) -> None:
        random_state = check_random_state(self.random_state)
        self._rng = rng = np.random.default_rng(random_state.randint(2**31 - 1))
        dtype = X.dtype
        # weights of steps come from classes; what scales the inputs leaves them aside
        rows = None if weight is None else np.array([np.mean(w) for w in weight])
        parts: list[Any] = []
        if self.standardize:
            steps = None if rows is None else np.repeat(rows, X.lengths)
            scaler = StandardScaler().fit(X.steps, sample_weight=steps)
            parts.append(Scale(scaler.mean_, scaler.scale_, dtype))
        options = {"num_layers": self.num_layers, "bidirectional": self.bidirectional, "dtype": dtype, "rng": rng}
        if self.num_layers != 1:
            options["dropout"] = self.dropout
        layer = CELLS[self.cell](X.features, self.hidden_size, **options, **(self.layer_options or {}))
        parts.append(nn.Recurrent(layer, last=not self.many_to_many))
        if self.dropout:
            parts.append(nn.Dropout(self.dropout, dtype=dtype, rng=rng))
        width = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
        self._prepare_targets(target, rows, X)
        parts.append(nn.Linear(width, self._outputs(), dtype=dtype, rng=rng))
        self.model_ = self._joined(parts, X)
        self._built_with = {name: getattr(self, name) for name in LASTING}

    def _joined(self, parts: list[nn.Module], X: Sequences) -> nn.Sequential:
        return nn.Sequential(*parts)

    def _prepare_targets(self, target: Any, weight: Array | None, X: Sequences) -> None:
        """Find out what the targets need, from the sequences of the first fit."""

    def _new_optimiser(self) -> nn.AdamW:
        return nn.AdamW([self.model_], self.learning_rate, weight_decay=self.weight_decay)

    def _train(self, X: Sequences, target: Any, weight: Any, epochs: int, schedule: Any, stopping: Any) -> None:
        def after_epoch(model: Any, record: dict[str, Any]) -> bool:
            stop = stopping is not None and stopping(model, record)
            self.history_.append(record)
            self.n_iter_ = len(self.history_)
            return any([stop, *(callback(self, record) for callback in self.callbacks or ())])

        batches = nn.Batches(
            X.data, self._scaled(target), self.batch_size, weight=weight, per_step=self.many_to_many, rng=self._rng
        )
        self.n_iter_ = len(self.history_)
        try:
            with self._limits():
                nn.fit(
                    self.model_, batches, self._optimiser, self._weighted_loss, epochs=epochs,
                    start=len(self.history_), schedule=schedule, grad_clip=self.grad_clip, callbacks=[after_epoch],
                    verbose=self.verbose,
                )  # fmt: skip
        except KeyboardInterrupt:
            best = 0 if stopping is None else stopping.best_epoch
            which = f"those of epoch {best}, the best so far" if best else "those of the last step"
            print(f"interrupted in epoch {self.n_iter_ + 1} of {epochs}: the weights are {which}", file=sys.stderr)
        if stopping is not None:
            stopping.restore(self.model_)
            self.best_score_ = stopping.best_score

    def _scaled(self, target: Any) -> Any:
        return target

    def _weighted_loss(self, output: Array, target: Array, weight: Array | None = None) -> tuple[float, Array]:
        """The loss of a batch. Weights have mean 1 over all sequences, and a batch counts by the mean of its own."""
        if weight is None:
            return self._loss(output, target)
        if not weight.any():  # all its steps are of classes that do not count
            return 0.0, np.zeros_like(output)
        value, gradient = self._loss(output, target, weight=weight)
        mean = weight[weight > 0].mean()  # steps past an end have weight 0
        return float(value * mean), gradient * gradient.dtype.type(mean)

    @contextlib.contextmanager
    def _limits(self) -> Any:
        n = None if self.n_jobs is None else effective_n_jobs(self.n_jobs)
        with threads.limited(n), threads.blas_on_one_thread():
            yield

    # ---- predict ----

    def _infer(self, X: Any) -> Any:
        check_is_fitted(self, "model_")
        X = read_sequences(self, X, False)
        with self._limits():
            return X.infer(self.model_, self.many_to_many)

    def _each(self, function: Any, output: Any) -> Any:
        """A function of rows (steps, K), applied to outputs of any shape."""
        if not self.many_to_many:
            return function(output)
        return like(function(joined(output)), output)

    def _predicted(self, output: Any) -> Any:
        """Outputs of the model as predictions."""
        raise NotImplementedError

    def predict(self, X: Any) -> Any:
        """Predict for each sequence of X, or with many_to_many for each of its steps.

        Parameters
        ----------
        X : array (n, T, D), array (n, T), or list of n arrays (T_i, D)

        Returns
        -------
        y : ndarray (n, ...); with many_to_many (n, T, ...), or a list of arrays (T_i, ...) for a list
        """
        return self._predicted(self._infer(X))

    _metric: Any = None

    def _score(self, y: Any, predicted: Any, weight: Any) -> float:
        if self.many_to_many:
            weight = None if weight is None else of_steps(weight, [len(row) for row in predicted])
            y, predicted = joined(y), joined(predicted)
        return float(self._metric(y, predicted, sample_weight=weight))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The accuracy of a classifier, R^2 of a regressor; with many_to_many over all steps.

        Parameters
        ----------
        X, y, sample_weight
            As for `fit`.
        """
        return self._score(y, self.predict(X), sample_weight)


def keep(estimator: Any, arguments: dict[str, Any]) -> None:
    """Make the constructor's arguments attributes, and nothing else, as scikit-learn wants it."""
    vars(estimator).update({name: value for name, value in arguments.items() if name not in ("self", "__class__")})
