"""One direction of one layer over rows: every array that the time loop touches."""
from .kernels cimport fl_term
from .memory cimport Array
from .rows cimport Rows, rows_t
from .weights cimport Panel, Panels, Pass, Task, weights_t

cdef struct Column:             # H columns of gradients of pre-activations, cut into strips by `products`
    int gate                    # which column of the gates it is; -1: none
    Array g                     # [R, units]
    ptrdiff_t units
    char *db_ih                 # gradients of the biases; may be absent
    char *db_hh

cdef struct Source:             # dW += dG' operand, for the columns first..end
    int operand, first, end
    ptrdiff_t width             # of the operand
    char *dw
    ptrdiff_t rows[4]           # first row of dw for each column

cdef struct run_t:
    const rows_t *rows
    const weights_t *w
    bint reverse, tape
    ptrdiff_t item, D, P, H, C  # C: width of c, states * H
    Array x, h, c, gates, m, h_masked, h_0, h_0_masked, c_0, h_n, c_n, mask, keep_h, keep_c
    Array dy, dh, dc, dx, dp    # dp [R, P]: gradient of the projection's output
    bint add_dx, past           # past: a part of dh goes past the products
    Pass back[4]                # the passes of a step backward
    int back_count
    Panel back_x                # of dx
    Task tasks[6]
    int task_count
    Column columns[11]          # the gates' columns that weights feed, then dp, then those of per-unit parameters alone
    int column_count
    Source sources[5]
    int source_count
    char *d_vectors[10]         # gradients of the per-unit parameters; NULL: summed with the column
    Array product               # [N, P or H] of a step by BLAS, beside the gates

cdef class Run:
    cdef run_t s
    cdef Rows rows
    cdef Panels w
    cdef list keep              # what the pointers point into
    cdef void add_back(self, const fl_term *term, bint follows) except *
    cdef void set_products(self, dict grads) except *
    cdef void set_vectors(self, dict grads) except *
    cdef void room_for_products(self) except *

cdef inline const Array *seen(const run_t *run, ptrdiff_t previous) noexcept nogil:
    """h_{t-1} as the products see it."""
    if run.mask.p:
        return &run.h_0_masked if previous < 0 else &run.h_masked
    return &run.h_0 if previous < 0 else &run.h
