# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The recurrence: packing, one OpenMP team per call, the time loop, the products over all rows.

Rows: sequences are ordered by length, longest first; step t has `active[t]` rows, row (t, r) stands at `offset[t] + r`.
Letters as in src_c/fastlstm.h: T steps, N batch, D input width, H hidden units, P width of h, R rows in all.
"""
import os

import numpy as np

cimport cython
cimport numpy as cnp
from cython.parallel cimport parallel, threadid
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from ._kernels cimport *

cnp.import_array()

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #define FL_OPENMP 1
    #else
    #define omp_get_num_threads() 1
    #define FL_OPENMP 0
    #endif
    #include <pthread.h>
    #include <stdlib.h>
    /* libgomp hangs in a forked child: the child runs serial. */
    static int fl_forked;
    static void fl_in_child(void) { fl_forked = 1; }
    static void fl_watch_fork(void) { pthread_atfork(0, 0, fl_in_child); }
    static void *fl_allocate(size_t size)
    {
        void *p;
        return posix_memalign(&p, 64, size) ? 0 : p;
    }
    """
    int FL_OPENMP
    int omp_get_num_threads() nogil
    int fl_forked
    void fl_watch_fork()
    void *fl_allocate(size_t size) nogil

fl_watch_fork()
cdef int MAX_TEAM = 256
# Sequences that a thread carries through time together: their states and one panel fit the L2 cache, and fewer read the
# weights more often (python benchmarks/tune.py row_block: best at 1024 units, level below).
cdef ptrdiff_t ROW_BLOCK = 96
# See plan().
cdef ptrdiff_t X_CHUNK = 64
cdef ptrdiff_t UNITS_ROWS = 4           # rows per thread below which a team shares the units
cdef ptrdiff_t UNITS_ROWS_LARGE = 16    # the same for large weights
cdef double LARGE_WEIGHTS = 8e6         # bytes

# ---- ISA ---------------------------------------------------------------------------------------------------------------

cdef int current_isa


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


use_isa(os.environ.get("FASTLSTM_ISA") or available_isas()[fl_isa_count() - 1])


def has_openmp():
    return bool(FL_OPENMP)


def forked():
    """True in a forked child, where OpenMP cannot be used."""
    return bool(fl_forked)


cdef const fl_kernels *kernels(dtype) except NULL:
    if dtype == np.float32:
        return fl_kernels_for(current_isa, 0)
    if dtype == np.float64:
        return fl_kernels_for(current_isa, 1)
    raise TypeError(f"dtype: expected float32 or float64, got {dtype}")


ACTIVATIONS = {"tanh": FL_TANH, "sigmoid": FL_SIGMOID, "relu": FL_RELU, "softsign": FL_SOFTSIGN,
               "hard_tanh": FL_HARD_TANH, "hard_sigmoid": FL_HARD_SIGMOID, "identity": FL_IDENTITY}
CELLS = {"lstm": FL_LSTM, "gru": FL_GRU, "gru_reset_before": FL_GRU_RESET_BEFORE, "rnn": FL_RNN}
# Names of the columns of the tape's gates.
GATES = {"lstm": ("i", "f", "g", "o"), "gru": ("n", "r", "z"), "gru_reset_before": ("n", "r", "z"), "rnn": ("h",)}


# ---- memory ------------------------------------------------------------------------------------------------------------

# Blocks that calls have given back. Fresh memory costs a page fault per 4 KB, so panels, tapes and workspaces are kept.
# Guarded by the GIL; a call owns the blocks it has taken, so concurrent calls never share one.
DEF POOL = 32
cdef void *pool[POOL]
cdef size_t pool_size[POOL]


@cython.final
cdef class Buffer:
    """64-byte aligned memory that goes back to the pool when the last array on it is gone."""
    cdef void *data
    cdef size_t size
    cdef Py_ssize_t shape[1]

    def __cinit__(self, size_t size):
        cdef int i, best = -1
        size = max(64, (size + 63) // 64 * 64)
        for i in range(POOL):
            if pool[i] and size <= pool_size[i] <= 2 * size + 4096 and (best < 0 or pool_size[i] < pool_size[best]):
                best = i
        if best >= 0:
            self.data, self.size = pool[best], pool_size[best]
            pool[best] = NULL
        else:
            self.data, self.size = fl_allocate(size), size
            if not self.data:
                raise MemoryError(f"no memory for {size} bytes")

    def __dealloc__(self):
        cdef int i, slot = -1
        if not self.data:
            return
        for i in range(POOL):
            if not pool[i]:
                slot = i
                break
            if slot < 0 or pool_size[i] < pool_size[slot]:
                slot = i
        if pool[slot] and pool_size[slot] >= self.size:
            free(self.data)
            return
        free(pool[slot])
        pool[slot], pool_size[slot] = self.data, self.size

    def __getbuffer__(self, Py_buffer *view, int flags):
        self.shape[0] = self.size
        view.buf = self.data
        view.obj, view.len, view.itemsize = self, self.size, 1
        view.readonly, view.ndim, view.format = 0, 1, NULL
        view.shape, view.strides, view.suboffsets, view.internal = self.shape, &view.itemsize, NULL, NULL


def release_memory():
    """Give the memory kept between calls back to the system."""
    for i in range(POOL):
        free(pool[i])
        pool[i] = NULL


def empty(shape, dtype):
    """An uninitialised array on pooled memory."""
    cdef size_t size = dtype.itemsize
    for n in shape:
        size *= n
    return np.frombuffer(Buffer(size), dtype, size // dtype.itemsize).reshape(shape)


# ---- rows --------------------------------------------------------------------------------------------------------------

cdef struct rows_t:
    ptrdiff_t T, N, R
    ptrdiff_t *active
    ptrdiff_t *offset
    ptrdiff_t *work     # work[r]: rows of the sequences before r, over all steps


cdef ptrdiff_t cut(const rows_t *rows, ptrdiff_t i, ptrdiff_t of) noexcept nogil:
    """First of the sequences that share i of `of` takes: equal shares of the rows of all steps."""
    cdef ptrdiff_t low = 0, high = rows.N, middle, goal
    if i == of or rows.R == rows.T * rows.N:
        return rows.N * i // of
    goal = rows.R * i // of
    while low < high:
        middle = (low + high) // 2
        if rows.work[middle] < goal:
            low = middle + 1
        else:
            high = middle
    return low


@cython.final
cdef class Rows:
    """Where the rows of T steps stand: `active[t]` rows from `offset[t]`.

    lengths: sorted, longest first; None: all T.
    """
    cdef rows_t s
    cdef Buffer memory

    def __init__(self, Py_ssize_t T, Py_ssize_t N, lengths=None):
        cdef Py_ssize_t t, r
        cdef ptrdiff_t[::1] sizes
        self.allocate(T, N)
        if lengths is None:
            for t in range(T):
                self.s.active[t] = N
        else:
            sizes = lengths
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


# ---- arrays ------------------------------------------------------------------------------------------------------------

cdef struct Array:
    char *p             # NULL: absent
    ptrdiff_t ld        # elements from one row to the next


cdef Array bind(object array, Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t item) except *:
    """Memory of a [rows, columns] array whose rows are contiguous."""
    cdef Array a
    a.p, a.ld = NULL, 0
    if array is None:
        return a
    cdef cnp.ndarray x = array
    if x.ndim != 2 or x.shape[0] != rows or x.shape[1] != columns or cnp.PyArray_ITEMSIZE(x) != item or (
            columns > 1 and x.strides[1] != item):
        raise AssertionError(f"expected rows of shape {(rows, columns)}, got {array.shape}, strides {array.strides}")
    a.p, a.ld = x.data, (x.strides[0] if rows > 1 else columns * item) // item
    return a


cdef inline char *at(Array a, ptrdiff_t row, ptrdiff_t item) noexcept nogil:
    return a.p + row * a.ld * item if a.p else NULL


# ---- weights -----------------------------------------------------------------------------------------------------------

cdef struct Panel:
    char *p
    ptrdiff_t blocks    # blocks of units
    ptrdiff_t stride    # elements per block


cdef struct Task:           # weights to pack, see pack() in kernel_template.h
    char *to
    const void *weight[4]
    ptrdiff_t unit_stride, k_stride, units, K, stride, blocks
    int columns
    bint gated


cdef void pack_share(const fl_kernels *k, const Task *tasks, int count, ptrdiff_t i, ptrdiff_t of) noexcept nogil:
    """Part i of `of` of the blocks: in a team that shares the units those that the thread will use."""
    cdef int j
    for j in range(count):
        k.pack(tasks[j].to, tasks[j].weight, tasks[j].unit_stride, tasks[j].k_stride, tasks[j].units, tasks[j].K,
               tasks[j].columns, tasks[j].gated, tasks[j].stride, tasks[j].blocks * i // of,
               tasks[j].blocks * (i + 1) // of)


cdef struct weights_t:
    Task tasks[4]
    int task_count          # 0 once packed
    const fl_kernels *k
    const fl_cell *cell
    int id, activation, recurrent_activation
    bint bf16
    Panel forward[2]    # the cell's panels; those of R_n of the GRU with the reset gate before the product
    Panel project       # W_hr
    char *bias


cdef void linear_task(Task *task, Panel *panel, list memory, const fl_kernels *k, ptrdiff_t item, const void *weight,
                      ptrdiff_t unit_stride, ptrdiff_t k_stride, ptrdiff_t units, ptrdiff_t K) except *:
    """Panels of a product without gates: element (unit, k) at weight[unit * unit_stride + k * k_stride]."""
    room(panel, memory, (units + 4 * k.lanes - 1) // (4 * k.lanes), K * 4 * k.lanes, item)
    memset(task, 0, sizeof(Task))
    task.to, task.weight[0], task.columns, task.gated = panel.p, weight, 4, False
    task.unit_stride, task.k_stride, task.units, task.K = unit_stride, k_stride, units, K
    task.stride, task.blocks = panel.stride, panel.blocks


cdef void room(Panel *panel, list memory, ptrdiff_t blocks, ptrdiff_t stride, ptrdiff_t item) except *:
    cdef Buffer buffer = Buffer(blocks * stride * item)
    memory.append(buffer)
    panel.p, panel.blocks, panel.stride = <char *> buffer.data, blocks, stride


@cython.final
cdef class Panels:
    """One direction of one layer, packed for the step kernels; inference-only panels may hold bfloat16."""
    cdef weights_t s
    cdef ptrdiff_t item, D, P
    cdef readonly ptrdiff_t H
    cdef object dtype
    cdef dict weights
    cdef list memory

    def __init__(self, str cell, weights, str suffix, str activation, str recurrent_activation, str weight_type=None):
        cdef cnp.ndarray w_ih = weights["weight_ih" + suffix], w_hh = weights["weight_hh" + suffix]
        cdef weights_t *s = &self.s
        cdef Task *task
        cdef ptrdiff_t item = w_ih.itemsize, lanes, units, xc, hc
        cdef bint gated
        cdef int c
        s.id = CELLS[cell]
        s.cell = &fl_cells[s.id]
        s.k = kernels(w_ih.dtype)
        s.activation, s.recurrent_activation = ACTIVATIONS[activation], ACTIVATIONS[recurrent_activation]
        s.bf16 = weight_type == "bfloat16"
        gated = s.cell.columns > 1
        self.dtype, self.item = w_ih.dtype, item
        self.D, self.P = w_ih.shape[1], w_hh.shape[1]
        self.H = w_ih.shape[0] // len(GATES[cell])
        self.weights = {name: weights[name + suffix] for name in ("weight_ih", "weight_hh", "weight_hr", "bias_ih",
                                                                  "bias_hh") if name + suffix in weights}
        self.memory = []
        lanes = s.k.lanes
        units = lanes if gated else 4 * lanes
        xc = s.cell.x_columns if gated else 4
        hc = s.cell.h_columns if gated else 4
        room(&s.forward[0], self.memory, (self.H + units - 1) // units, (self.D * xc + self.P * hc) * lanes, item)
        memset(s.tasks, 0, sizeof(s.tasks))
        for c in range(2):
            task = &s.tasks[c]
            task.to, task.gated = s.forward[0].p, gated
            task.units, task.stride, task.blocks = self.H, s.forward[0].stride, s.forward[0].blocks
            task.k_stride = 1
        for c in range(s.cell.x_columns):
            s.tasks[0].weight[c] = w_ih.data + s.cell.x_gate[c] * self.H * self.D * item
        s.tasks[0].columns, s.tasks[0].unit_stride, s.tasks[0].K = <int> xc, self.D, self.D
        for c in range(s.cell.h_columns):
            s.tasks[1].weight[c] = w_hh.data + s.cell.h_gate[c] * self.H * self.P * item
        s.tasks[1].to += self.D * xc * lanes * item
        s.tasks[1].columns, s.tasks[1].unit_stride, s.tasks[1].K = <int> hc, self.P, self.P
        s.task_count = 2
        if s.id == FL_GRU_RESET_BEFORE:
            linear_task(&s.tasks[2], &s.forward[1], self.memory, s.k, item, w_hh.data + 2 * self.H * self.P * item, self.P,
                        1, self.H, self.P)
            s.task_count = 3
        if "weight_hr" in self.weights:
            linear_task(&s.tasks[2], &s.project, self.memory, s.k, item, data_of(self.weights["weight_hr"]), self.H, 1,
                        self.P, self.H)
            s.task_count = 3
        if "bias_ih" in self.weights:
            self.pack_bias(gated, lanes)
        if s.bf16:
            self.pack()
            self.narrow(&s.forward[0], self.D, self.P, <int> xc, <int> hc, 0 if gated else self.H)
            if s.id == FL_GRU_RESET_BEFORE:
                self.narrow(&s.forward[1], 0, self.P, 4, 4, self.H)
            if "weight_hr" in self.weights:
                self.narrow(&s.project, 0, self.H, 4, 4, self.P)

    def pack(self):
        """Pack now, on this thread; otherwise the first call's team does it."""
        pack_share(self.s.k, self.s.tasks, self.s.task_count, 0, 1)
        self.s.task_count = 0
        return self

    @property
    def columns(self):
        """Columns of H values in a row of the tape's gates."""
        return self.s.cell.columns

    @property
    def projects(self):
        return self.s.project.p != NULL

    cdef narrow(self, Panel *panel, ptrdiff_t D, ptrdiff_t K, int x_columns, int h_columns, ptrdiff_t units):
        """Packed panels as bfloat16: words of two k, see to_bf16."""
        cdef ptrdiff_t lanes = self.s.k.lanes, block, left
        cdef Panel wide = panel[0]
        cdef char *source
        cdef char *to
        room(panel, self.memory, wide.blocks, ((D + 1) // 2 * x_columns + (K + 1) // 2 * h_columns) * lanes, self.item)
        for block in range(wide.blocks):
            source, to = wide.p + block * wide.stride * self.item, panel.p + block * panel.stride * self.item
            left = (units - block * 4 * lanes + lanes - 1) // lanes if units else 4
            self.s.k.to_bf16(to, source, D, min(left, x_columns) * lanes)
            self.s.k.to_bf16(to + (D + 1) // 2 * x_columns * lanes * self.item, source + D * x_columns * lanes * self.item, K,
                             min(left, h_columns) * lanes)

    cdef pack_bias(self, bint gated, ptrdiff_t lanes):
        """What the products start from: [block][column][lanes]."""
        cdef char *b_ih = data_of(self.weights["bias_ih"])
        cdef char *b_hh = data_of(self.weights["bias_hh"])
        cdef const fl_cell *cell = self.s.cell
        cdef const void *first[4]
        cdef const void *second[4]
        cdef int c, columns = 4 if self.s.id == FL_GRU else cell.x_columns
        cdef ptrdiff_t blocks = self.s.forward[0].blocks * (1 if gated else 4)
        cdef Buffer buffer = Buffer(blocks * columns * lanes * self.item)
        for c in range(cell.x_columns):
            first[c] = b_ih + cell.x_gate[c] * self.H * self.item
            second[c] = b_hh + cell.x_gate[c] * self.H * self.item
        if self.s.id == FL_GRU:         # b_hn belongs to q
            first[3], second[3], second[0] = NULL, second[0], NULL
        self.s.k.pack_bias(buffer.data, first, second, self.H, columns, blocks)
        self.memory.append(buffer)
        self.s.bias = <char *> buffer.data


# ---- one direction of one layer ----------------------------------------------------------------------------------------

cdef struct run_t:
    const rows_t *rows
    const weights_t *w
    bint reverse, tape
    ptrdiff_t item, D, P, H
    Array x, h, c, gates, m, h_masked, h_0, h_0_masked, c_0, h_n, c_n, mask, keep_h, keep_c
    Array dy, dh, dc, dx, dp            # dp [R,P]: gradient of the projection's output
    bint add_dx
    Task tasks[10]
    int task_count
    Panel back, back_x, back_n, back_project
    char *dw_ih                         # gradients of the weights; biases and projection may be absent
    char *dw_hh
    char *dw_hr
    char *db_ih
    char *db_hh


cdef char *data_of(object array) except? NULL:
    return NULL if array is None else (<cnp.ndarray> array).data


@cython.final
cdef class Run:
    """One direction of one layer over rows: every array that the time loop touches.

    Training keeps c [R,H] and gates [R,G*H]; inference has c None, and the cell state lives in c_n.
    State arrays are [N,.] in the order of the rows; h_n and c_n are written.
    """
    cdef run_t s
    cdef Rows rows
    cdef Panels w
    cdef list keep                      # what the pointers point into

    def __init__(self, Rows rows, Panels w, bint reverse, x, h, h_0, h_n, c_0=None, c_n=None, c=None, gates=None, m=None,
                 h_masked=None, h_0_masked=None, mask=None, keep_h=None, keep_c=None):
        cdef ptrdiff_t R = rows.s.R, N = rows.s.N, item = w.item, D = w.D, P = w.P, H = w.H
        cdef run_t *s = &self.s
        memset(s, 0, sizeof(run_t))
        self.rows, self.w = rows, w
        s.rows, s.w, s.reverse, s.item, s.D, s.P, s.H = &rows.s, &w.s, reverse, item, D, P, H
        s.tape = gates is not None
        s.x, s.h = bind(x, R, D, item), bind(h, R, P, item)
        s.h_0, s.h_n = bind(h_0, N, P, item), bind(h_n, N, P, item)
        s.c_0, s.c_n, s.c = bind(c_0, N, H, item), bind(c_n, N, H, item), bind(c, R, H, item)
        s.gates, s.m = bind(gates, R, w.s.cell.columns * H, item), bind(m, R if s.tape else N, H, item)
        s.h_masked, s.h_0_masked, s.mask = bind(h_masked, R, P, item), bind(h_0_masked, N, P, item), bind(mask, N, P, item)
        s.keep_h, s.keep_c = bind(keep_h, R, P, item), bind(keep_c, R, H, item)
        self.keep = [x, h, h_0, h_n, c_0, c_n, c, gates, m, h_masked, h_0_masked, mask, keep_h, keep_c]

    def set_backward(self, grads, str suffix, dy, dh, dc=None, dx=None, bint add_dx=False):
        """What backward needs. dh, dc [N,.]: gradients of the last states in, of the first states out.

        grads: arrays that are added to. dx: None if not wanted; add_dx: add to it, where the run is alone.
        """
        cdef run_t *s = &self.s
        cdef const fl_kernels *k = s.w.k
        cdef const fl_cell *cell = s.w.cell
        cdef ptrdiff_t R = s.rows.R, N = s.rows.N, item = s.item, H = s.H, P = s.P
        cdef char *w_hh = data_of(self.w.weights["weight_hh"])
        s.dy, s.dh, s.dc, s.dx = bind(dy, R, P, item), bind(dh, N, P, item), bind(dc, N, H, item), bind(dx, R, s.D, item)
        s.add_dx = add_dx
        s.dw_ih, s.dw_hh = data_of(grads["weight_ih" + suffix]), data_of(grads["weight_hh" + suffix])
        s.db_ih, s.db_hh = data_of(grads.get("bias_ih" + suffix)), data_of(grads.get("bias_hh" + suffix))
        s.dw_hr = data_of(grads.get("weight_hr" + suffix))
        self.keep += [dy, dh, dc, dx, grads]
        linear_task(&s.tasks[0], &s.back, self.keep, k, item, w_hh + cell.h_gate[0] * H * P * item, 1, P, P,
                    cell.h_columns * H)
        s.task_count = 1
        if s.w.id == FL_GRU_RESET_BEFORE:
            linear_task(&s.tasks[1], &s.back_n, self.keep, k, item, w_hh + 2 * H * P * item, 1, P, H, H)
            s.task_count = 2
        if s.w.project.p:
            linear_task(&s.tasks[1], &s.back_project, self.keep, k, item, data_of(self.w.weights["weight_hr"]), 1, H, H, P)
            s.task_count = 2
            dp = empty((R, P), self.w.dtype)
            s.dp = bind(dp, R, P, item)
            self.keep.append(dp)
        if dx is not None:
            self.input_tasks(data_of(self.w.weights["weight_ih"]))

    cdef input_tasks(self, char *weight):
        """Panels of dx = dG W_ih: k runs over the gates' columns, whose rows of W_ih come in another order. The last block
        may be narrower, so that its columns start elsewhere."""
        cdef run_t *s = &self.s
        cdef ptrdiff_t lanes = s.w.k.lanes, H = s.H, D = s.D, units = 4 * lanes, full = D // units, width
        cdef int c
        cdef bint last
        cdef Panel *panel = &s.back_x
        cdef Task *task
        room(panel, self.keep, (D + units - 1) // units, s.w.cell.x_columns * H * units, s.item)
        for c in range(s.w.cell.x_columns):
            for last in range(2):
                task = &s.tasks[s.task_count]
                memset(task, 0, sizeof(Task))
                width = (D - full * units + lanes - 1) // lanes * lanes if last else units
                task.to = panel.p + (last * full * panel.stride + c * H * width) * s.item
                task.weight[0] = weight + (s.w.cell.x_gate[c] * H * D + last * full * units) * s.item
                task.unit_stride, task.k_stride, task.K, task.columns, task.gated = 1, D, H, 4, False
                task.units, task.stride = D - full * units if last else full * units, panel.stride
                task.blocks = (width > 0) if last else full
                s.task_count += 1


# Rows [row, row + n) of one step are the sequences [r, r + n). `previous` is the row of r at the step before (in the
# direction of the run), -1: there is none, the initial state stands before. A share is i of `of` of a pass's blocks.
cdef struct Share:
    ptrdiff_t i, of


cdef inline void use(fl_step *s, const Panel *panel, Share share) noexcept nogil:
    s.panels = panel.p
    s.begin = panel.blocks * share.i // share.of
    s.end = panel.blocks * (share.i + 1) // share.of


cdef void start(const run_t *q, fl_step *s, ptrdiff_t row, ptrdiff_t r, ptrdiff_t n, ptrdiff_t gate_row) noexcept nogil:
    """What all passes of a step have in common."""
    cdef ptrdiff_t item = q.item
    memset(s, 0, sizeof(fl_step))
    s.n, s.D, s.K, s.H = n, q.D, q.P, q.H
    s.gates, s.ldgates = at(q.gates, gate_row, item), q.gates.ld
    s.mask, s.ldmask = at(q.mask, r, item), q.mask.ld
    s.keep_h, s.ldkeep_h = at(q.keep_h, row, item), q.keep_h.ld
    s.keep_c, s.ldkeep_c = at(q.keep_c, row, item), q.keep_c.ld
    s.activation, s.recurrent_activation = q.w.activation, q.w.recurrent_activation


cdef inline void previous_state(const run_t *q, fl_step *s, ptrdiff_t r, ptrdiff_t previous) noexcept nogil:
    """h_{t-1} as it is, and c_{t-1}."""
    cdef const Array *h = &q.h_0 if previous < 0 else &q.h
    s.h_prev, s.ldh_prev = at(h[0], r if previous < 0 else previous, q.item), h.ld
    if not q.c.p:                       # inference: updated in place
        s.c_prev, s.ldc_prev = at(q.c_n, r, q.item), q.c_n.ld
    elif previous < 0:
        s.c_prev, s.ldc_prev = at(q.c_0, r, q.item), q.c_0.ld
    else:
        s.c_prev, s.ldc_prev = at(q.c, previous, q.item), q.c.ld


cdef inline const Array *seen(const run_t *q, ptrdiff_t previous) noexcept nogil:
    """h_{t-1} as the products see it."""
    if q.mask.p:
        return &q.h_0_masked if previous < 0 else &q.h_masked
    return &q.h_0 if previous < 0 else &q.h


cdef void forward_pass(const run_t *q, int p, ptrdiff_t row, ptrdiff_t r, ptrdiff_t n, ptrdiff_t previous, ptrdiff_t gate_row,
                       bint preloaded, Share share) noexcept nogil:
    """Pass p of one step: first the cell's own, then the projection."""
    cdef fl_step s
    cdef const fl_kernels *k = q.w.k
    cdef ptrdiff_t item = q.item
    cdef fl_pass run
    cdef const Array *h = seen(q, previous)
    cdef bint last = not q.m.p or p == q.w.cell.passes   # this pass writes h
    cdef int cell = FL_LINEAR if p == q.w.cell.passes else q.w.id
    cdef int index = 0 if cell == FL_LINEAR else p
    start(q, &s, row, r, n, gate_row)
    previous_state(q, &s, r, previous)
    s.tape = q.tape
    s.ahead = (row - previous) * s.ldgates if previous >= 0 else 0
    if last:
        s.h, s.ldh = at(q.h, row, item), q.h.ld
        if q.mask.p:
            s.h_masked, s.ldh_masked = at(q.h_masked, row, item), q.h_masked.ld
    else:
        s.h, s.ldh = at(q.m, row if q.tape else r, item), q.m.ld
        s.keep_h = NULL
    if q.c.p:
        s.c, s.ldc = at(q.c, row, item), q.c.ld
    else:
        s.c, s.ldc = at(q.c_n, r, item), q.c_n.ld
    s.h_in, s.ldh_in = at(h[0], r if previous < 0 else previous, item), h.ld
    if p == 0:
        use(&s, &q.w.forward[0], share)
        s.preloaded = preloaded
        s.bias = q.w.bias
        if not preloaded:
            s.x, s.ldx = at(q.x, row, item), q.x.ld
    elif cell == FL_LINEAR:
        use(&s, &q.w.project, share)
        s.D, s.K, s.H = 0, q.H, q.P
        s.h_in, s.ldh_in = at(q.m, row if q.tape else r, item), q.m.ld
    else:
        use(&s, &q.w.forward[1], share)
        s.D, s.preloaded = 0, 1
        s.h_in, s.ldh_in = <char *> s.gates + 3 * q.H * item, s.ldgates
    run = k.forward_bf16[cell][index] if q.w.bf16 else k.forward[cell][index]
    run(&s)


cdef void input_pass(const run_t *q, ptrdiff_t row, ptrdiff_t n, ptrdiff_t gate_row, Share share) noexcept nogil:
    """gates = bias + W x for n rows."""
    cdef fl_step s
    start(q, &s, row, 0, n, gate_row)
    s.x, s.ldx = at(q.x, row, q.item), q.x.ld
    s.bias = q.w.bias
    use(&s, &q.w.forward[0], share)
    q.w.k.input[q.w.id](&s)


cdef inline ptrdiff_t step_rows(const rows_t *rows, ptrdiff_t t, ptrdiff_t r0, ptrdiff_t r1) noexcept nogil:
    """How many of the sequences [r0, r1) are active at step t; 0 outside 0..T-1."""
    cdef ptrdiff_t n = rows.active[t] if 0 <= t < rows.T else 0
    return max(0, min(n, r1) - r0)


cdef void carry_rows(const run_t *q, ptrdiff_t r0, ptrdiff_t r1, Share share, fl_barrier *barrier, ptrdiff_t chunk) noexcept nogil:
    """The time loop for the sequences [r0, r1).

    share: this thread's units, the team meets after every pass. chunk: rows of the gates that take bias + W x for
    several steps at once (0: none; then r0, r1 are the whole batch), so that W_ih is read once per chunk.
    """
    cdef const rows_t *rows = q.rows
    cdef ptrdiff_t i, j, t, n, m, row, previous, before, T = rows.T, low, high, origin = 0, ready = 0
    cdef int p, passes = q.w.cell.passes + (q.m.p != NULL)
    cdef ptrdiff_t gate_row
    for i in range(T):
        t = T - 1 - i if q.reverse else i
        n = step_rows(rows, t, r0, r1)
        if n == 0:
            continue
        row = rows.offset[t] + r0
        if chunk and i >= ready:
            j = i + 1                   # steps i..j of the loop share the gates' memory
            low, high = rows.offset[t], rows.offset[t + 1]
            while j < T:
                t = T - 1 - j if q.reverse else j
                if max(high, rows.offset[t + 1]) - min(low, rows.offset[t]) > chunk:
                    break
                low, high = min(low, rows.offset[t]), max(high, rows.offset[t + 1])
                j += 1
            t = T - 1 - i if q.reverse else i
            ready, origin = j, low
            input_pass(q, low, high - low, low if q.tape else 0, share)
        gate_row = row if q.tape else row - origin if chunk else r0
        before = t + 1 if q.reverse else t - 1
        m = min(n, step_rows(rows, before, r0, r1))
        previous = rows.offset[before] + r0 if m else -1
        for p in range(passes):
            if m:
                forward_pass(q, p, row, r0, m, previous, gate_row, chunk != 0, share)
            if m < n:
                forward_pass(q, p, row + m, r0 + m, n - m, -1, gate_row + m, chunk != 0, share)
            if share.of > 1:
                fl_barrier_wait(barrier, <int> share.of)


# ---- backward through one step -----------------------------------------------------------------------------------------

cdef void backward_pass(const run_t *q, int p, ptrdiff_t row, ptrdiff_t r, ptrdiff_t n, ptrdiff_t previous, ptrdiff_t following,
                        Share share) noexcept nogil:
    """Pass p of one step; with a projection the first gathers the gradient of its output. following: the row of r at the
    step after, -1: there is none."""
    cdef fl_step s
    cdef const fl_kernels *k = q.w.k
    cdef const fl_cell *cell = q.w.cell
    cdef ptrdiff_t item = q.item
    cdef bint past = q.w.id == FL_GRU or q.w.id == FL_GRU_RESET_BEFORE or q.keep_h.p != NULL
    cdef const Array *h
    start(q, &s, row, r, n, row)
    previous_state(q, &s, r, previous)
    s.D = 0
    if previous >= 0:
        s.ahead = (previous - row) * s.ldgates
    s.dc, s.lddc = at(q.dc, r, item), q.dc.ld
    if p == 0:
        use(&s, &q.back, share)
        s.K = cell.h_columns * q.H
        if following >= 0:
            s.h_in, s.ldh_in = at(q.gates, following, item) + cell.h_first * q.H * item, q.gates.ld
        if past or following < 0:
            s.dh_in, s.lddh_in = at(q.dh, r, item), q.dh.ld
        if past:
            s.dh_out, s.lddh_out = at(q.dh, r, item), q.dh.ld
        s.dy, s.lddy = at(q.dy, row, item), q.dy.ld
        if q.m.p:
            s.H = q.P
            s.h, s.ldh = at(q.dp, row, item), q.dp.ld
            k.backward[FL_LINEAR][0](&s)
        else:
            k.backward[q.w.id][0](&s)
    elif q.m.p:
        use(&s, &q.back_project, share)
        s.K = q.P
        s.h_in, s.ldh_in = at(q.dp, row, item), q.dp.ld
        s.mask = s.keep_h = NULL
        k.backward[q.w.id][0](&s)
    else:
        use(&s, &q.back_n, share)
        s.K = q.H
        s.h_in, s.ldh_in = s.gates, s.ldgates
        h = seen(q, previous)
        s.c_prev, s.ldc_prev = at(h[0], r if previous < 0 else previous, item), h.ld
        s.dh_out, s.lddh_out = at(q.dh, r, item), q.dh.ld
        k.backward[q.w.id][1](&s)


cdef void first_state(const run_t *q, ptrdiff_t row, ptrdiff_t r, ptrdiff_t n, Share share) noexcept nogil:
    """dh of the state before the rows [row, row + n), in place of the gradient that has not gone through the cell."""
    cdef fl_step s
    if n <= 0:
        return
    start(q, &s, row, r, n, row)
    use(&s, &q.back, share)
    s.D, s.K, s.H = 0, q.w.cell.h_columns * q.H, q.P
    s.keep_h = NULL
    s.h_in, s.ldh_in = at(q.gates, row, q.item) + q.w.cell.h_first * q.H * q.item, q.gates.ld
    s.h, s.ldh = at(q.dh, r, q.item), q.dh.ld
    if q.w.id == FL_GRU or q.w.id == FL_GRU_RESET_BEFORE or q.keep_h.p:
        s.dh_in, s.lddh_in = s.h, s.ldh
    q.w.k.backward[FL_LINEAR][0](&s)


cdef void carry_back(const run_t *q, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t r0, ptrdiff_t r1, Share share,
                     fl_barrier *barrier) noexcept nogil:
    """The time loop backward for the sequences [r0, r1) and its own steps [begin, end): gates become gradients, and in the
    end dh and dc those of the first states."""
    cdef const rows_t *rows = q.rows
    cdef ptrdiff_t i, t, n, split, row, before, after, has_previous, has_following, T = rows.T
    cdef int p, passes = q.w.cell.passes + (q.m.p != NULL)
    for i in range(begin, end):
        t = i if q.reverse else T - 1 - i
        n = step_rows(rows, t, r0, r1)
        if n == 0:
            continue
        row = rows.offset[t] + r0
        before, after = (t + 1, t - 1) if q.reverse else (t - 1, t + 1)
        has_previous = min(n, step_rows(rows, before, r0, r1))
        has_following = min(n, step_rows(rows, after, r0, r1))
        split = min(has_previous, has_following)      # one of the two is n or 0, so this splits the rows at most once
        if split == 0:
            split = max(has_previous, has_following)
        for p in range(passes):
            if split:
                backward_pass(q, p, row, r0, split, rows.offset[before] + r0 if has_previous else -1,
                              rows.offset[after] + r0 if has_following else -1, share)
            if split < n:
                backward_pass(q, p, row + split, r0 + split, n - split,
                              rows.offset[before] + r0 + split if has_previous > split else -1,
                              rows.offset[after] + r0 + split if has_following > split else -1, share)
            if share.of > 1:
                fl_barrier_wait(barrier, <int> share.of)
    if end < T:
        return
    if q.reverse:
        for t in range(T):
            n = step_rows(rows, t, r0, r1)
            split = min(n, step_rows(rows, t + 1, r0, r1))
            first_state(q, rows.offset[t] + r0 + split, r0 + split, n - split, share)
    else:
        first_state(q, r0, r0, step_rows(rows, 0, r0, r1), share)


# ---- products over all rows: dW += dG' [x, h_prev], db += sums of dG ----------------------------------------------------

# float32 rows (of float64 half as many, so that a strip fits the L1 cache; python benchmarks/tune.py chunk: level from 256
# to 2048) that are cut into strips and panels at a time. The sums run over the rows in the order of the backward pass, one
# chain per element that starts from what the gradient holds, so neither this constant nor the threads nor a split of the
# sequence into windows changes a bit.
cdef ptrdiff_t CHUNK = 512

cdef struct source_t:       # the second factor, [R, width]: dW[gate of c] += dG[:, c]' factor, for the columns first..end
    int kind, first, end
    ptrdiff_t width, panels
    char *out
cdef enum: X, PREVIOUS, RESET, CELL


cdef int sources_of(const run_t *q, source_t *list) noexcept nogil:
    cdef const fl_cell *cell = q.w.cell
    cdef int count = 2, i
    list[0].kind, list[0].first, list[0].end, list[0].width, list[0].out = X, 0, cell.x_columns, q.D, q.dw_ih
    list[1].kind, list[1].first, list[1].end = PREVIOUS, cell.h_first, cell.h_first + cell.h_columns
    list[1].width, list[1].out = q.P, q.dw_hh
    if q.w.id == FL_GRU_RESET_BEFORE:
        list[2].kind, list[2].first, list[2].end, list[2].width, list[2].out = RESET, 0, 1, q.H, q.dw_hh
        count = 3
    if q.m.p:
        list[2].kind, list[2].first, list[2].end, list[2].width, list[2].out = CELL, 4, 5, q.H, q.dw_hr
        count = 3
    for i in range(count):
        list[i].panels = (list[i].width + q.w.k.panel - 1) // q.w.k.panel
    return count


cdef inline ptrdiff_t weight_row(const run_t *q, int kind, int column) noexcept nogil:
    """First row of the weights that a column of the gates belongs to."""
    if kind == X:
        return q.w.cell.x_gate[column] * q.H
    if kind == PREVIOUS:
        return q.w.cell.h_gate[column - q.w.cell.h_first] * q.H
    return 2 * q.H if kind == RESET else 0


cdef inline ptrdiff_t strips_of(const run_t *q, int column) noexcept nogil:
    """Strips of a column of the gates; column 4 stands for the gradient of the projection's output."""
    cdef ptrdiff_t units = q.P if column == 4 else q.H
    return (units + q.w.k.strip - 1) // q.w.k.strip


cdef inline int last_column(const run_t *q) noexcept nogil:
    if q.m.p:
        return 5
    return 3 if q.w.id == FL_GRU_RESET_BEFORE else q.w.cell.columns


cdef inline ptrdiff_t chunk_rows(ptrdiff_t item) noexcept nogil:
    return max(1, CHUNK * 4 // item)


cdef inline ptrdiff_t slice_size(ptrdiff_t rows, ptrdiff_t width) noexcept nogil:
    """Elements of a slice. A cache line more than it holds, lest slices of 2^n bytes all fall into the same cache sets."""
    return rows * width + 16


cdef ptrdiff_t product_memory(const run_t *q) noexcept nogil:
    """Elements of the memory that `products` shares."""
    cdef source_t list[3]
    cdef ptrdiff_t total = 0, rows = min(chunk_rows(q.item), q.rows.R)
    cdef int i
    for i in range(sources_of(q, list)):
        total += list[i].panels * slice_size(rows, q.w.k.panel)
    for i in range(last_column(q)):
        total += strips_of(q, i) * slice_size(rows, q.w.k.strip)
    return total


cdef void factor_rows(const run_t *q, int kind, char *out, ptrdiff_t slice_stride, ptrdiff_t low, ptrdiff_t high,
                      ptrdiff_t first, ptrdiff_t columns) noexcept nogil:
    """Panels of rows [low, high) of a factor, its columns from `first` on, in the order of the backward pass."""
    cdef const rows_t *rows = q.rows
    cdef ptrdiff_t item = q.item, row, r, n, m, t, before
    cdef Array a
    if kind == X:
        piece(q, out, slice_stride, low, high, low, high, at(q.x, low, item) + first * item, q.x.ld, columns)
    elif kind == CELL:
        piece(q, out, slice_stride, low, high, low, high, at(q.m, low, item) + first * item, q.m.ld, columns)
    elif kind == RESET:
        piece(q, out, slice_stride, low, high, low, high, at(q.gates, low, item) + (3 * q.H + first) * item, q.gates.ld,
              columns)
    else:
        t = 0
        row = 0
        n = rows.T                      # the step of row `low`
        while row < n:
            m = (row + n) // 2
            if rows.offset[m + 1] <= low:
                row = m + 1
            else:
                n = m
        t, row = row, low
        while row < high:
            r = row - rows.offset[t]
            before = t + 1 if q.reverse else t - 1
            n = min(high, rows.offset[t + 1]) - row
            m = min(n, step_rows(rows, before, r, rows.N))
            if m:
                a = seen(q, 0)[0]
                piece(q, out, slice_stride, low, high, row, row + m, at(a, rows.offset[before] + r, item) + first * item,
                      a.ld, columns)
            if m < n:
                a = seen(q, -1)[0]
                piece(q, out, slice_stride, low, high, row + m, row + n, at(a, r + m, item) + first * item, a.ld, columns)
            row += n
            t += 1


cdef inline void piece(const run_t *q, char *out, ptrdiff_t slice_stride, ptrdiff_t low, ptrdiff_t high, ptrdiff_t a,
                       ptrdiff_t b, const char *src, ptrdiff_t ld, ptrdiff_t columns) noexcept nogil:
    """Rows [a, b) of the chunk [low, high), src the first of them."""
    cdef const fl_kernels *k = q.w.k
    if q.reverse:
        k.slices(out + (a - low) * k.panel * q.item, slice_stride, k.panel, b - a, src, ld, columns, NULL, NULL)
    else:
        k.slices(out + (high - b) * k.panel * q.item, slice_stride, k.panel, b - a, src + (b - a - 1) * ld * q.item, -ld,
                 columns, NULL, NULL)


cdef void products(const run_t *q, char *memory, ptrdiff_t first_row, ptrdiff_t last_row, ptrdiff_t i, ptrdiff_t of,
                   fl_barrier *barrier) noexcept nogil:
    """The rows [first_row, last_row): thread i of `of` computes its strips of gate columns, for all factors."""
    cdef const fl_kernels *k = q.w.k
    cdef source_t list[3]
    cdef source_t *f
    cdef int count = sources_of(q, list), c, j, last = last_column(q)
    cdef ptrdiff_t item = q.item, R = last_row - first_row, size = min(chunk_rows(item), q.rows.R), done, low, high, n
    cdef ptrdiff_t total = 0, panels = 0, mine, end, p, first, s, s0, s1, units, base, ld, width, row
    cdef char *strips
    cdef char *g
    cdef char *sum_ih
    cdef char *sum_hh
    cdef ptrdiff_t panel = slice_size(size, k.panel), strip = slice_size(size, k.strip)
    for c in range(last):
        total += strips_of(q, c)
    for j in range(count):
        panels += list[j].panels
    strips = memory + panels * panel * item
    done = 0
    while done < R:
        n = min(size, R - done)
        low = first_row + done if q.reverse else last_row - done - n
        high = low + n
        base = 0                        # panels, shared out one by one
        for j in range(count):
            f = &list[j]
            p, end = max(0, panels * i // of - base), min(f.panels, panels * (i + 1) // of - base)
            if p < end:
                factor_rows(q, f.kind, memory + (base + p) * panel * item, panel, low, high,
                            p * k.panel, min(f.width, end * k.panel) - p * k.panel)
            base += f.panels
        base = 0
        for c in range(last):           # this thread's strips, and the biases' gradients
            mine = strips_of(q, c)
            s0, s1 = max(0, total * i // of - base), min(mine, total * (i + 1) // of - base)
            if s0 < s1:
                units = q.P if c == 4 else q.H
                first = s0 * k.strip
                width = min(units, s1 * k.strip) - first
                if c == 4:
                    g, ld = at(q.dp, low, item) + first * item, q.dp.ld
                else:
                    g, ld = at(q.gates, low, item) + (c * q.H + first) * item, q.gates.ld
                sum_ih = sum_hh = NULL
                if q.db_ih and c < q.w.cell.x_columns:
                    sum_ih = q.db_ih + (q.w.cell.x_gate[c] * q.H + first) * item
                    if q.w.id != FL_GRU:
                        sum_hh = q.db_hh + (q.w.cell.x_gate[c] * q.H + first) * item
                if q.db_ih and q.w.id == FL_GRU and c >= 1:
                    sum_hh = q.db_hh + (q.w.cell.h_gate[c - 1] * q.H + first) * item
                if not q.reverse:
                    g, ld = g + (n - 1) * ld * item, -ld
                k.slices(strips + (base + s0) * strip * item, strip, k.strip, n, g, ld, width, sum_ih,
                         sum_hh)
            base += mine
        fl_barrier_wait(barrier, <int> of)
        p = 0
        for j in range(count):
            f = &list[j]
            first = 0
            while first < f.width:
                base = 0
                for c in range(last):
                    mine = strips_of(q, c)
                    if f.first <= c < f.end:
                        units = q.P if c == 4 else q.H
                        row = weight_row(q, f.kind, c)
                        s0, s1 = max(0, total * i // of - base), min(mine, total * (i + 1) // of - base)
                        for s in range(s0, s1):
                            k.outer(f.out + ((row + s * k.strip) * f.width + first) * item, f.width,
                                    min(k.strip, units - s * k.strip), min(k.panel, f.width - first), n,
                                    strips + (base + s) * strip * item, memory + p * panel * item)
                    base += mine
                first += k.panel
                p += 1
        fl_barrier_wait(barrier, <int> of)
        done += n


cdef void input_gradient(const run_t *q, ptrdiff_t begin, ptrdiff_t end, bint add, ptrdiff_t i,
                         ptrdiff_t of) noexcept nogil:
    """dx = dG W_ih (+ dx) for thread i's part of the rows of the steps [begin, end)."""
    cdef fl_step s
    cdef ptrdiff_t row, high
    if begin >= end:
        return
    row, high = q.rows.offset[begin], q.rows.offset[end]
    row, high = row + (high - row) * i // of, row + (high - row) * (i + 1) // of
    while row < high:
        memset(&s, 0, sizeof(fl_step))
        s.n, s.K, s.H = min(ROW_BLOCK, high - row), q.w.cell.x_columns * q.H, q.D
        s.panels, s.begin, s.end = q.back_x.p, 0, q.back_x.blocks
        s.h_in, s.ldh_in = at(q.gates, row, q.item), q.gates.ld
        s.h, s.ldh = at(q.dx, row, q.item), q.dx.ld
        if add:
            s.dh_in, s.lddh_in = s.h, s.ldh
        q.w.k.backward[FL_LINEAR][0](&s)
        row += s.n


# ---- the team ----------------------------------------------------------------------------------------------------------

cdef struct Job:
    const run_t *runs[2]
    int count, team
    bint backward, by_units
    ptrdiff_t chunk
    char *memory
    fl_barrier barrier


cdef void work(Job *job, ptrdiff_t i, ptrdiff_t of) noexcept nogil:
    """What thread i of `of` does. Backward goes window by window of about chunk_rows() rows, so that the products find the
    gates' gradients in the cache."""
    cdef const run_t *q
    cdef const rows_t *rows = job.runs[0].rows
    cdef ptrdiff_t j, begin = 0, end = rows.T, low, high, met
    for j in range(job.count):
        q = job.runs[j]
        if job.backward:
            pack_share(q.w.k, q.tasks, q.task_count, i, of)
        else:
            pack_share(q.w.k, q.w.tasks, q.w.task_count, i, of)
    if job.backward or job.runs[0].w.task_count:
        fl_barrier_wait(&job.barrier, <int> of)
    while begin < rows.T:
        if job.backward:
            end = begin + 1
            while end < rows.T and (end + 1 - begin) * rows.N <= chunk_rows(job.runs[0].item):
                end += 1
        for j in range(job.count):
            carry(job, job.runs[j], j, begin, end, i, of)
        if job.backward:
            fl_barrier_wait(&job.barrier, <int> of)
            for j in range(job.count):
                q = job.runs[j]
                low = begin if q.reverse else rows.T - end
                high = end if q.reverse else rows.T - begin
                products(q, job.memory, rows.offset[low], rows.offset[high], i, of, &job.barrier)
                if not q.dx.p:
                    continue
                # The directions come from both ends: which of them reaches a step second adds to what is there.
                met = high if job.count == 1 else begin if j == 0 else rows.T - end
                met = max(low, min(met, high))
                input_gradient(q, low, met, q.add_dx if job.count == 1 else j == 0, i, of)
                input_gradient(q, met, high, j == 1, i, of)
        begin = end


cdef void carry(Job *job, const run_t *q, ptrdiff_t j, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t i,
                ptrdiff_t of) noexcept nogil:
    """Thread i's part of run j, in blocks of sequences that go through the steps [begin, end) together."""
    cdef Share share
    cdef ptrdiff_t r0 = 0, r1 = q.rows.N, high
    cdef bint whole = job.by_units or job.chunk
    share.i, share.of = 0, 1
    if job.by_units:
        share.i, share.of = i, of
    else:                             # the sequences of both directions stand in one line, cut into equal shares
        r0 = cut(q.rows, min(max(job.count * i - j * of, 0), of), of)
        r1 = cut(q.rows, min(max(job.count * (i + 1) - j * of, 0), of), of)
    while r0 < r1:
        high = r1 if whole else min(r1, r0 + ROW_BLOCK)
        if job.backward:
            carry_back(q, begin, end, r0, high, share, &job.barrier)
        else:
            carry_rows(q, r0, high, share, &job.barrier, job.chunk)
        r0 = high


cdef void run_team(Job *job) noexcept nogil:
    if job.team == 1:
        work(job, 0, 1)
    else:
        with parallel(num_threads=job.team):
            work(job, threadid(), omp_get_num_threads())


def plan(Py_ssize_t T, Py_ssize_t N, Py_ssize_t D, Py_ssize_t H, int columns, int item, int directions, int threads,
         Py_ssize_t blocks):
    """How a call runs: (team, by_units, chunk).

    team: threads. by_units: they share the units and meet at every step, instead of each carrying its own sequences.
    chunk: rows of W x that are computed ahead, with the weights read once; 0: x and h in one product. Neither changes a
    bit. blocks: blocks of units of the pass that has the fewest. X_CHUNK, UNITS_ROWS and UNITS_ROWS_LARGE by `python
    benchmarks/tune.py x_chunk units_rows units_rows_large` on two cores of an EPYC with AVX-512 and 1 MB of L2; the other
    limits lie between the shapes of those runs where the choice turned.
    """
    cdef double weights = columns * <double> H * (D + H) * item
    cdef bint large = weights > LARGE_WEIGHTS
    # A team costs about 5 us to start: as one core takes for 5e5 operations, so 1e6 is the break-even.
    if threads > 1 and 2 * weights / item * N * T * directions < 1e6:
        threads = 1
    # With fewer than four rows a thread waits for weights, not for arithmetic: two threads that read half of them each are
    # faster than two that read all (2 rows of 256 units: 154 against 75 GFLOP/s). Weights beyond the caches make this so
    # for more rows (16 rows of 1024 units: 180 against 140). Below 128 units the meeting at every step costs more.
    by_units = threads > 1 and H >= 128 and (
        directions * N < (UNITS_ROWS_LARGE if large else UNITS_ROWS) * min(threads, blocks))
    if by_units:
        threads = min(threads, blocks)
    elif threads > 1:
        threads = min(threads, max(1, directions * N))
    # W x ahead pays where its weights are read from far away for few rows: 1 row of 256 units 40 -> 55 GFLOP/s, 16 rows
    # of 1024 units 81 -> 95; 4 rows of 256 units 96 -> 89. It needs all sequences in one thread's hands.
    chunk = 0
    if X_CHUNK and (by_units or threads == 1) and T > 1 and D >= 16 and N <= (20 if large else 2):
        chunk = max(X_CHUNK, N)
    return threads, by_units, chunk


cdef Job prepare(list runs, int threads, bint backward) except *:
    cdef Job job
    cdef Run run = runs[0]
    memset(&job, 0, sizeof(Job))
    job.count = <int> len(runs)
    job.backward = backward
    for i in range(job.count):
        run = runs[i]
        job.runs[i] = &run.s
    cdef ptrdiff_t blocks = run.s.back.blocks if backward else run.s.w.forward[run.s.w.cell.passes - 1].blocks
    job.team, job.by_units, job.chunk = plan(run.s.rows.T, run.s.rows.N, run.s.D, run.s.H, run.s.w.cell.columns,
                                             run.s.item, job.count, 1 if fl_forked else min(threads, MAX_TEAM), blocks)
    if run.s.w.bf16:
        job.chunk = 0
    return job


cdef void copy_rows(Array to, ptrdiff_t i, Array source, ptrdiff_t j, ptrdiff_t n, ptrdiff_t width,
                    ptrdiff_t item) noexcept nogil:
    cdef ptrdiff_t r
    for r in range(n):
        memcpy(at(to, i + r, item), at(source, j + r, item), width * item)


cdef void last_states(const run_t *q, Array to, Array source, Array first, ptrdiff_t width) noexcept nogil:
    """The state of every sequence after its last valid step."""
    cdef const rows_t *rows = q.rows
    cdef ptrdiff_t t, n, m
    n = rows.active[0] if rows.T else 0
    copy_rows(to, n, first, n, rows.N - n, width, q.item)
    if q.reverse:
        copy_rows(to, 0, source, 0, n, width, q.item)
        return
    for t in range(rows.T):
        n, m = rows.active[t], rows.active[t + 1] if t + 1 < rows.T else 0
        copy_rows(to, m, source, rows.offset[t] + m, n - m, width, q.item)


def forward(list runs, int threads):
    """Carry one layer, its one or two directions, over the rows."""
    cdef Job job = prepare(runs, threads, False)
    cdef Run run
    cdef ptrdiff_t rows
    cdef int i
    cdef const run_t *q
    workspaces = []
    for i in range(job.count):
        run = runs[i]
        if not run.s.tape and (job.chunk or run.s.w.id == FL_GRU_RESET_BEFORE):
            rows = max(job.chunk, run.s.rows.N)
            gates = empty((rows, run.s.w.cell.columns * run.s.H), run.w.dtype)
            workspaces.append(gates)
            run.s.gates = bind(gates, rows, run.s.w.cell.columns * run.s.H, run.s.item)
        if not run.s.c.p and run.s.c_n.p:
            copy_rows(run.s.c_n, 0, run.s.c_0, 0, run.s.rows.N, run.s.H, run.s.item)
    with nogil:
        run_team(&job)
    for i in range(job.count):
        (<Run> runs[i]).w.s.task_count = 0
    with nogil:
        for i in range(job.count):
            q = job.runs[i]
            last_states(q, q.h_n, q.h, q.h_0, q.P)
            if q.c.p:
                last_states(q, q.c_n, q.c, q.c_0, q.H)


def backward(list runs, int threads):
    """Carry the gradients back: dx, dh, dc, and the weights' gradients added to."""
    cdef Job job = prepare(runs, threads, True)
    cdef ptrdiff_t size = 0
    cdef int i
    job.chunk = 0
    for i in range(job.count):
        size = max(size, product_memory(job.runs[i]) * job.runs[i].item)
    cdef Buffer memory = Buffer(size)
    job.memory = <char *> memory.data
    with nogil:
        run_team(&job)


# ---- streams -----------------------------------------------------------------------------------------------------------

cdef class Stepper:
    """The layers of a one-directional stack, one step at a time, on memory of their own.

    panels: per layer. Two blocks of hidden states change roles at every step.
    """
    cdef list memory
    cdef int type
    cdef run_t *layers
    cdef rows_t rows
    cdef int count, now
    cdef readonly ptrdiff_t N, D, P, H
    cdef ptrdiff_t item
    cdef char *h[2]                     # [layer][N][P]
    cdef char *c                        # [layer][N][H]
    cdef readonly object states         # (h [2, layer, N, P], c [layer, N, H])

    def __init__(self, list panels, Py_ssize_t N, keep_h, keep_c):
        cdef Panels w = panels[0]
        cdef run_t *q
        cdef int i, last = <int> len(panels) - 1
        cdef Buffer buffer = Buffer((last + 1) * sizeof(run_t))
        self.count, self.N, self.D, self.P, self.H, self.item = last + 1, N, w.D, w.P, w.H, w.item
        self.memory = [buffer, panels]
        self.type = w.dtype.num
        self.layers = <run_t *> buffer.data
        memset(self.layers, 0, (last + 1) * sizeof(run_t))
        for w in panels:
            w.pack()
        w = panels[0]
        h, c = np.zeros((2, last + 1, N, w.P), w.dtype), np.zeros((last + 1, N, w.H), w.dtype)
        self.states = h, c
        self.h[0], self.h[1], self.c = data_of(h[0]), data_of(h[1]), data_of(c)
        self.rows.T, self.rows.N, self.rows.R = 1, N, N
        for i in range(last + 1):
            w = panels[i]
            q = &self.layers[i]
            q.w, q.rows, q.item, q.D, q.P, q.H = &w.s, &self.rows, w.item, w.D, w.P, w.H
            q.x.ld, q.h.ld, q.h_0.ld, q.c_n.ld = w.D, w.P, w.P, w.H
            q.c_n.p = self.c + i * N * w.H * w.item
            if w.s.id == FL_GRU_RESET_BEFORE:
                gates = empty((N, w.s.cell.columns * w.H), w.dtype)
                self.memory.append(gates)
                q.gates = bind(gates, N, w.s.cell.columns * w.H, w.item)
            if w.s.project.p:
                m = empty((N, w.H), w.dtype)
                self.memory.append(m)
                q.m = bind(m, N, w.H, w.item)
            q.keep_h, q.keep_c = bind(keep_h, N, w.P, w.item), bind(keep_c, N, w.H, w.item)
        self.memory += [keep_h, keep_c]

    @property
    def h(self):
        """The current hidden states, [layer, N, P]."""
        return self.states[0][self.now]

    cdef void run(self, char *x) noexcept nogil:
        cdef run_t *q
        cdef Share share
        cdef int i, p
        share.i, share.of = 0, 1
        self.now = 1 - self.now
        for i in range(self.count):
            q = &self.layers[i]
            q.x.p = x
            q.h_0.p = self.h[1 - self.now] + i * self.N * self.P * self.item
            q.h.p = self.h[self.now] + i * self.N * self.P * self.item
            for p in range(q.w.cell.passes + (q.m.p != NULL)):
                forward_pass(q, p, 0, 0, self.N, -1, 0, False, share)
            x = q.h.p

    cdef bint fits(self, object array, ptrdiff_t width):
        """Whether an array can be used as it is: [N, width], or [width] where N is 1."""
        cdef cnp.ndarray a
        if not cnp.PyArray_Check(array):
            return False
        a = array
        if cnp.PyArray_TYPE(a) != self.type or not cnp.PyArray_ISCARRAY_RO(a):
            return False
        if a.ndim == 2:
            return a.shape[0] == self.N and a.shape[1] == width
        return a.ndim == 1 and self.N == 1 and a.shape[0] == width

    def step(self, x, out=None):
        """One step of every sequence.

        Parameters
        ----------
        x : array_like, shape (N, D), or (D,) for a batch of one
        out : None or ndarray, shape (N, P), or (P,)
            Takes the result: C-contiguous, writeable, of the layer's dtype.

        Returns
        -------
        y : ndarray
            ``out``, or a new array.
        """
        cdef cnp.ndarray a, y
        cdef cnp.npy_intp shape[2]
        if not self.fits(x, self.D):
            x = self._convert(x)
        a = x
        if out is None:
            shape[0], shape[1] = self.N, self.P
            y = cnp.PyArray_EMPTY(a.ndim, shape + 2 - a.ndim, self.type, 0)
        else:
            if not self.fits(out, self.P) or not cnp.PyArray_ISWRITEABLE(out) or out.ndim != a.ndim:
                raise ValueError(f"out: expected a writeable C-contiguous array of the layer's dtype and shape "
                                 f"{(self.N, self.P)[2 - a.ndim:]}, got {getattr(out, 'dtype', type(out).__name__)} "
                                 f"{getattr(out, 'shape', '')}")
            y = out
        self.run(a.data)
        memcpy(y.data, self.h[self.now] + (self.count - 1) * self.N * self.P * self.item, self.N * self.P * self.item)
        return y


# ---- for tests and benchmarks ------------------------------------------------------------------------------------------

def activation(name, values):
    """The kernels' activation of an array."""
    x = np.ascontiguousarray(values)
    out = np.empty_like(x)
    kernels(x.dtype).map(ACTIVATIONS[name], (<cnp.ndarray> x).data, (<cnp.ndarray> out).data, x.size)
    return out


def outer_product(cnp.ndarray g, cnp.ndarray a, cnp.ndarray out):
    """out [J, K] += g' a for g [R, J] and a [R, K] by the kernels of the backward pass, on one thread."""
    cdef const fl_kernels *k = kernels(g.dtype)
    cdef ptrdiff_t R = g.shape[0], J = g.shape[1], K = a.shape[1], item = g.itemsize, n, low, high, j, c
    cdef ptrdiff_t size = min(chunk_rows(item), R), panel = slice_size(size, k.panel), strip = slice_size(size, k.strip)
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
            for j in range(strips):
                k.outer(out.data + (j * k.strip * K + c * k.panel) * item, K, min(k.strip, J - j * k.strip),
                        min(k.panel, K - c * k.panel), n, s + j * strip * item, p + c * panel * item)
        high = low


def fma_peak(dtype=np.float32, double seconds=0.05):
    """GFLOP/s of one core running independent multiply-adds of vectors: the best of several runs."""
    import time
    dtype = np.dtype(dtype)
    cdef const fl_kernels *k = kernels(dtype)
    scratch = np.full(2 * k.lanes, 0.5, dtype)
    cdef ptrdiff_t rounds = 100_000
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        k.peak(rounds, (<cnp.ndarray> scratch).data)
        best = max(best, 2.0 * rounds * k.rows * 4 * k.lanes / (time.perf_counter() - begin) / 1e9)
    return best


def tune(row_block=None, chunk=None, x_chunk=None, units_rows=None, units_rows_large=None):
    """Set the engine's constants for a measurement (benchmarks/tune.py) or a test; returns all of them."""
    global ROW_BLOCK, CHUNK, X_CHUNK, UNITS_ROWS, UNITS_ROWS_LARGE
    ROW_BLOCK = row_block or ROW_BLOCK
    CHUNK = chunk or CHUNK
    X_CHUNK = X_CHUNK if x_chunk is None else x_chunk
    UNITS_ROWS = UNITS_ROWS if units_rows is None else units_rows
    UNITS_ROWS_LARGE = UNITS_ROWS_LARGE if units_rows_large is None else units_rows_large
    return {"row_block": ROW_BLOCK, "chunk": CHUNK, "x_chunk": X_CHUNK, "units_rows": UNITS_ROWS,
            "units_rows_large": UNITS_ROWS_LARGE}


def read_bandwidth(Py_ssize_t nbytes, double seconds=0.05):
    """GB/s at which one core reads `nbytes` over and over: the best of several runs."""
    import time
    cdef const fl_kernels *k = kernels(np.dtype(np.float32))
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
