"""Packed weights, and the passes that read them."""
from .kernels cimport Choices, fl_cell, fl_choices, fl_kernels, fl_pass, fl_term, fl_update

cdef struct Panel:
    char *p
    ptrdiff_t blocks            # blocks of units
    ptrdiff_t stride            # elements per block

cdef struct Task:               # weights to pack, see pack() in src_c/pack.h
    char *to
    const void *weight[4]
    ptrdiff_t unit_stride, k_stride, units, K, stride, blocks
    int sources
    bint gated

cdef struct Pass:               # one kernel call of a step
    fl_update update
    Panel panel
    char *scales                # of int8 panels
    int operand                 # of the second product
    const fl_term *term         # the term that this is; NULL: the projection
    bint back                   # its product is with the weights, not with their transposed
    bint whole                  # takes whole rows, has no product
    int first                   # column of the gates that its first column is
    ptrdiff_t D, K, H           # width of x and of the second operand, units
    int columns, x_columns, h_first, h_columns

cdef struct weights_t:
    const fl_kernels *k
    const fl_cell *cell
    int index                   # of the cell
    fl_pass run_pass            # for the kind of weights
    Pass passes[3]              # the cell's, then the projection
    int pass_count
    Task tasks[5]               # one per term, and the projection
    int task_count              # 0 once packed
    char *bias                  # [block][column][lanes]
    char *vectors               # [vector][H]
    int states                  # beside h
    int gate_columns            # of the tape
    const fl_choices *choices   # NULL: the defaults
    bint plain                  # not narrowed
    bint blas                   # products by BLAS, from the weights as they are
    char *weight[3]             # the weights as they are, by FL_IH, FL_HH, FL_HR; NULL: absent
    char *bias_row              # [columns][H] sums of the biases; NULL: none

cdef class Panels:
    cdef weights_t s
    cdef ptrdiff_t item, D, P
    cdef readonly ptrdiff_t H
    cdef readonly object dtype
    cdef Choices choices
    cdef dict weights           # by short name, without the suffix
    cdef tuple names            # with it: weights, biases
    cdef list vector_names      # and the per-unit parameters
    cdef list memory            # what the pointers point into; None: a pattern
    cdef ptrdiff_t size, panels_size    # of that memory and of the panels, with which it begins, bytes
    cdef bint weighed           # has biases
    cdef char *place(self, ptrdiff_t size) noexcept
    cdef void shift(self, ptrdiff_t by) noexcept
    cdef char *block_of(self, int weight, int row) noexcept
    cdef void add_pass(self, int index) except *
    cdef void add_term(self, const Pass *step, const fl_term *term, char *to, ptrdiff_t K) except *
    cdef void add_projection(self) except *
    cdef void pack_bias(self) except *
    cdef void point(self) except *
    cdef void pack_vectors(self) except *
    cdef void narrow(self, bint bf16) except *
    cdef void narrow_part(self, char *to, char *scales, const char *source, ptrdiff_t K, ptrdiff_t width,
                          bint bf16) noexcept

cdef void pack_share(const fl_kernels *k, const Task *tasks, int count, ptrdiff_t part, ptrdiff_t parts) noexcept nogil
cdef void room(Panel *panel, list memory, ptrdiff_t blocks, ptrdiff_t stride, ptrdiff_t item) except *
cdef void transposed(Task *task, Pass *step, list memory, Panels w, const fl_term *term, ptrdiff_t units,
                     ptrdiff_t K) except *
cdef const fl_term *term_of(const fl_cell *cell, int index, int operand) noexcept nogil
