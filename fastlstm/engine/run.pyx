# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""One direction of one layer over rows: every array that the time loop touches."""
cimport cython
from libc.string cimport memset

from .kernels cimport (FL_GATE, FL_H, FL_HH, FL_HR, FL_IH, FL_M, FL_ONE, FL_TERMS, FL_VECTORS, FL_X, fl_cell,
                       fl_updates, fl_vector)
from .memory cimport bind, data_of
from .weights cimport term_of, transposed

from .memory import empty

# The projection as a term: its operand m, its weight as it is, and its gradient dp behind the gates' columns.
cdef fl_term PROJECTION
memset(&PROJECTION, 0, sizeof(fl_term))
PROJECTION.operand, PROJECTION.columns, PROJECTION.weight = FL_M, 1, FL_HR


@cython.final
cdef class Run:
    """One direction of one layer over rows.

    Training keeps c [R, C], the states beside h, and gates [R, G*H]; inference has c None, and the state lives in c_n.
    State arrays are [N, .] in the order of the rows; h_n and c_n are written.
    """

    def __init__(self, Rows rows, Panels w, bint reverse, x, h, h_0, h_n, c_0=None, c_n=None, c=None, gates=None, m=None,
                 h_masked=None, h_0_masked=None, mask=None, keep_h=None, keep_c=None):
        cdef ptrdiff_t R = rows.s.R, N = rows.s.N, item = w.item, D = w.D, P = w.P, H = w.H, C = w.s.states * H
        cdef run_t *s = &self.s
        memset(s, 0, sizeof(run_t))
        self.rows, self.w = rows, w
        s.rows, s.w, s.reverse, s.item, s.D, s.P, s.H, s.C = &rows.s, &w.s, reverse, item, D, P, H, C
        if w.memory is None:
            raise AssertionError("expected panels with memory, got a pattern: fresh() makes them")
        if w.projects != (m is not None):
            raise AssertionError("expected memory for the output before the projection where there is one")
        s.tape = gates is not None
        s.x, s.h = bind(x, R, D, item), bind(h, R, P, item)
        s.h_0, s.h_n = bind(h_0, N, P, item), bind(h_n, N, P, item)
        s.c_0, s.c_n, s.c = bind(c_0, N, C, item), bind(c_n, N, C, item), bind(c, R, C, item)
        s.gates, s.m = bind(gates, R, w.s.gate_columns * H, item), bind(m, R if s.tape else N, H, item)
        s.h_masked, s.h_0_masked, s.mask = bind(h_masked, R, P, item), bind(h_0_masked, N, P, item), bind(mask, N, P, item)
        s.keep_h, s.keep_c = bind(keep_h, R, P, item), bind(keep_c, R, H, item)
        s.past = w.s.cell.past or s.keep_h.p != NULL
        self.keep = [x, h, h_0, h_n, c_0, c_n, c, gates, m, h_masked, h_0_masked, mask, keep_h, keep_c]

    def set_backward(self, dict grads, dy, dh, dc=None, dx=None, bint add_dx=False):
        """What backward needs. dh, dc [N, .]: gradients of the last states in, of the first states out.

        grads: arrays that are added to. dx: None if not wanted; add_dx: add to it, where the run is alone.
        """
        cdef run_t *s = &self.s
        cdef const fl_cell *cell = s.w.cell
        cdef const fl_updates *updates = s.w.k.cells + s.w.index
        cdef ptrdiff_t R = s.rows.R, N = s.rows.N, item = s.item
        cdef Pass x
        cdef int p
        s.dy, s.dh, s.dc, s.dx = bind(dy, R, s.P, item), bind(dh, N, s.P, item), bind(dc, N, s.C, item), bind(dx, R, s.D, item)
        s.add_dx = add_dx
        s.back_count = s.task_count = s.column_count = s.source_count = 0
        self.room_for_products()
        self.keep += [dy, dh, dc, dx, grads]
        # dh_{t-1} comes through the product with the gates of the step after; a projection takes it, else the cell.
        self.add_back(term_of(cell, 0, FL_H), True)
        if s.m.p:
            dp = empty((R, s.P), self.w.dtype)
            s.dp = bind(dp, R, s.P, item)
            self.keep.append(dp)
            s.back[0].update = s.w.k.linear.backward[0]
            self.add_back(&PROJECTION, False)
        s.back[s.back_count - 1].update = updates.backward[0]
        for p in range(1, cell.passes):
            if s.w.passes[p].whole:
                s.back[s.back_count] = s.w.passes[p]
                s.back_count += 1
            else:
                self.add_back(term_of(cell, p, -1), False)
            s.back[s.back_count - 1].update = updates.backward[p]
        if dx is not None:
            memset(&x, 0, sizeof(Pass))
            transposed(&s.tasks[s.task_count], &x, self.keep, self.w, term_of(cell, 0, FL_X), s.D, s.H)
            s.back_x = x.panel
            s.task_count += 1
        self.set_products(grads)
        if s.w.blas:
            s.task_count = 0            # no panels

    cdef void room_for_products(self) except *:
        """Where BLAS puts the products of a step that are no sums of the gates."""
        cdef run_t *s = &self.s
        if s.w.blas and not s.product.p:
            product = empty((s.rows.N, max(s.P, s.H)), self.w.dtype)
            s.product = bind(product, s.rows.N, max(s.P, s.H), s.item)
            self.keep.append(product)

    cdef void add_back(self, const fl_term *term, bint follows) except *:
        cdef run_t *s = &self.s
        transposed(&s.tasks[s.task_count], &s.back[s.back_count], self.keep, self.w, term, s.P if follows else s.H,
                   s.P if term.operand == FL_M else s.H)
        if term.operand == FL_M:
            s.back[s.back_count].operand = FL_M
        s.task_count, s.back_count = s.task_count + 1, s.back_count + 1

    cdef void set_products(self, dict grads) except *:
        """The columns that have gradients, and the terms whose weights they move."""
        cdef run_t *s = &self.s
        cdef const fl_cell *cell = s.w.cell
        cdef const fl_term *term
        cdef Source *source
        cdef Column *column = NULL
        cdef char *db
        cdef int i, c
        cdef list weights, biases
        weights, biases = self.w.names
        memset(s.columns, 0, sizeof(s.columns))
        for i in range(FL_TERMS + 1):
            term = &PROJECTION
            if i < FL_TERMS:
                term = &cell.terms[i]
            if term.columns == 0 or (i == FL_TERMS and not s.m.p):
                continue
            source = &s.sources[s.source_count]
            source.operand, source.first = term.operand, term.first if i < FL_TERMS else s.column_count
            source.end = source.first + term.columns
            source.width = s.D if term.operand == FL_X else s.P if term.operand == FL_H else s.H
            source.dw = data_of(grads[weights[term.weight]])
            s.source_count += 1
            s.column_count = max(s.column_count, source.end)
            db = data_of(grads.get(biases[term.weight])) if self.w.weighed else NULL
            for c in range(term.columns):
                source.rows[c] = term.rows[c] * s.H
                column = &s.columns[source.first + c]
                column.units, column.g, column.gate = s.H, s.gates, source.first + c
                column.g.p += (source.first + c) * s.H * s.item
                if db and term.weight == FL_IH:
                    column.db_ih = db + source.rows[c] * s.item
                elif db:
                    column.db_hh = db + source.rows[c] * s.item
            if i == FL_TERMS:
                column.units, column.g, column.gate = s.P, s.dp, -1
        self.set_vectors(grads)

    cdef void set_vectors(self, dict grads) except *:
        """The per-unit parameters, and the columns that only they have a gradient from."""
        cdef run_t *s = &self.s
        cdef const fl_vector *vector
        cdef Column *column
        cdef char *d
        cdef int i, c
        for i in range(FL_VECTORS):
            vector = &s.w.cell.vectors[i]
            if not vector.name:
                break
            c = 0
            while c < s.column_count and s.columns[c].gate != vector.column:
                c += 1
            column = &s.columns[c]
            if c == s.column_count:
                memset(column, 0, sizeof(Column))
                column.units, column.g, column.gate = s.H, s.gates, vector.column
                column.g.p += vector.column * s.H * s.item
                s.column_count += 1
            d = data_of(grads[self.w.vector_names[i]])
            s.d_vectors[i] = NULL if vector.operand == FL_ONE else d
            if vector.operand == FL_ONE:
                column.db_ih = d
