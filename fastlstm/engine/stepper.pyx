# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""A stack of layers, one step at a time."""
import numpy as np

cimport cython
cimport numpy as cnp
from libc.string cimport memcpy, memset

from .barrier cimport fl_barrier_asked, fl_barrier_wait
from .blas cimport input_product
from .memory cimport Array, Buffer, bind, data_of
from .process cimport Watch, look
from .recurrence cimport Share, forward_pass
from .rows cimport rows_t
from .run cimport run_t
from .team cimport choose, least_blocks, run_team, start
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
# From this on, some 0.7 ms, it may have a team; FEW sequences wait for the weights as long as this many would. Shorter steps
# leave the other processors to other streams, and no thread of a team spins between them.
cdef double TEAM = 1e8, FEW = 16
# From this on a signal ends a step amid: some 50 ms. A step is then cut into parts of PART, and the states before it are kept.
cdef double SLOW = 5e9, PART = 5e8

cdef struct Stack:                      # what the threads of a step share
    run_t *runs                         # [layer][head]
    int layers, heads, now              # now: which of h is the current one
    bint by_units                       # the team shares the units, not the sequences
    ptrdiff_t cuts                      # of a pass, between which signals are looked for; 0: they are not
    ptrdiff_t N, P, item                # P: of all heads
    char *h[2]                          # [layer][N][P]
    Watch watch


cdef void aim(Stack *s, char *x) noexcept nogil:
    """Every layer at its input, the states before and the other block, where the states after go."""
    cdef run_t *run
    cdef ptrdiff_t part
    cdef int i, k
    for i in range(s.layers):
        for k in range(s.heads):
            run = &s.runs[i * s.heads + k]
            part = (i * s.N * s.P + k * run.P) * s.item
            run.x.p, run.h_0.p, run.h.p = x, s.h[s.now] + part, s.h[1 - s.now] + part
        x = s.h[1 - s.now] + i * s.N * s.P * s.item


cdef void advance(void *of, ptrdiff_t part, ptrdiff_t parts) noexcept nogil:
    """What one thread does of a step: its sequences through all layers, or its units, after which the team meets."""
    cdef Stack *s = <Stack *> of
    cdef run_t *run
    cdef Share share
    cdef ptrdiff_t r0 = 0, r1 = s.N, cuts = max(s.cuts, 1)
    cdef int i, p
    if not s.by_units:
        r0, r1, share.parts = r0 + s.N * part // parts, s.N * (part + 1) // parts, cuts
    else:
        share.parts = cuts * parts
    share.looks, share.backwards = False, s.now
    for i in range(s.layers * s.heads):
        run = &s.runs[i]
        if run.w.blas:
            input_product(run, r0, r1, r0, 0, 1)
        for p in range(run.w.pass_count):
            share.part = part * cuts if s.by_units else 0
            for _ in range(cuts):
                if s.cuts and part == 0:
                    look(&s.watch, PART)
                if fl_barrier_asked(&s.watch.barrier):
                    break
                forward_pass(run, p, r0, r0, r1 - r0, -1, r0, run.w.blas, share)
                share.part += 1
            if s.by_units:
                if fl_barrier_wait(&s.watch.barrier, <int> parts):
                    return
            elif fl_barrier_asked(&s.watch.barrier):
                return


cdef class Stepper:
    """The layers of a one-directional stack, one step at a time, on memory of their own.

    panels: [layer][head], packed. threads: a function that says how many a step may use.
    """
    cdef list memory
    cdef object threads
    cdef int type
    cdef Stack s
    cdef rows_t rows
    cdef bint long                      # a step takes long enough to let other Python threads run
    cdef bint large                     # to have a team
    cdef int busy                       # a step is under way
    cdef readonly ptrdiff_t N, D, P     # P: of all heads
    cdef readonly object states         # (h [2, layer, N, P], c [layer, N, C])

    def __init__(self, list panels, Py_ssize_t N, keep_h, keep_c, threads):
        cdef Panels w = panels[0][0]
        cdef run_t *run
        cdef int i, k
        cdef Buffer buffer = Buffer(len(panels) * len(panels[0]) * sizeof(run_t))
        cdef ptrdiff_t C = w.s.states * w.H
        cdef double work = 0
        cdef Stack *s = &self.s
        memset(s, 0, sizeof(Stack))
        s.layers, s.heads, s.N, s.item = <int> len(panels), <int> len(panels[0]), N, w.item
        self.N, self.D, self.P = N, w.D, w.P * s.heads
        self.memory, self.threads = [buffer, panels, keep_h, keep_c], threads
        self.type, self.busy = w.dtype.num, 0
        s.runs, s.P = <run_t *> buffer.data, self.P
        memset(s.runs, 0, s.layers * s.heads * sizeof(run_t))
        h = np.zeros((2, s.layers, N, self.P), w.dtype)
        c = np.zeros((s.layers, N, C * s.heads), w.dtype)
        self.states = h, c
        s.h[0], s.h[1] = data_of(h[0]), data_of(h[1])
        self.rows.T, self.rows.N, self.rows.R = 1, N, N
        for i in range(s.layers):
            for k in range(s.heads):
                w = panels[i][k]
                run = &s.runs[i * s.heads + k]
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
        self.long, self.large = work > LONG, work * max(1, FEW / N) > TEAM
        s.cuts = <ptrdiff_t> (work / s.layers / s.heads / PART) + 1 if work > SLOW else 0
        if w.s.blas:                    # its products know no shares of units
            s.cuts = min(s.cuts, 1)

    @cython.final
    cdef Array take(self, Panels w, ptrdiff_t columns) except *:
        """Memory [N, columns] that lives as long as the stepper."""
        array = empty((self.N, columns), w.dtype)
        self.memory.append(array)
        return bind(array, self.N, columns, w.item)

    @property
    def h(self):
        """The current hidden states, [layer, N, P]."""
        return self.states[0][self.s.now]

    @cython.final
    cdef int enter(self) except -1:
        """The states are this thread's until fl_leave()."""
        if self.s.runs == NULL:
            raise RuntimeError("stream: made without __init__, expected layer.stream()")
        if not fl_enter(&self.busy):
            raise RuntimeError("stream: a step is under way")
        return 0

    def copy_states(self):
        """(h [layer, N, P], c [layer, N, C])."""
        self.enter()
        try:
            return self.h.copy(), self.states[1].copy()
        finally:
            fl_leave(&self.busy)

    def put_states(self, h, c):
        """Set both: no Python in between, where a signal's handler could come."""
        self.enter()
        try:
            self.h[...], self.states[1][...] = h, c
        finally:
            fl_leave(&self.busy)

    @cython.final
    cdef int team(self) except -1:
        """How many threads make the step."""
        cdef const run_t *run = &self.s.runs[self.s.layers * self.s.heads - 1]
        if not self.large:
            self.s.by_units = False
            return 1
        team, self.s.by_units, _ = choose(self.s.layers * self.s.heads, self.N, run.D, run.H, min(run.w.gate_columns, 4),
                                          run.item, 1, self.threads, least_blocks(run.w), run.w.blas)
        return team

    @cython.final
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

    @cython.final
    cdef int make(self, cnp.ndarray x, object reset) except -1:
        """One step: h goes to the other block, c in place; the states of `reset` are zero before. What runs Python
        comes before the first write."""
        cdef Stack *s = &self.s
        cdef int team = self.team()
        if reset is not None:
            self.h[:, reset] = 0
            self.states[1][:, reset] = 0
        aim(s, x.data)
        if self.long or s.runs[0].w.blas:
            memset(&s.watch, 0, sizeof(Watch))
            s.watch.wanted = s.cuts > 0
            start(advance, s, team, s.by_units, s.runs[0].w.blas, &s.watch)
        else:
            run_team(advance, s, 1, &s.watch)
        return 0

    @cython.final
    cdef int make_or_undo(self, cnp.ndarray x, object reset) except -1:
        """make(), or no step at all where a signal's handler raises: amid a slow one, or before BLAS."""
        h, c = self.h.copy(), self.states[1].copy()
        try:
            return self.make(x, reset)
        except BaseException:
            self.h[...], self.states[1][...] = h, c
            raise

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
        cdef Stack *s = &self.s
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
        self.enter()
        try:
            if reset is not None:
                reset = self._who(reset)
            if s.cuts or s.runs[0].w.blas:
                self.make_or_undo(a, reset)
            else:
                self.make(a, reset)
            s.now = 1 - s.now
            memcpy(y.data, s.h[s.now] + (s.layers - 1) * self.N * self.P * s.item, self.N * self.P * s.item)
        finally:
            fl_leave(&self.busy)
        return y
