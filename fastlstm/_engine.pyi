"""What _engine.pyx shows to Python."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

ACTIVATIONS: dict[str, int]
CELLS: dict[str, int]
GATES: dict[str, tuple[str, ...]]

# instruction sets and build
def available_isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
def has_openmp() -> bool: ...
def forked() -> bool: ...

# memory
@final
class Buffer:
    def __new__(cls, size: int) -> Buffer: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def release_memory() -> None: ...
def empty(shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]: ...

# rows, weights, runs
@final
class Rows:
    def __init__(self, T: int, N: int, lengths: NDArray[np.intp] | None = None) -> None: ...
    def window(self, begin: int, end: int) -> Rows: ...
    def bounds(self, begin: int, end: int) -> tuple[int, int]: ...
    @property
    def T(self) -> int: ...
    @property
    def N(self) -> int: ...
    @property
    def R(self) -> int: ...

@final
class Panels:
    def __init__(
        self,
        cell: str,
        weights: Mapping[str, NDArray[Any]],
        suffix: str,
        activation: str,
        recurrent_activation: str,
        weight_type: str | None = None,
    ) -> None: ...
    def pack(self) -> Panels: ...
    @property
    def H(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def projects(self) -> bool: ...

@final
class Run:
    def __init__(
        self,
        rows: Rows,
        w: Panels,
        reverse: bool,
        x: NDArray[Any],
        h: NDArray[Any],
        h_0: NDArray[Any],
        h_n: NDArray[Any],
        c_0: NDArray[Any] | None = None,
        c_n: NDArray[Any] | None = None,
        c: NDArray[Any] | None = None,
        gates: NDArray[Any] | None = None,
        m: NDArray[Any] | None = None,
        h_masked: NDArray[Any] | None = None,
        h_0_masked: NDArray[Any] | None = None,
        mask: NDArray[Any] | None = None,
        keep_h: NDArray[Any] | None = None,
        keep_c: NDArray[Any] | None = None,
    ) -> None: ...
    def set_backward(
        self,
        grads: Mapping[str, NDArray[Any]],
        suffix: str,
        dy: NDArray[Any] | None,
        dh: NDArray[Any],
        dc: NDArray[Any] | None = None,
        dx: NDArray[Any] | None = None,
        add_dx: bool = False,
    ) -> None: ...

def plan(
    T: int, N: int, D: int, H: int, columns: int, item: int, directions: int, threads: int, blocks: int
) -> tuple[int, bool, int]: ...
def forward(runs: list[Run], threads: int) -> None: ...
def backward(runs: list[Run], threads: int) -> None: ...

# streams
class Stepper:
    def __init__(
        self, panels: list[Panels], N: int, keep_h: NDArray[Any] | None, keep_c: NDArray[Any] | None
    ) -> None: ...
    @property
    def N(self) -> int: ...
    @property
    def D(self) -> int: ...
    @property
    def P(self) -> int: ...
    @property
    def H(self) -> int: ...
    @property
    def states(self) -> tuple[NDArray[Any], NDArray[Any]]: ...
    @property
    def h(self) -> NDArray[Any]: ...
    def step(self, x: ArrayLike, out: NDArray[Any] | None = None) -> NDArray[Any]: ...

# for tests and benchmarks
def outer_product(g: NDArray[Any], a: NDArray[Any], out: NDArray[Any]) -> None: ...
def tune(
    row_block: int | None = None,
    chunk: int | None = None,
    x_chunk: int | None = None,
    units_rows: int | None = None,
    units_rows_large: int | None = None,
) -> dict[str, int]: ...
def activation(name: str, values: ArrayLike) -> NDArray[Any]: ...
def fma_peak(dtype: DTypeLike = ..., seconds: float = 0.05) -> float: ...
def read_bandwidth(nbytes: int, seconds: float = 0.05) -> float: ...
