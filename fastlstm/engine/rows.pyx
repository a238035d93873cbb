# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Rows: sequences are ordered by length, longest first; step t has `active[t]` rows, row (t, r) stands at
`offset[t] + r`."""
import numpy as np

cimport cython
cimport numpy as cnp
from libc.string cimport memcpy

from .memory cimport Buffer, data_of

cnp.import_array()


cdef ptrdiff_t cut(const rows_t *rows, ptrdiff_t part, ptrdiff_t parts) noexcept nogil:
    """First of the sequences that share `part` of `parts` takes: equal shares of the rows of all steps."""
    cdef ptrdiff_t low = 0, high = rows.N, middle, goal
    if part == parts or rows.R == rows.T * rows.N:
        return rows.N * part // parts
    goal = rows.R * part // parts
    while low < high:
        middle = (low + high) // 2
        if rows.work[middle] < goal:
            low = middle + 1
        else:
            high = middle
    return low


cdef ptrdiff_t step_of(const rows_t *rows, ptrdiff_t row) noexcept nogil:
    """The step that a row belongs to."""
    cdef ptrdiff_t low = 0, high = rows.T, middle
    while low < high:
        middle = (low + high) // 2
        if rows.offset[middle + 1] <= row:
            low = middle + 1
        else:
            high = middle
    return low


@cython.final
cdef class Rows:
    """Where the rows of T steps stand: `active[t]` rows from `offset[t]`.

    lengths: sorted, longest first; None: all T.
    """

    def __init__(self, Py_ssize_t T, Py_ssize_t N, lengths=None):
        cdef Py_ssize_t t, r
        cdef const ptrdiff_t *sizes
        self.allocate(T, N)
        if lengths is None:
            for t in range(T):
                self.s.active[t] = N
        else:
            if lengths.dtype != np.intp or lengths.shape != (N,) or not lengths.flags.c_contiguous:
                raise AssertionError(f"expected {N} contiguous lengths, got {lengths.dtype} {lengths.shape}")
            sizes = <const ptrdiff_t *> data_of(lengths)
            r = N
            for t in range(T):
                while r > 0 and sizes[r - 1] <= t:
                    r -= 1
                self.s.active[t] = r
        self.finish()

    cdef allocate(self, Py_ssize_t T, Py_ssize_t N):
        self.s.T, self.s.N = T, N
        self.memory = Buffer((2 * T + N + 2) * sizeof(ptrdiff_t))
        self.s.active = <ptrdiff_t *> self.memory.data
        self.s.offset = self.s.active + T
        self.s.work = self.s.offset + T + 1

    cdef finish(self):
        cdef Py_ssize_t t, r, length = self.s.T
        self.s.offset[0] = 0
        for t in range(self.s.T):
            self.s.offset[t + 1] = self.s.offset[t] + self.s.active[t]
        self.s.R = self.s.offset[self.s.T]
        self.s.work[0] = 0
        for r in range(self.s.N):
            while length > 0 and self.s.active[length - 1] <= r:
                length -= 1
            self.s.work[r + 1] = self.s.work[r] + length

    def window(self, Py_ssize_t begin, Py_ssize_t end):
        """The rows of steps begin..end as rows of their own."""
        cdef Rows rows = Rows.__new__(Rows)
        rows.allocate(end - begin, self.s.N)
        memcpy(rows.s.active, self.s.active + begin, (end - begin) * sizeof(ptrdiff_t))
        rows.finish()
        return rows

    def gather(self, cnp.ndarray x, cnp.ndarray order, cnp.ndarray out):
        """out [R, width] = the valid steps of x (T, N, width); order: the batch position of row r of a step."""
        cdef Py_ssize_t t, r, n, size = out.shape[1] * cnp.PyArray_ITEMSIZE(out)
        cdef const cnp.npy_intp *position = <const cnp.npy_intp *> order.data
        cdef char *to = out.data
        cdef bint plain = cnp.PyArray_TYPE(x) == cnp.PyArray_TYPE(out) and cnp.PyArray_ISNOTSWAPPED(x) and (
            x.shape[2] <= 1 or x.strides[2] == cnp.PyArray_ITEMSIZE(x))
        self.check(x, order, out)
        for t in range(self.s.T):
            n = self.s.active[t]
            if plain:
                for r in range(n):
                    memcpy(to + r * size, x.data + t * x.strides[0] + position[r] * x.strides[1], size)
            else:
                out[self.s.offset[t]:self.s.offset[t] + n] = x[t, order[:n]]
            to += n * size

    def scatter(self, cnp.ndarray rows, cnp.ndarray order, cnp.ndarray out):
        """The valid steps of out (T, N, width) = rows [R, width], whose rows are contiguous."""
        cdef Py_ssize_t t, r, row = 0, size = out.shape[2] * cnp.PyArray_ITEMSIZE(out)
        cdef const cnp.npy_intp *position = <const cnp.npy_intp *> order.data
        self.check(out, order, rows)
        if cnp.PyArray_TYPE(rows) != cnp.PyArray_TYPE(out) or not cnp.PyArray_IS_C_CONTIGUOUS(out) or (
                self.s.R > 0 and rows.shape[1] > 1 and rows.strides[1] != cnp.PyArray_ITEMSIZE(rows)):
            raise AssertionError(f"expected arrays of one type, got {rows.dtype}, {out.dtype}, row length {rows.shape[1]}")
        for t in range(self.s.T):
            for r in range(self.s.active[t]):
                memcpy(out.data + (t * self.s.N + position[r]) * size, rows.data + row * rows.strides[0], size)
                row += 1

    cdef check(self, cnp.ndarray array, cnp.ndarray order, cnp.ndarray rows):
        if array.ndim != 3 or array.shape[0] != self.s.T or array.shape[1] != self.s.N or rows.ndim != 2 or (
                rows.shape[0] != self.s.R or rows.shape[1] != array.shape[2] or order.ndim != 1 or
                order.shape[0] != self.s.N or cnp.PyArray_TYPE(order) != cnp.NPY_INTP or not cnp.PyArray_IS_C_CONTIGUOUS(order)):
            raise AssertionError(f"expected (T, N, .) and {self.s.R} rows, got {(<object> array).shape}, "
                                 f"{(<object> rows).shape}")

    def bounds(self, Py_ssize_t begin, Py_ssize_t end):
        """First row of step begin, first row of step end."""
        return self.s.offset[begin], self.s.offset[end]

    @property
    def T(self):
        return self.s.T

    @property
    def N(self):
        return self.s.N

    @property
    def R(self):
        return self.s.R
