# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Packing, as the cell's descriptor says: a pass of the step per kernel call, a panel per pass, a task per term."""
cimport cython
cimport numpy as cnp
from libc.string cimport memcpy, memset

from .kernels cimport (FL_BF16, FL_COLUMNS, FL_GATE, FL_H, FL_HR, FL_IH, FL_INT8, FL_M, FL_ONE, FL_PLAIN, FL_TERMS, FL_VECTORS, FL_WEIGHTS,
                       FL_X,
                       Choices, cell_at, cell_index, fl_panel_row, kernels_of)
from .memory cimport Buffer, data_of

# The parameters behind FL_IH, FL_HH, FL_HR, and the biases that go with them.
WEIGHTS = ("weight_ih", "weight_hh", "weight_hr")
BIASES = ("bias_ih", "bias_hh", None)


cdef const fl_term *term_of(const fl_cell *cell, int index, int operand) noexcept nogil:
    """The term of a pass with this operand, or (operand -1) with any but x; NULL if there is none."""
    cdef int i
    for i in range(FL_TERMS):
        if cell.terms[i].columns and cell.terms[i].step_pass == index and (
                cell.terms[i].operand == operand or (operand < 0 and cell.terms[i].operand != FL_X)):
            return &cell.terms[i]
    return NULL


cdef void pack_share(const fl_kernels *k, const Task *tasks, int count, ptrdiff_t part, ptrdiff_t parts) noexcept nogil:
    """One of `parts` of the blocks: in a team that shares the units those that the thread will use."""
    cdef int j
    for j in range(count):
        k.pack(tasks[j].to, tasks[j].weight, tasks[j].unit_stride, tasks[j].k_stride, tasks[j].units, tasks[j].K,
               tasks[j].sources, tasks[j].gated, tasks[j].stride, tasks[j].blocks * part // parts,
               tasks[j].blocks * (part + 1) // parts)


cdef ptrdiff_t panel_row(const Pass *step, ptrdiff_t lanes, ptrdiff_t block, int columns) noexcept nogil:
    """Elements of a row of a block's panel."""
    if step.columns > 1:
        return fl_panel_row(<int> lanes, step.H - block * lanes, columns)
    return min(FL_COLUMNS, (step.H - block * FL_COLUMNS * lanes + lanes - 1) // lanes) * lanes


cdef void room(Panel *panel, list memory, ptrdiff_t blocks, ptrdiff_t stride, ptrdiff_t item) except *:
    cdef Buffer buffer = Buffer(blocks * stride * item)
    memory.append(buffer)
    panel.p, panel.blocks, panel.stride = <char *> buffer.data, blocks, stride


cdef void one_column(Task *task, Pass *step, list memory, const fl_kernels *k, ptrdiff_t item, int sources) except *:
    """Panels of a pass with one column, FL_COLUMNS vectors of units a block, its K set: k runs over the sources."""
    cdef ptrdiff_t units = FL_COLUMNS * k.lanes
    step.columns = step.x_columns = step.h_columns = 1
    room(&step.panel, memory, (step.H + units - 1) // units, step.K * units, item)
    task.to, task.gated, task.sources = step.panel.p, False, sources
    task.units, task.K, task.stride, task.blocks = step.H, step.K // sources, step.panel.stride, step.panel.blocks


cdef void transposed(Task *task, Pass *step, list memory, Panels w, const fl_term *term, ptrdiff_t units,
                     ptrdiff_t K) except *:
    """Panels of d operand = dG W for a term: k runs over the units of its columns. units: width of the operand."""
    cdef int c
    memset(task, 0, sizeof(Task))
    step.D, step.H, step.K, step.operand, step.first = 0, units, K * term.columns, FL_GATE + term.first, term.first
    step.term, step.back = term, True
    one_column(task, step, memory, w.s.k, w.item, term.columns)
    for c in range(term.columns):
        task.weight[c] = w.block_of(term.weight, term.rows[c])
    task.unit_stride, task.k_stride = 1, units


@cython.final
cdef class Panels:
    """One direction of one layer, packed for the step kernels; inference-only panels may hold bfloat16 or int8."""

    def __init__(self, str cell, weights, str suffix, Choices choices=None, str weight_type=None, bint blas=False):
        cdef weights_t *s = &self.s
        cdef cnp.ndarray w_ih = weights["weight_ih" + suffix], w_hh = weights["weight_hh" + suffix]
        cdef int index = cell_index(cell), p
        s.cell, s.k = cell_at(index), kernels_of(w_ih.dtype)
        self.choices = choices
        s.choices = NULL if choices is None else &choices.s
        s.states, s.gate_columns = <int> len(s.cell.states) - 1, <int> len(s.cell.columns)
        s.run_pass, s.plain = s.k.run_pass[FL_PLAIN], True
        self.dtype, self.item, self.D, self.P = w_ih.dtype, w_ih.itemsize, w_ih.shape[1], w_hh.shape[1]
        self.H = w_ih.shape[0] // <Py_ssize_t> len(s.cell.gates)
        self.memory = []
        self.weights = {name: weights[name + suffix] for name in (*WEIGHTS, *BIASES[:2]) if name + suffix in weights}
        for p in range(FL_VECTORS):
            if s.cell.vectors[p].name:
                name = s.cell.vectors[p].name.decode()
                self.weights[name] = weights[name + suffix]
        for p in range(s.cell.passes):
            s.passes[p].update = s.k.cells[index].forward[p]
            self.add_pass(p)
        if WEIGHTS[FL_HR] in self.weights:
            self.add_projection()
        if BIASES[FL_IH] in self.weights:
            self.pack_bias()
        self.pack_vectors()
        s.blas = blas
        self.point()
        if weight_type:
            self.narrow(weight_type == "bfloat16")

    cdef char *block_of(self, int weight, int row) except NULL:
        """Block `row` of H rows of a weight."""
        cdef cnp.ndarray w = self.weights[WEIGHTS[weight]]
        return w.data + row * self.H * w.shape[1] * self.item

    cdef void add_pass(self, int index) except *:
        """Panels [block][x-part, then h-part][k][column][lanes] of one pass of the cell."""
        cdef weights_t *s = &self.s
        cdef Pass *step = &s.passes[index]
        cdef const fl_term *x = term_of(s.cell, index, FL_X)
        cdef const fl_term *h = term_of(s.cell, index, -1)
        cdef ptrdiff_t lanes = s.k.lanes, units, x_width, h_width
        cdef int end
        s.pass_count += 1
        if h == NULL:                           # no product: the one call sees all units
            step.whole, step.H, step.operand, step.panel.blocks, step.columns = True, self.H, FL_ONE, 1, 1
            return
        step.first = min(x.first, h.first) if x else h.first
        end = max(x.first + x.columns, h.first + h.columns) if x else h.first + h.columns
        step.columns, step.h_first, step.h_columns = end - step.first, h.first - step.first, h.columns
        step.x_columns = x.columns if x else h.columns
        step.H, step.D, step.operand, step.term = self.H, self.D if x else 0, h.operand, h
        step.K = self.P if h.operand == FL_H else self.H
        units = lanes if step.columns > 1 else FL_COLUMNS * lanes
        x_width = step.x_columns if step.columns > 1 else FL_COLUMNS
        h_width = step.h_columns if step.columns > 1 else FL_COLUMNS
        room(&step.panel, self.memory, (self.H + units - 1) // units, (step.D * x_width + step.K * h_width) * lanes,
             self.item)
        if x:
            self.add_term(step, x, step.panel.p, step.D)
        self.add_term(step, h, step.panel.p + step.D * x_width * lanes * self.item, step.K)

    cdef void add_term(self, const Pass *step, const fl_term *term, char *to, ptrdiff_t K) except *:
        cdef Task *task = &self.s.tasks[self.s.task_count]
        cdef int c
        task.to, task.gated, task.sources = to, step.columns > 1, term.columns
        task.unit_stride, task.k_stride, task.units, task.K = K, 1, self.H, K
        task.stride, task.blocks = step.panel.stride, step.panel.blocks
        for c in range(term.columns):
            task.weight[c] = self.block_of(term.weight, term.rows[c])
        self.s.task_count += 1

    cdef void add_projection(self) except *:
        """h = W_hr m, a pass of its own."""
        cdef weights_t *s = &self.s
        cdef Pass *step = &s.passes[s.pass_count]
        cdef Task *task = &s.tasks[s.task_count]
        step.update, step.operand = s.k.linear.forward[0], FL_M
        step.D, step.K, step.H = 0, self.H, self.P
        one_column(task, step, self.memory, s.k, self.item, 1)
        task.weight[0], task.unit_stride, task.k_stride = self.block_of(FL_HR, 0), self.H, 1
        s.pass_count, s.task_count = s.pass_count + 1, s.task_count + 1

    cdef void point(self) except *:
        """What the products by BLAS read."""
        cdef int i
        if self.s.blas:
            self.s.task_count = 0               # no panels
            for i in range(FL_WEIGHTS):
                self.s.weight[i] = data_of(self.weights.get(WEIGHTS[i]))

    def pack(self):
        """Pack now, on this thread; otherwise the first call's team does it. Later changes of the parameters do not reach
        what was packed."""
        if self.s.blas:
            self.weights = {name: weight.copy() for name, weight in self.weights.items()}
            self.point()
            return self
        pack_share(self.s.k, self.s.tasks, self.s.task_count, 0, 1)
        self.s.task_count = 0
        return self

    @property
    def columns(self):
        """Columns of H values in a row of the tape's gates."""
        return self.s.gate_columns

    @property
    def blas(self):
        """Whether the products are BLAS's."""
        return self.s.blas

    @property
    def projects(self):
        return self.s.passes[self.s.pass_count - 1].operand == FL_M

    cdef void narrow(self, bint bf16) except *:
        """The panels as words of two bfloat16, see to_bf16, or of four int8 with scales, see to_int8. The wide ones are
        let go."""
        cdef ptrdiff_t lanes = self.s.k.lanes, block, D, K, item = self.item, each = 2 if bf16 else 4
        cdef Pass *step
        cdef Panel wide
        cdef char *source
        cdef char *to
        cdef char *scales
        cdef int p, x_width, h_width
        cdef Buffer buffer
        self.pack()
        kept = [p for p in range(self.s.pass_count) if not self.s.passes[p].whole]
        wides, self.memory = self.memory[:len(kept)], self.memory[len(kept):]
        for p in kept:
            step = &self.s.passes[p]
            wide = step.panel
            D, K = (step.D + each - 1) // each, (step.K + each - 1) // each
            x_width = step.x_columns if step.columns > 1 else FL_COLUMNS
            h_width = step.h_columns if step.columns > 1 else FL_COLUMNS
            room(&step.panel, self.memory, wide.blocks, (D * x_width + K * h_width) * lanes, item)
            if not bf16:
                buffer = Buffer(wide.blocks * 2 * FL_COLUMNS * lanes * self.item)
                self.memory.append(buffer)
                step.scales = <char *> buffer.data
            for block in range(wide.blocks):
                source = wide.p + block * wide.stride * self.item
                to = step.panel.p + block * step.panel.stride * item
                scales = step.scales + block * 2 * FL_COLUMNS * lanes * self.item
                self.narrow_part(to, scales, source, step.D, panel_row(step, lanes, block, x_width), bf16)
                self.narrow_part(to + D * x_width * lanes * item, scales + FL_COLUMNS * lanes * self.item,
                                 source + step.D * x_width * lanes * self.item, step.K,
                                 panel_row(step, lanes, block, h_width), bf16)
        self.s.run_pass, self.s.plain = self.s.k.run_pass[FL_BF16 if bf16 else FL_INT8], False

    cdef void narrow_part(self, char *to, char *scales, const char *source, ptrdiff_t K, ptrdiff_t width,
                          bint bf16) noexcept:
        if bf16:
            self.s.k.to_bf16(to, source, K, width)
        else:
            self.s.k.to_int8(to, scales, source, K, width)

    cdef void pack_bias(self) except *:
        """What the products start from, [block][column][lanes] of the first pass: the biases of all terms, since the chain
        of a column that a later pass ends begins there."""
        cdef weights_t *s = &self.s
        cdef const fl_term *term
        cdef const void *first[4]
        cdef const void *second[4]
        cdef const char *bias
        cdef int c, i, columns = s.passes[0].columns
        cdef ptrdiff_t blocks = s.passes[0].panel.blocks * (1 if columns > 1 else FL_COLUMNS)
        cdef Buffer buffer = Buffer(blocks * columns * s.k.lanes * self.item)
        for c in range(columns):
            first[c] = second[c] = NULL
        for i in range(FL_TERMS):
            term = &s.cell.terms[i]
            for c in range(term.columns):
                bias = data_of(self.weights[BIASES[term.weight]]) + term.rows[c] * self.H * self.item
                if first[term.first + c]:
                    second[term.first + c] = bias
                else:
                    first[term.first + c] = bias
        s.k.pack_bias(buffer.data, first, second, self.H, columns, blocks)
        self.memory.append(buffer)
        s.bias = <char *> buffer.data
        buffer = Buffer(columns * (self.H + s.k.lanes) * self.item)     # the same unit by unit, for BLAS
        self.memory.append(buffer)
        s.bias_row = <char *> buffer.data
        for c in range(columns):
            s.k.pack_bias(s.bias_row + c * self.H * self.item, &first[c], &second[c], self.H, 1,
                          (self.H + s.k.lanes - 1) // s.k.lanes)

    cdef void pack_vectors(self) except *:
        """The per-unit parameters, [vector][H]."""
        cdef weights_t *s = &self.s
        cdef Buffer buffer
        cdef ptrdiff_t size = self.H * self.item
        cdef int v
        if not s.cell.vectors[0].name:
            return
        buffer = Buffer(FL_VECTORS * size)
        self.memory.append(buffer)
        s.vectors = <char *> buffer.data
        for v in range(FL_VECTORS):
            if s.cell.vectors[v].name:
                memcpy(s.vectors + v * size, data_of(self.weights[s.cell.vectors[v].name.decode()]), size)
