"""The recurrence, compiled: rows and packed weights in, a team of threads through time, states and gradients out.

Letters as in src_c/fastlstm.h: T steps, N batch, D input width, H hidden units, P width of h, R rows in all.
"""

from .blas import cut_products, find_blas, products, use_products
from .kernels import ACTIVATIONS, CELLS, Choices, available_isas, cache_size, isa, use_isa
from .memory import (
    Buffer,
    begin_call,
    blocks_taken,
    empty,
    fail_block,
    memory_kept,
    plain,
    release_memory,
    set_memory_kept,
    sum_of_words,
)
from .planning import plan, tune
from .process import crowded, in_turn, vector_bytes
from .rows import Rows
from .run import Run
from .stepper import Stepper
from .team import backward, calls, forked, forward, has_openmp, meet, workspace
from .weights import Panels

__all__ = [
    "ACTIVATIONS",
    "CELLS",
    "Buffer",
    "Choices",
    "Panels",
    "Rows",
    "Run",
    "Stepper",
    "activation",
    "activation_rate",
    "available_isas",
    "backward",
    "begin_call",
    "blocks_taken",
    "calls",
    "cache_size",
    "crowded",
    "cut_products",
    "empty",
    "fail_block",
    "find_blas",
    "fma_peak",
    "forked",
    "forward",
    "has_openmp",
    "in_turn",
    "isa",
    "meet",
    "memory_kept",
    "outer_product",
    "plain",
    "plan",
    "products",
    "read_bandwidth",
    "release_memory",
    "set_memory_kept",
    "sum_of_words",
    "tune",
    "use_isa",
    "use_products",
    "vector_bytes",
    "workspace",
]


def __getattr__(name):
    """What only tests and benchmarks call is imported when it is first named."""
    if name in ("activation", "activation_rate", "fma_peak", "outer_product", "read_bandwidth"):
        from . import probe

        return getattr(probe, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
