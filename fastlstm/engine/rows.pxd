"""Where the rows of T steps stand."""
cimport numpy as cnp

from .memory cimport Buffer

cdef struct rows_t:
    ptrdiff_t T, N, R
    ptrdiff_t *active           # [T] rows of step t
    ptrdiff_t *offset           # [T + 1] the first of them
    ptrdiff_t *work             # [N + 1] rows of the sequences before r, over all steps

cdef class Rows:
    cdef rows_t s
    cdef Buffer memory
    cdef allocate(self, Py_ssize_t T, Py_ssize_t N)
    cdef finish(self)
    cdef check(self, cnp.ndarray array, cnp.ndarray order, cnp.ndarray rows)

cdef ptrdiff_t cut(const rows_t *rows, ptrdiff_t part, ptrdiff_t parts) noexcept nogil
cdef ptrdiff_t step_of(const rows_t *rows, ptrdiff_t row) noexcept nogil

cdef inline ptrdiff_t step_rows(const rows_t *rows, ptrdiff_t t, ptrdiff_t r0, ptrdiff_t r1) noexcept nogil:
    """How many of the sequences [r0, r1) are active at step t; 0 outside 0..T-1."""
    cdef ptrdiff_t n = rows.active[t] if 0 <= t < rows.T else 0
    return max(0, min(n, r1) - r0)
