"""Named arrays that are views into one contiguous buffer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from . import _checks, engine
from ._habits import Hints, array_of, refuse_sparse
from ._types import Array

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike

# Names and shapes of parameters, as they lie in the buffer.
Shapes = Iterable[tuple[str, tuple[int, ...]]]

_ALIGNMENT = 64  # bytes: one cache line, one AVX-512 vector
# A fingerprint reads all parameters for more than so many rows (where a sample would take as long, in every cache
# line), or where they have so few bytes; else at least so many words of each.
_MANY_ROWS, _SMALL_BYTES, _SAMPLE = 256, 1 << 14, 64
_MOST_BYTES = sys.maxsize - _ALIGNMENT


class Views(dict[str, Array]):
    """Arrays by name; ``views[name] = value`` writes into the array, so that no weight is lost in silence."""

    def __setitem__(self, name: str, value: ArrayLike) -> None:
        if name not in self:
            raise KeyError(f"{name}: expected one of {', '.join(self)}")
        view = self[name]
        if value is not view:  # views[name] -= ... has written already
            view[...] = _checks.shaped(name, _checks.numbers_of(name, value, view.dtype), view.shape)

    def update(self, *args: Any, **values: ArrayLike) -> None:
        for name, value in dict(*args, **values).items():
            self[name] = value

    def __ior__(self, other: Any) -> Self:  # type: ignore[misc, override]
        self.update(other)
        return self

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


class Parameters:
    """Arrays of given names and shapes, side by side in one flat buffer of zeros.

    Parameters
    ----------
    shapes : dict of str to tuple of int
        Name and shape of each array, in the order in which they lie in the buffer.
    dtype : dtype
        Type of all of them.

    Attributes
    ----------
    flat : ndarray, shape (total,)
        The buffer: contiguous, starting at a multiple of 64 bytes, without gaps.
    views : dict of str to ndarray
        The named arrays; they share the memory of ``flat``.
    """

    __slots__ = ("flat", "views")

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: DTypeLike) -> None:
        dtype = np.dtype(dtype)
        sizes = {}
        for name, shape in shapes.items():
            size = 1
            for n in shape:  # Python integers: no overflow
                size *= int(n)
            sizes[name] = size
        total = sum(sizes.values())
        if total * dtype.itemsize > _MOST_BYTES:
            raise MemoryError(f"no memory for {total:,} parameters")
        raw = np.zeros(total * dtype.itemsize + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        self.flat: Array = raw[start : start + total * dtype.itemsize].view(dtype)
        self.views: dict[str, Array] = {}
        offset = 0
        for name, shape in shapes.items():
            self.views[name] = self.flat[offset : offset + sizes[name]].reshape(shape)
            offset += sizes[name]

    def __reduce__(self) -> Any:  # pickle and deepcopy: the views must share the copy's buffer, not own theirs
        return _restore, ({name: view.shape for name, view in self.views.items()}, self.flat)

    def move(self, buffer: Array) -> None:
        """Take the values, and from now on the views, to another buffer of the same size and type."""
        buffer[:] = self.flat
        writeable, offset = self.flat.flags.writeable, 0
        self.flat = buffer.view()  # the read-only flag below is that of these parameters, not of the whole buffer
        for name, view in self.views.items():
            self.views[name] = self.flat[offset : offset + view.size].reshape(view.shape)
            self.views[name].flags.writeable = writeable
            offset += view.size
        self.flat.flags.writeable = writeable

    def refuse_read_only(self, name: str) -> None:
        """An error where the buffer or a view is read-only: the flag of one is not that of the other, and kernels
        write past both. name: of the buffer, for the error."""
        if self.flat.flags.writeable and all([view.flags.writeable for view in self.views.values()]):
            return
        arrays = {name: self.flat} | {f"{name}: {key}": view for key, view in self.views.items()}
        where = next(where for where, array in arrays.items() if not array.flags.writeable)
        raise ValueError(f"{where}: expected a writeable array, got a read-only one; setflags(write=True) undoes it, "
                         "unfreeze() where the layer is frozen")  # fmt: skip

    def fingerprint(self, rows: int) -> int:
        """A number that a change of the values changes, for a pass over so many rows: the sum of the buffer's words.

        Reading all of a large buffer would take as long as a pass over few rows, so a sample stands for it there: of
        each parameter every k-th word, k = 2 * (1024 // rows) + 1, and never fewer than 64 words. It sees a change of
        all values of a parameter, such as an optimiser's step or other weights; not one of single values between.
        """
        stride = 2 * (1024 // max(rows, 1)) + 1
        if rows > _MANY_ROWS or self.flat.nbytes <= _SMALL_BYTES:
            return engine.sum_of_words(self.flat)
        views = self.views.values()
        return sum(engine.sum_of_words(view, min(stride, view.nbytes // (4 * _SAMPLE) | 1)) for view in views)

    def copy(self) -> dict[str, Array]:
        """Return copies of the named arrays, as a state dict."""
        return {name: view.copy() for name, view in self.views.items()}

    def load(
        self,
        d: Mapping[str, ArrayLike],
        what: str = "load_state_dict",
        prefix: str = "",
        aliases: Mapping[str, str] | None = None,
        zeros: Collection[str] = (),
    ) -> None:
        """Copy the arrays of ``d`` into the views; on any error nothing changes.

        Parameters
        ----------
        d : mapping of str to array_like
            One entry per name, of the same shape: whatever `numpy.asarray` accepts. Values are cast to the
            buffer's type, as `numpy.errstate` says where one overflows; NaN and infinities are taken as they are.
        what : str
            Who asks, for the error text.
        prefix : str
            What stands before the names in ``d``; keys that do not begin with it are left alone.
        aliases : mapping of str to str, optional
            Other names under which ``d`` may hold all of the arrays.
        zeros : collection of str
            Names that become zero where ``d`` has none of them.

        Raises
        ------
        TypeError
            ``d`` is no mapping, or a value is not an array of real numbers.
        ValueError
            Missing or unexpected keys, or a value of another shape.
        """
        if not isinstance(d, Mapping):
            raise TypeError(f"{what}: expected a mapping of names to arrays, got {type(d).__name__}")
        if not isinstance(prefix, str):
            raise TypeError(f"{what}: prefix: expected a str, got {type(prefix).__name__}")
        keys = [key for key in d if not prefix or (isinstance(key, str) and key.startswith(prefix))]
        if prefix and not keys:
            raise ValueError(f"{what}: prefix: no key begins with {prefix!r}, the keys are {_few(d)}")
        names = {name: prefix + name for name in self.views}
        other = {name: prefix + aliases.get(name, name) for name in self.views} if aliases else names
        if any(key in keys for key in other.values() if key not in names.values()):
            names = other
        if not any(names[name] in keys for name in zeros):
            names = {name: key for name, key in names.items() if name not in zeros}
        missing = [key for key in names.values() if key not in keys]
        unexpected = [key for key in keys if key not in names.values()]
        if missing or unexpected:
            found = [] if prefix else _prefixes(list(names.values()), keys)
            if found:
                raise ValueError(f"{what}: missing keys {missing}; they are there behind "
                                 f"{' and '.join(map(repr, found))}: give prefix={found[0]!r}")  # fmt: skip
            parts = [f"missing keys {missing}"] * bool(missing)
            parts += [f"unexpected keys {unexpected}"] * bool(unexpected)
            raise ValueError(f"{what}: {', '.join(parts)}")
        self.refuse_read_only(f"{what}: flat_params")
        arrays = {}
        for name, view in self.views.items():
            if name not in names:
                arrays[name] = np.zeros((), view.dtype)
                continue
            try:
                given = d[names[name]]
                value = array_of(given)
            except Exception as error:  # of the mapping or of the conversion
                raise TypeError(f"{what}: {name}: expected an array ({type(error).__name__}: {error})") from error
            _checks.refuse_mask(f"{what}: {name}", given)
            refuse_sparse(f"{what}: {name}", given, "an array")
            if value.dtype.kind not in "fiub" and not _checks.casts(value, view.dtype):
                raise TypeError(f"{what}: {name}: expected an array of real numbers, got dtype {value.dtype}")
            if value.shape != view.shape:
                raise ValueError(f"{what}: {name}: expected shape {view.shape}, got {value.shape}")
            # Converted before the first is written: where numpy.errstate says so, an overflow is an error. And d may
            # hold our own views, in another order.
            arrays[name] = value.astype(view.dtype, copy=np.shares_memory(value, self.flat))
        for name, view in self.views.items():
            view[...] = arrays[name]


def initialise(
    parameters: Parameters,
    init: str,
    hidden_size: int,
    rng: np.random.Generator,
    fixed: Mapping[str, float],
    heads: int = 1,
) -> None:
    """The values that a recurrent layer starts from. fixed: what those of some names are, whatever the suffix."""
    if init == "zeros":
        return
    if init == "pytorch":  # uniform in +-1/sqrt(H)
        bound = hidden_size**-0.5
        parameters.flat[:] = rng.uniform(-bound, bound, parameters.flat.size)
    else:
        _orthogonal(parameters, rng, heads)
    for name, value in fixed.items():
        for key, view in parameters.views.items():
            if key.startswith(name + "_l"):
                view[:] = value


def _orthogonal(parameters: Parameters, rng: np.random.Generator, heads: int) -> None:
    for name, view in parameters.views.items():  # Glorot and Bengio 2010, the recurrent part Saxe 2014
        if view.ndim == 1:  # biases, peepholes
            continue
        if name.startswith("weight_hh"):
            for head in np.split(view, heads):
                q, r = np.linalg.qr(rng.standard_normal(head.shape))
                head[:] = q * np.sign(np.diag(r))
        else:
            bound = (6 / sum(view.shape)) ** 0.5
            view[:] = rng.uniform(-bound, bound, view.shape)


def _prefixes(names: list[str], keys: Collection[str]) -> list[str]:
    """What stands before all of the names in the keys."""
    ends = [key[: -len(names[0])] for key in keys if isinstance(key, str) and key.endswith(names[0])]
    return [prefix for prefix in ends if prefix and all(prefix + name in keys for name in names)]


def _few(keys: Iterable[object]) -> str:
    shown = [repr(key) for key in keys]
    return ", ".join(shown[:4]) + ", ..." * (len(shown) > 4)


class Holder(Hints):
    """What has parameters and gradients by name, in a flat buffer each."""

    _parameters: Parameters

    @property
    def _gradients(self) -> Parameters:
        raise NotImplementedError

    @classmethod
    def _empty(cls, options: Mapping[str, Any], check: Callable[[Shapes], None]) -> Self:
        """A layer of zeros; ``check`` sees the names and shapes of its parameters before any memory is taken."""
        made = cls.__new__(cls)
        made.__dict__["_check"] = check
        made.__init__(**options)  # type: ignore[misc]
        return made

    @property
    def params(self) -> dict[str, Array]:
        """Parameters by name: views into `flat_params`."""
        return Views(self._parameters.views)

    @property
    def grads(self) -> dict[str, Array]:
        """Gradients by name: views into `flat_grads`. `backward` adds to them."""
        return Views(self._gradients.views)

    @property
    def flat_params(self) -> Array:
        """All parameters as one contiguous array, shape (total,)."""
        return self._parameters.flat

    @property
    def flat_grads(self) -> Array:
        """All gradients as one contiguous array of the layout of `flat_params`."""
        return self._gradients.flat

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return self.flat_params.size

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        flat = self.flat_grads
        self._gradients.refuse_read_only("flat_grads")
        flat.fill(0)

    def state_dict(self) -> dict[str, Array]:
        """Copies of the parameters under PyTorch's names."""
        return self._parameters.copy()


class Joined(Parameters):
    """Several `Parameters` moved into one buffer, side by side; each stays usable alone.

    Parameters
    ----------
    members : dict of str to Parameters
        Their names are prefixed with the key and a dot.
    """

    __slots__ = ("members",)

    def __init__(self, members: Mapping[str, Parameters]) -> None:
        dtype = next(iter(members.values())).flat.dtype
        shapes = {f"{key}.{name}": view.shape for key, m in members.items() for name, view in m.views.items()}
        super().__init__(shapes, dtype)
        self.members = dict(members)
        self._place(self.flat)

    def __reduce__(self) -> Any:  # the members come first, once, and find together again
        return Joined, (self.members,)

    def move(self, buffer: Array) -> None:
        self._place(buffer)
        self.flat = buffer

    def _place(self, buffer: Array) -> None:
        offset = 0
        for key, member in self.members.items():
            member.move(buffer[offset : offset + member.flat.size])
            self.views |= {f"{key}.{name}": view for name, view in member.views.items()}
            offset += member.flat.size

    def refuse_read_only(self, name: str) -> None:
        super().refuse_read_only(name)
        for member in self.members.values():  # a member's own buffer has a flag of its own
            member.refuse_read_only(name)

    @property
    def whole(self) -> bool:
        """Whether no member has been moved elsewhere since."""
        return all(member.flat.base is self.flat.base for member in self.members.values())


def _restore(shapes: dict[str, tuple[int, ...]], flat: Array) -> Parameters:
    parameters = Parameters(shapes, flat.dtype)
    parameters.flat[:] = flat
    return parameters
