"""Aligned memory, and arrays of rows in it."""

cdef class Buffer:
    cdef void *data
    cdef size_t size            # bytes, a multiple of 64
    cdef Py_ssize_t shape[1]

cdef struct Array:
    char *p                     # NULL: absent
    ptrdiff_t ld                # elements from one row to the next

cdef Array bind(object array, Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t item) except *
cdef char *data_of(object array) except? NULL

cdef inline char *at(Array a, ptrdiff_t row, ptrdiff_t item) noexcept nogil:
    return a.p + row * a.ld * item if a.p else NULL
