# cython: language_level=3
"""The C contract, the choice of the instruction set, and what is known of the cells."""
import os
from types import MappingProxyType, SimpleNamespace

import numpy as np

cimport numpy as cnp

cnp.import_array()

cdef extern from "fastlstm.h":
    const fl_cell fl_cells[]
    const int fl_cell_count
    int fl_isa_count()
    int fl_l2_feeds()
    const char *fl_isa_name(int i)
    const fl_kernels *fl_kernels_for(int i, int is_double)
    ctypedef struct fl_cache_sizes:
        ptrdiff_t l1, l2
        bint l2_feeds
    fl_cache_sizes fl_caches

cdef extern from *:
    """
    #include <unistd.h>
    static long fl_cache_size(int level)
    {
    #ifdef _SC_LEVEL2_CACHE_SIZE
        return sysconf(level == 1 ? _SC_LEVEL1_DCACHE_SIZE : _SC_LEVEL2_CACHE_SIZE);
    #else
        return 0;
    #endif
    }
    """
    long fl_cache_size(int level)

# ---- instruction sets --------------------------------------------------------------------------------------------------

cdef int current_isa


def cache_size(int level):
    """Bytes of a core's first or second cache of data; 32 KB and 1 MB where nobody tells."""
    if fl_cache_size(level) > 0:
        return fl_cache_size(level)
    try:
        with open(f"/sys/devices/system/cpu/cpu0/cache/index{0 if level == 1 else 2}/size", encoding="ascii") as file:
            return int(file.read().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 32 << 10 if level == 1 else 1 << 20


cdef dict caches():
    """What passes cut their panels for, see STRETCH in src_c/kernels.c."""
    return fl_caches


cdef int set_caches(dict sizes) except -1:
    """No size changes a bit."""
    fl_caches.l1, fl_caches.l2, fl_caches.l2_feeds = max(sizes["l1"], 64), max(sizes["l2"], 64), sizes["l2_feeds"]
    return 0


set_caches({"l1": cache_size(1), "l2": cache_size(2), "l2_feeds": fl_l2_feeds()})


def available_isas():
    """Names of the instruction sets that this build holds and this machine runs, weakest first."""
    return [fl_isa_name(i).decode() for i in range(fl_isa_count())]


def isa():
    """Name of the instruction set in use."""
    return fl_isa_name(current_isa).decode()


def use_isa(name):
    """Select the instruction set for the calls that follow. For tests and benchmarks."""
    global current_isa
    names = available_isas()
    if name not in names:
        raise ValueError(f"FASTLSTM_ISA: expected one of {names} on this machine, got {name!r}")
    current_isa = names.index(name)


use_isa(os.environ.get("FASTLSTM_ISA", "").lower() or available_isas()[fl_isa_count() - 1])


cdef const fl_kernels *kernels_of(dtype) except NULL:
    if dtype == np.float32:
        return fl_kernels_for(current_isa, 0)
    if dtype == np.float64:
        return fl_kernels_for(current_isa, 1)
    raise TypeError(f"dtype: expected float32 or float64, got {dtype}")


# ---- cells -------------------------------------------------------------------------------------------------------------

# The table of names: a cell is known outside by what its page in src_c/cells/ says of itself.
_index = {fl_cells[i].name.decode(): i for i in range(fl_cell_count)}


cdef int cell_index(name) except -1:
    return _index[name]


cdef const fl_cell *cell_at(int index) noexcept:
    return &fl_cells[index]


def _describe(int i):
    cdef const fl_cell *cell = &fl_cells[i]
    cdef int v
    vectors = {}
    for v in range(FL_VECTORS):
        if cell.vectors[v].name:
            vectors[cell.vectors[v].name.decode()] = bool(cell.vectors[v].gain)
    return SimpleNamespace(
        name=cell.name.decode(), states=tuple(cell.states.decode()), gates=tuple(cell.gates.decode()),
        columns=tuple(cell.columns.decode()), vectors=vectors)


# Name of a cell to its states (h first), gates (in the order of the weights' rows), columns of the tape, and its per-unit
# parameters by name: whether they are gains, factors around 1.
CELLS = MappingProxyType({name: _describe(i) for name, i in _index.items()})


# ---- choices -----------------------------------------------------------------------------------------------------------

ACTIVATIONS = MappingProxyType({
    "tanh": FL_TANH, "sigmoid": FL_SIGMOID, "relu": FL_RELU, "softsign": FL_SOFTSIGN, "hard_tanh": FL_HARD_TANH,
    "hard_sigmoid": FL_HARD_SIGMOID, "identity": FL_IDENTITY, "linear_sigmoid": FL_LINEAR_SIGMOID, "elu": FL_ELU,
    "leaky_relu": FL_LEAKY_RELU, "softplus": FL_SOFTPLUS, "scaled_tanh": FL_SCALED_TANH})


cdef class Choices:
    """What a layer chooses beside the defaults: activations as (name, alpha, beta), limits as numbers or None."""

    def __init__(self, dtype, act, out, gate, clip=None, cell_clip=None, proj_clip=None, epsilon=1e-5):
        self.set(&self.s.act, dtype, act, clip)
        self.set(&self.s.out, dtype, out, None)
        self.set(&self.s.gate, dtype, gate, clip)
        self.s.cell_clip = np.inf if cell_clip is None else cell_clip
        self.s.proj_clip = np.inf if proj_clip is None else proj_clip
        self.s.epsilon = epsilon

    cdef void set(self, fl_activation *act, dtype, choice, clip) except *:
        name, act.alpha, act.beta = choice
        act.kind, act.clip = ACTIVATIONS[name], np.inf if clip is None else clip
        ends = np.array([-act.clip, act.clip], dtype)
        kernels_of(dtype).map(act, cnp.PyArray_DATA(ends), cnp.PyArray_DATA(ends), 2)
        act.low, act.high = ends
