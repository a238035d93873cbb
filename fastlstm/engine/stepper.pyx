# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""A stack of layers, one step at a time."""
import numpy as np

cimport numpy as cnp
from libc.string cimport memcpy, memset

from .barrier cimport fl_barrier_asked
from .blas cimport hold, input_product, let_go
from .memory cimport Array, Buffer, bind, data_of
from .process cimport FL_OURS, Watch, end_watch, fl_get_word, fl_set_word, fl_word, look
from .recurrence cimport Share, forward_pass
from .rows cimport rows_t
from .run cimport run_t
from .weights cimport Panels

from .memory import empty

cnp.import_array()

cdef extern from *:
    """
    /* One step at a time, also where no GIL keeps other threads away. */
    static int fl_enter(int *busy) { return !__atomic_exchange_n(busy, 1, __ATOMIC_ACQUIRE); }
    static void fl_leave(int *busy) { __atomic_store_n(busy, 0, __ATOMIC_RELEASE); }
    """
    bint fl_enter(int *busy)
    void fl_leave(int *busy)

# Operations of a step, some 20 us, from which on it lets other Python threads run: that costs 0.1 us, and where others
# wait for their turn the way back costs more.
cdef double LONG = 1e6
# From this on a signal ends a step amid: some 50 ms. A step is then cut into parts of PART, and the states before it are kept.
cdef double SLOW = 5e9, PART = 5e8


cdef class Stepper:
    """The layers of a one-directional stack, one step at a time, on memory of their own.

    panels: [layer][head]. Two blocks of hidden states change roles at every step.
    """
    cdef list memory
    cdef int type
    cdef run_t *layers
    cdef rows_t rows
    cdef bint long                      # a step takes long enough to let other Python threads run
    cdef int busy                       # a step is under way
    cdef int count, heads, now          # layers, heads of each
    cdef ptrdiff_t parts                # of a pass, between which signals are looked for
    cdef Watch watch
    cdef readonly ptrdiff_t N, D, P, H  # P: of all heads
    cdef ptrdiff_t item
    cdef char *h[2]                     # [layer][N][P]
    cdef readonly object states         # (h [2, layer, N, P], c [layer, N, C])

    def __init__(self, list panels, Py_ssize_t N, keep_h, keep_c):
        cdef Panels w = panels[0][0]
        cdef run_t *run
        cdef int i, k
        cdef Buffer buffer = Buffer(len(panels) * len(panels[0]) * sizeof(run_t))
        cdef ptrdiff_t C = w.s.states * w.H
        cdef double work = 0
        self.count, self.heads, self.N, self.D, self.item = <int> len(panels), <int> len(panels[0]), N, w.D, w.item
        self.P, self.H = w.P * self.heads, w.H * self.heads
        self.memory = [buffer, panels, keep_h, keep_c]
        self.type = w.dtype.num
        self.long, self.busy = False, 0
        self.layers = <run_t *> buffer.data
        memset(self.layers, 0, self.count * self.heads * sizeof(run_t))
        h = np.zeros((2, self.count, N, self.P), w.dtype)
        c = np.zeros((self.count, N, C * self.heads), w.dtype)
        self.states = h, c
        self.h[0], self.h[1] = data_of(h[0]), data_of(h[1])
        self.rows.T, self.rows.N, self.rows.R = 1, N, N
        for i in range(self.count):
            for k in range(self.heads):
                w = panels[i][k]
                w.pack()
                run = &self.layers[i * self.heads + k]
                run.w, run.rows, run.item, run.D, run.P, run.H, run.C = &w.s, &self.rows, w.item, w.D, w.P, w.H, C
                run.x.ld, run.h.ld, run.h_0.ld = w.D, self.P, self.P
                run.c_n = bind(c[i][:, k * C:(k + 1) * C], N, C, w.item)
                run.keep_h, run.keep_c = bind(keep_h, N, w.P, w.item), bind(keep_c, N, w.H, w.item)
                if w.s.blas:
                    run.product = self.take(w, max(w.P, w.H))
                if w.s.cell.passes > 1 or w.s.blas:     # sums wait in the gates
                    run.gates = self.take(w, w.columns * w.H)
                if w.projects:
                    run.m = self.take(w, w.H)
                work += 2. * N * min(w.columns, 4) * w.H * (w.D + w.P)
        self.long = work > LONG
        self.parts = <ptrdiff_t> (work / self.count / self.heads / PART) + 1 if work > SLOW else 0
        if w.s.blas:                    # its products know no shares of units
            self.parts = min(self.parts, 1)

    cdef Array take(self, Panels w, ptrdiff_t columns) except *:
        """Memory [N, columns] that lives as long as the stepper."""
        array = empty((self.N, columns), w.dtype)
        self.memory.append(array)
        return bind(array, self.N, columns, w.item)

    @property
    def h(self):
        """The current hidden states, [layer, N, P]."""
        return self.states[0][self.now]

    cdef void run(self, char *x) noexcept nogil:
        cdef run_t *run
        cdef ptrdiff_t part
        cdef int i, k, p
        cdef fl_word own = fl_get_word()
        self.watch.word = own
        fl_set_word(own | FL_OURS)
        self.now = 1 - self.now
        for i in range(self.count):
            for k in range(self.heads):
                run = &self.layers[i * self.heads + k]
                part = (i * self.N * self.P + k * run.P) * self.item
                run.x.p = x
                run.h_0.p = self.h[1 - self.now] + part
                run.h.p = self.h[self.now] + part
                if run.w.blas:
                    input_product(run, 0, self.N, 0, 0, 1)
                for p in range(run.w.pass_count):
                    self.run_pass(run, p)
            x = self.h[self.now] + i * self.N * self.P * self.item
        fl_set_word(own)

    cdef inline void run_pass(self, run_t *run, int p) noexcept nogil:
        cdef Share share
        share.parts, share.looks = max(self.parts, 1), False
        for share.part in range(share.parts):
            if self.parts:
                look(&self.watch, PART)
                if fl_barrier_asked(&self.watch.barrier):
                    return
            forward_pass(run, p, 0, 0, self.N, -1, 0, run.w.blas, share)

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

    def step(self, x, out=None, reset=None):
        """One step of every sequence.

        Parameters
        ----------
        x : array_like, shape (N, D), or (D,) for a batch of one
        out : None or ndarray, shape (N, P), or (P,)
            Takes the result: C-contiguous, writeable, of the layer's dtype.
        reset : None or array_like of bool or 0 and 1, shape (N,)
            True: this sequence starts anew, its states are zero before the step.

        Returns
        -------
        y : ndarray
            ``out``, or a new array.
        """
        cdef cnp.ndarray a, y
        cdef cnp.npy_intp shape[2]
        if not cnp.PyArray_CheckExact(x) or not self.fits(x, self.D):       # a masked array is for _convert to refuse
            x = self._convert(x)
            if not self.fits(x, self.D):
                raise AssertionError(f"expected an array of {self.N} rows of {self.D}, got {type(x).__name__}")
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
        if not fl_enter(&self.busy):
            raise RuntimeError("stream: a step of another thread is under way")
        try:
            before = (self.states[0][self.now].copy(), self.states[1].copy()) if self.parts else None
            if reset is not None:
                self._forget(reset)
            if self.layers[0].w.blas:
                hold()
            if self.long:
                memset(&self.watch, 0, sizeof(Watch))
                self.watch.wanted = self.parts > 0
                with nogil:
                    self.run(a.data)
            else:
                self.run(a.data)
            if self.layers[0].w.blas:
                let_go()
            if self.watch.error:        # a signal's handler raised: no step was made
                self.states[0][self.now][...], self.states[1][...] = before
                end_watch(&self.watch)
            memcpy(y.data, self.h[self.now] + (self.count - 1) * self.N * self.P * self.item, self.N * self.P * self.item)
        finally:
            fl_leave(&self.busy)
        return y
