# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What only benchmarks and tests call: activations and products alone, peak and bandwidth."""
import time

import numpy as np

cimport numpy as cnp
from libc.string cimport memset

from .kernels cimport FL_COLUMNS, fl_activation, fl_kernels, kernels_of
from .memory cimport Buffer
from .process cimport FL_OURS, fl_get_word, fl_set_word, fl_word
from .products cimport chunk_rows, slice_size

from .kernels import ACTIVATIONS
from .planning import tune

cnp.import_array()

def activation(name, values, double alpha=0, double beta=0, bint called=False):
    """The kernels' activation of an array. called: under a call's control word, where subnormal numbers are zero."""
    cdef fl_activation act
    cdef fl_word own = fl_get_word()
    act.kind, act.alpha, act.beta, act.clip = ACTIVATIONS[name], alpha, beta, np.inf
    x = np.ascontiguousarray(values)
    out = np.empty_like(x)
    cdef const fl_kernels *k = kernels_of(x.dtype)
    fl_set_word(own | FL_OURS if called else own)
    k.map(&act, (<cnp.ndarray> x).data, (<cnp.ndarray> out).data, x.size)
    fl_set_word(own)
    return out


def outer_product(cnp.ndarray g, cnp.ndarray a, cnp.ndarray out):
    """out [J, K] += g' a for g [R, J] and a [R, K] by the kernels of the backward pass, on one thread."""
    cdef const fl_kernels *k = kernels_of(g.dtype)
    cdef ptrdiff_t R = g.shape[0], J = g.shape[1], K = a.shape[1], item = g.itemsize, n, low, high, c
    cdef ptrdiff_t size = min(chunk_rows(tune()["chunk"], item), R), panel = slice_size(size, k.panel), strip = slice_size(size, k.strip)
    cdef ptrdiff_t panels = (K + k.panel - 1) // k.panel, strips = (J + k.strip - 1) // k.strip
    cdef Buffer memory = Buffer((panels * panel + strips * strip) * item)
    cdef char *p = <char *> memory.data
    cdef char *s = p + panels * panel * item
    high = R
    while high > 0:
        n = min(size, high)
        low = high - n
        k.slices(p, panel, k.panel, n, a.data + (high - 1) * K * item, -K, K, NULL, NULL)
        k.slices(s, strip, k.strip, n, g.data + (high - 1) * J * item, -J, J, NULL, NULL)
        for c in range(panels):
            k.outer(out.data + c * k.panel * item, K, J, min(k.panel, K - c * k.panel), n, s, strip,
                    p + c * panel * item)
        high = low


def fma_peak(dtype=np.float32, double seconds=0.05):
    """GFLOP/s of one core running independent multiply-adds of vectors: the best of several runs."""
    dtype = np.dtype(dtype)
    cdef const fl_kernels *k = kernels_of(dtype)
    scratch = np.full(2 * k.lanes, 0.5, dtype)
    cdef ptrdiff_t rounds = 100_000
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        k.peak(rounds, (<cnp.ndarray> scratch).data)
        best = max(best, 2.0 * rounds * k.rows * FL_COLUMNS * k.lanes / (time.perf_counter() - begin) / 1e9)
    return best


def read_bandwidth(Py_ssize_t nbytes, double seconds=0.05):
    """GB/s at which one core reads `nbytes` over and over: the best of several runs."""
    cdef const fl_kernels *k = kernels_of(np.dtype(np.float32))
    cdef Buffer data = Buffer(nbytes)
    cdef ptrdiff_t size = nbytes // 4
    cdef int i, repeats = max(1, 20_000_000 // nbytes)
    memset(data.data, 0, nbytes)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        for i in range(repeats):
            k.read(data.data, size)
        best = max(best, repeats * nbytes / (time.perf_counter() - begin) / 1e9)
    return best


def activation_rate(name, dtype=np.float32, double seconds=0.05):
    """Activations of one core in a second, in 1e9, of numbers that stay in its L1 cache: the best of several runs."""
    dtype = np.dtype(dtype)
    cdef const fl_kernels *k = kernels_of(dtype)
    cdef fl_activation act
    cdef ptrdiff_t size = 8192 // dtype.itemsize
    cdef int i, repeats = 64
    act.kind, act.alpha, act.beta, act.clip = ACTIVATIONS[name], 0, 0, np.inf
    x = np.linspace(-4, 4, size, dtype=dtype)
    out = np.empty_like(x)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        for i in range(repeats):
            k.map(&act, (<cnp.ndarray> x).data, (<cnp.ndarray> out).data, size)
        best = max(best, repeats * size / (time.perf_counter() - begin) / 1e9)
    return best
