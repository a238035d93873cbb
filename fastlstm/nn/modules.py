"""Modules that stand around a recurrent layer: Linear, Embedding, LayerNorm, Dropout."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from .. import _checks
from .._habits import mark_absent
from .._parameters import Holder, Parameters
from .._types import Array


class Module(Holder):
    """What all modules have: parameters in one flat buffer, ``forward`` with a tape, ``backward``.

    A module of your own calls `_allocate` with the shapes of its parameters and defines `forward` and `backward`.
    """

    takes_lengths = False  # whether forward and a call have a second argument, the lengths of the sequences
    _parameters: Parameters
    dtype: np.dtype[Any]
    _OPTIONS: tuple[str, ...] | None = None  # what the constructor took, but for rng; a module of your own has none
    _FIXED = frozenset({"dtype"})

    def _allocate(self, shapes: Mapping[str, tuple[int, ...]], dtype: DTypeLike) -> bool:
        """Take the memory of the parameters; whether they want their first values, and are not read from a file."""
        self.dtype = _checks.float_type("dtype", dtype)
        check = self.__dict__.pop("_check", None)
        if check is not None:
            check(shapes.items())
        self._parameters = Parameters(shapes, self.dtype)
        return check is None

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments, by name, but for ``rng``."""
        if self._OPTIONS is None:
            raise TypeError(f"{type(self).__name__}: a module of your own, its state_dict() can be saved")
        return {name: getattr(self, name) for name in self._OPTIONS}

    def _describe(self) -> dict[str, Any]:
        from .._saved import options_of

        return options_of(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the module to a file that `fastlstm.load` reads, see `fastlstm.files.save`."""
        from .._saved import save

        save(self, path)

    def astype(self, dtype: DTypeLike) -> Self:
        """A copy of another type."""
        make: Any = type(self)
        other: Self = make(**self.options | {"dtype": dtype})
        other.flat_params[:] = self.flat_params
        return other

    @functools.cached_property
    def _gradients(self) -> Parameters:
        """Made when they are first wanted: inference has no use for them."""
        return Parameters({name: view.shape for name, view in self._parameters.views.items()}, self.dtype)

    def __call__(self, x: ArrayLike) -> Array:
        """Inference: `forward` without the tape."""
        return self.forward(x)[0]

    def forward(self, x: ArrayLike) -> tuple[Array, Any]:
        raise NotImplementedError

    def backward(self, tape: Any, dy: ArrayLike, *, need_dx: bool = True) -> Array | None:
        raise NotImplementedError

    def load_state_dict(self, d: Mapping[str, ArrayLike], prefix: str = "") -> None:
        """Copy the parameters from ``d``, whose names begin with ``prefix``; on an error nothing has changed."""
        self._parameters.load(d, "load_state_dict", prefix)

    def _gradient(self, dy: ArrayLike, shape: tuple[int, ...]) -> Array:
        """dy, checked, as are the gradients that are to be added to."""
        self._gradients.refuse_read_only("flat_grads")
        dy = _checks.numbers_of("dy", dy, self.dtype)
        if dy.shape != shape:
            raise ValueError(f"dy: expected shape {shape}, got {dy.shape}")
        return dy

    def _features(self, x: ArrayLike, size: int) -> Array:
        x = _checks.numbers_of("x", x, self.dtype)
        if x.ndim < 1 or x.shape[-1] != size:
            raise ValueError(f"x: expected shape (..., {size}), got {x.shape}")
        return x


class Linear(Module):
    """A fully connected layer, ``y = x W^T + b``.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of the last axis of input and output.
    bias : bool
        Whether to add ``b``.
    dtype : dtype
        float32 or float64.
    rng : int, numpy.random.Generator or None
        Source of the initial values, uniform within ``+-1/sqrt(in_features)`` as in PyTorch.

    Attributes
    ----------
    params, grads : dict of str to ndarray
        ``weight`` (out_features, in_features) and ``bias`` (out_features).
    flat_params, flat_grads : ndarray
        The same memory as one array each.
    """

    _FIXED = frozenset({"in_features", "out_features", "dtype"})

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: DTypeLike = np.float32,
        rng: int | np.random.Generator | None = None,
    ) -> None:
        self.in_features = _checks.integer("in_features", in_features, 1)
        self.out_features = _checks.integer("out_features", out_features, 1)
        shapes: dict[str, tuple[int, ...]] = {"weight": (self.out_features, self.in_features)}
        if bias:
            shapes["bias"] = (self.out_features,)
        if self._allocate(shapes, dtype):
            bound = 1 / math.sqrt(self.in_features)
            self.flat_params[:] = _checks.generator("rng", rng).uniform(-bound, bound, self.flat_params.size)

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments, by name, but for ``rng``."""
        names = ("in_features", "out_features", "dtype")
        return {name: getattr(self, name) for name in names} | {"bias": "bias" in self.params}

    def __repr__(self) -> str:
        bias = "bias" in self.params
        return f"Linear({self.in_features}, {self.out_features}, bias={bias}, dtype={self.dtype})"

    def forward(self, x: ArrayLike) -> tuple[Array, Array]:
        """Compute the output and keep what the backward pass needs.

        Parameters
        ----------
        x : array_like, shape (..., in_features)

        Returns
        -------
        y : ndarray, shape (..., out_features)
        tape : ndarray
            For `backward`: x itself, not a copy, so leave it as it is until then.
        """
        x = self._features(x, self.in_features)
        y = x.reshape(-1, self.in_features) @ self.params["weight"].T  # one product, whatever axes stand before
        if "bias" in self.params:
            y += self.params["bias"]
        return y.reshape(*x.shape[:-1], self.out_features), x

    def backward(self, tape: Array, dy: ArrayLike, *, need_dx: bool = True) -> Array | None:
        """Add the parameters' gradients to ``grads`` and return the input's.

        Parameters
        ----------
        tape : ndarray
            From `forward`.
        dy : array_like, shape (..., out_features)
            Gradient of the loss with respect to y.
        need_dx : bool
            False saves the work for dx.

        Returns
        -------
        dx : ndarray, shape (..., in_features), or None without need_dx
        """
        known = isinstance(tape, np.ndarray) and tape.dtype == self.dtype
        if not known or tape.shape[-1:] != (self.in_features,):
            raise TypeError(f"tape: expected the second result of forward, got {_checks.describe(tape)}")
        dy = self._gradient(dy, (*tape.shape[:-1], self.out_features))
        dy_rows = dy.reshape(-1, self.out_features)
        self.grads["weight"] += dy_rows.T @ tape.reshape(-1, self.in_features)
        if "bias" in self.grads:
            self.grads["bias"] += dy_rows.sum(axis=0)
        return (dy_rows @ self.params["weight"]).reshape(tape.shape) if need_dx else None


class Embedding(Module):
    """A table of vectors, one for each of ``num_embeddings`` indices.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        Rows and columns of the table.
    dtype : dtype
        float32 or float64.
    rng : int, numpy.random.Generator or None
        Source of the initial values, standard normal as in PyTorch.

    Attributes
    ----------
    params, grads : dict of str to ndarray
        ``weight`` (num_embeddings, embedding_dim).
    """

    _OPTIONS = ("num_embeddings", "embedding_dim", "dtype")
    _FIXED = frozenset(_OPTIONS)

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, dtype: DTypeLike = np.float32, rng: Any = None
    ) -> None:
        self.num_embeddings = _checks.integer("num_embeddings", num_embeddings, 1)
        self.embedding_dim = _checks.integer("embedding_dim", embedding_dim, 1)
        if self._allocate({"weight": (self.num_embeddings, self.embedding_dim)}, dtype):
            self.flat_params[:] = _checks.generator("rng", rng).standard_normal(self.flat_params.size)

    def __repr__(self) -> str:
        return f"Embedding({self.num_embeddings}, {self.embedding_dim}, dtype={self.dtype})"

    def forward(self, x: ArrayLike) -> tuple[Array, Array]:
        """Return the vectors (..., embedding_dim) of indices x (...), and x for `backward`."""
        x = _checks.indices("x", x, self.num_embeddings)
        return self.params["weight"][x], x

    def backward(self, tape: Array, dy: ArrayLike, *, need_dx: bool = True) -> None:
        """Add dy (..., embedding_dim) to the rows of ``grads["weight"]`` that were read; indices have no gradient."""
        if not isinstance(tape, np.ndarray) or tape.dtype.kind not in "iu":
            raise TypeError(f"tape: expected the second result of forward, got {_checks.describe(tape)}")
        dy = self._gradient(dy, (*tape.shape, self.embedding_dim)).reshape(-1, self.embedding_dim)
        order = np.argsort(tape.reshape(-1), kind="stable")  # sums of runs: some ten times faster than np.add.at
        indices, begins = np.unique(tape.reshape(-1)[order], return_index=True)
        if indices.size:
            self.grads["weight"][indices] += np.add.reduceat(dy[order], begins, axis=0)


class LayerNorm(Module):
    """Normalisation over the last axis (Ba et al. 2016): ``y = (x - mean) / sqrt(var + eps) * weight + bias``.

    Parameters
    ----------
    features : int
        Size of the last axis.
    eps : float
        Added to the variance, which is that of the population, as in PyTorch.
    dtype : dtype
        float32 or float64.
    """

    _OPTIONS = ("features", "eps", "dtype")
    _FIXED = frozenset({"features", "dtype"})

    def __init__(self, features: int, eps: float = 1e-5, *, dtype: DTypeLike = np.float32) -> None:
        self.features = _checks.integer("features", features, 1)
        self.eps = _checks.number("eps", eps)
        if self._allocate({"weight": (self.features,), "bias": (self.features,)}, dtype):
            self.params["weight"].fill(1)

    def __repr__(self) -> str:
        return f"LayerNorm({self.features}, eps={self.eps}, dtype={self.dtype})"

    def forward(self, x: ArrayLike) -> tuple[Array, tuple[Array, Array]]:
        """Return y, of x's shape (..., features), and the normalised x with its scale for `backward`."""
        x = self._features(x, self.features)
        unit = x - x.mean(axis=-1, keepdims=True)
        scale = 1 / np.sqrt(np.mean(unit * unit, axis=-1, keepdims=True) + self.dtype.type(self.eps))
        unit *= scale
        return unit * self.params["weight"] + self.params["bias"], (unit, scale)

    def backward(self, tape: tuple[Array, Array], dy: ArrayLike, *, need_dx: bool = True) -> Array | None:
        """Add the parameters' gradients; return dx of x's shape, or None without need_dx."""
        if not isinstance(tape, tuple) or len(tape) != 2:
            raise TypeError(f"tape: expected the second result of forward, got {_checks.describe(tape)}")
        unit, scale = tape
        dy = self._gradient(dy, unit.shape)
        rows = tuple(range(dy.ndim - 1))
        self.grads["weight"] += (dy * unit).sum(axis=rows)
        self.grads["bias"] += dy.sum(axis=rows)
        if not need_dx:
            return None
        dx: Array = dy * self.params["weight"]
        dx -= dx.mean(axis=-1, keepdims=True) + unit * np.mean(dx * unit, axis=-1, keepdims=True)
        dx *= scale
        return dx


for _module in (Linear, Embedding, LayerNorm):
    mark_absent(_module, {_name: f"params[{_name!r}] has it" for _name in ("weight", "bias")})


class Dropout(Module):
    """Zeroes each element with probability p in `forward` and scales the others by 1/(1-p); a call changes nothing.

    Parameters
    ----------
    p : float
        0 <= p < 1.
    dtype : dtype
        float32 or float64.
    rng : int, numpy.random.Generator or None
        Source of the masks.
    """

    _OPTIONS = ("p", "dtype")

    def __init__(self, p: float = 0.5, *, dtype: DTypeLike = np.float32, rng: Any = None) -> None:
        self.p, self.rng = p, _checks.generator("rng", rng)
        self._allocate({}, dtype)

    @property
    def p(self) -> float:
        """The probability. Can be set."""
        return self._p

    @p.setter
    def p(self, p: float) -> None:
        self._p = _checks.fraction("p", p)

    def __repr__(self) -> str:
        return f"Dropout({self.p}, dtype={self.dtype})"

    def __call__(self, x: ArrayLike) -> Array:
        """Inference: x as it is."""
        return _checks.numbers_of("x", x, self.dtype)

    def forward(self, x: ArrayLike) -> tuple[Array, Array | None]:
        """Return x with a newly drawn mask applied, and the mask for `backward`."""
        x = _checks.numbers_of("x", x, self.dtype)
        if self.p == 0:
            return x, None
        mask = (self.rng.random(x.shape, np.float32) >= self.p) * self.dtype.type(1 / (1 - self.p))
        return x * mask, mask

    def backward(self, tape: Array | None, dy: ArrayLike, *, need_dx: bool = True) -> Array | None:
        """Return dy with the mask of `forward` applied."""
        if tape is None:
            return _checks.numbers_of("dy", dy, self.dtype)
        return self._gradient(dy, tape.shape) * tape
