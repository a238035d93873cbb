# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Packing, as the cell's descriptor says: a pass of the step per kernel call, a panel per pass, a task per term."""
cimport cython
cimport numpy as cnp
from libc.string cimport memcpy, memset

from .kernels cimport (FL_BF16, FL_COLUMNS, FL_GATE, FL_H, FL_HH, FL_HR, FL_IH, FL_INT8, FL_M, FL_ONE, FL_PLAIN, FL_TERMS, FL_VECTORS, FL_WEIGHTS,
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


cdef ptrdiff_t column_blocks(const Pass *step, const fl_kernels *k) noexcept:
    """Of a pass with one column."""
    return (step.H + FL_COLUMNS * k.lanes - 1) // (FL_COLUMNS * k.lanes)


cdef void room(Panel *panel, list memory, ptrdiff_t blocks, ptrdiff_t stride, ptrdiff_t item) except *:
    cdef Buffer buffer = Buffer(blocks * stride * item)
    memory.append(buffer)
    panel.p, panel.blocks, panel.stride = <char *> buffer.data, blocks, stride


cdef void one_column(Task *task, Pass *step, const fl_kernels *k, int sources) noexcept:
    """Panels of a pass with one column, FL_COLUMNS vectors of units a block, its K and its memory set: k runs over the
    sources."""
    step.columns = step.x_columns = step.h_columns = 1
    task.to, task.gated, task.sources = step.panel.p, False, sources
    task.units, task.K, task.stride, task.blocks = step.H, step.K // sources, step.panel.stride, step.panel.blocks


cdef void transposed(Task *task, Pass *step, list memory, Panels w, const fl_term *term, ptrdiff_t units,
                     ptrdiff_t K) except *:
    """Panels of d operand = dG W for a term: k runs over the units of its columns. units: width of the operand."""
    cdef int c
    memset(task, 0, sizeof(Task))
    step.D, step.H, step.K, step.operand, step.first = 0, units, K * term.columns, FL_GATE + term.first, term.first
    step.term, step.back = term, True
    room(&step.panel, memory, column_blocks(step, w.s.k), step.K * FL_COLUMNS * w.s.k.lanes, w.item)
    one_column(task, step, w.s.k, term.columns)
    for c in range(term.columns):
        task.weight[c] = w.block_of(term.weight, term.rows[c])
    task.unit_stride, task.k_stride = 1, units


@cython.final
cdef class Panels:
    """One direction of one layer, packed for the step kernels; inference-only panels may hold bfloat16 or int8.

    What the constructor makes is a pattern, whose pointers into its own memory are distances from the beginning of memory
    that it has not: `fresh` gives what a call packs, as often as it is wanted.
    """

    def __init__(self, str cell, dict weights, str suffix, Choices choices=None, bint blas=False):
        cdef weights_t *s = &self.s
        cdef cnp.ndarray w_ih = weights["weight_ih" + suffix], w_hh = weights["weight_hh" + suffix]
        cdef int index = cell_index(cell), p
        s.cell, s.k, s.index = cell_at(index), kernels_of(w_ih.dtype), index
        self.choices = choices
        s.choices = NULL if choices is None else &choices.s
        s.states, s.gate_columns = <int> len(s.cell.states) - 1, <int> len(s.cell.columns)
        s.run_pass, s.plain = s.k.run_pass[FL_PLAIN], True
        self.dtype, self.item, self.D, self.P = w_ih.dtype, w_ih.itemsize, w_ih.shape[1], w_hh.shape[1]
        self.H = w_ih.shape[0] // <Py_ssize_t> len(s.cell.gates)
        self.weights = {name: weights[name + suffix] for name in (*WEIGHTS, *BIASES[:2]) if name + suffix in weights}
        self.names = [name + suffix for name in WEIGHTS], [name + suffix if name else None for name in BIASES]
        self.vector_names = []
        self.point()
        for p in range(FL_VECTORS):
            if s.cell.vectors[p].name:
                name = s.cell.vectors[p].name.decode()
                self.weights[name] = weights[name + suffix]
                self.vector_names.append(name + suffix)
        for p in range(s.cell.passes):
            s.passes[p].update = s.k.cells[index].forward[p]
            self.add_pass(p)
        if WEIGHTS[FL_HR] in self.weights:
            self.add_projection()
        self.panels_size = self.size
        self.weighed = BIASES[FL_IH] in self.weights
        p = s.passes[0].columns
        if self.weighed:
            s.bias = self.place(s.passes[0].panel.blocks * (p if p > 1 else FL_COLUMNS) * s.k.lanes)
            if blas:                        # the same unit by unit
                s.bias_row = self.place(p * (self.H + s.k.lanes))
        if s.cell.vectors[0].name:
            s.vectors = self.place(FL_VECTORS * self.H)
        s.blas = blas
        if blas:
            s.task_count = 0                # no panels

    cdef char *place(self, ptrdiff_t size) noexcept:
        """Where so many elements begin, from the beginning of the memory."""
        cdef char *p = <char *> self.size
        self.size += (size * self.item + 63) // 64 * 64
        return p

    cdef void shift(self, ptrdiff_t by) noexcept:
        """Move what points behind the panels."""
        if self.weighed:
            self.s.bias += by
            if self.s.blas:
                self.s.bias_row += by
        if self.s.cell.vectors[0].name:
            self.s.vectors += by

    def fresh(self, str weight_type=None):
        """Panels of this pattern with memory of their own, not packed yet."""
        cdef Panels new = Panels.__new__(Panels)
        cdef Buffer buffer = Buffer(self.size)
        cdef weights_t *s = &new.s
        cdef ptrdiff_t start = <ptrdiff_t> buffer.data
        cdef int i
        memcpy(s, &self.s, sizeof(weights_t))
        new.item, new.D, new.P, new.H, new.dtype = self.item, self.D, self.P, self.H, self.dtype
        new.choices, new.weights, new.memory = self.choices, self.weights, [buffer]
        new.names, new.vector_names = self.names, self.vector_names
        new.weighed, new.size, new.panels_size = self.weighed, self.size, self.panels_size
        for i in range(s.pass_count):
            if not s.passes[i].whole:
                s.passes[i].panel.p += start
        for i in range(s.task_count):
            s.tasks[i].to += start
        new.shift(start)
        if self.weighed:
            new.pack_bias()
        new.pack_vectors()
        if weight_type:
            new.narrow(weight_type == "bfloat16")
        return new

    cdef char *block_of(self, int weight, int row) noexcept:
        """Block `row` of H rows of a weight."""
        cdef ptrdiff_t width = self.D if weight == FL_IH else self.P if weight == FL_HH else self.H
        return self.s.weight[weight] + row * self.H * width * self.item

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
        step.panel.blocks = (self.H + units - 1) // units
        step.panel.stride = (step.D * x_width + step.K * h_width) * lanes
        step.panel.p = self.place(step.panel.blocks * step.panel.stride)
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
        step.panel.blocks, step.panel.stride = column_blocks(step, s.k), step.K * FL_COLUMNS * s.k.lanes
        step.panel.p = self.place(step.panel.blocks * step.panel.stride)
        one_column(task, step, s.k, 1)
        task.weight[0], task.unit_stride, task.k_stride = self.block_of(FL_HR, 0), self.H, 1
        s.pass_count, s.task_count = s.pass_count + 1, s.task_count + 1

    cdef void point(self) except *:
        """Where the weights are that packing, and products by BLAS, read."""
        cdef int i
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
        cdef Buffer buffer, wides = self.memory[0], rest = Buffer(self.size - self.panels_size)
        self.pack()
        memcpy(rest.data, <char *> wides.data + self.panels_size, self.size - self.panels_size)
        self.shift(<char *> rest.data - <char *> wides.data - self.panels_size)
        self.memory = [rest]
        for p in range(self.s.pass_count):
            step = &self.s.passes[p]
            if step.whole:
                continue
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
        s.k.pack_bias(s.bias, first, second, self.H, columns, blocks)
        for c in range(columns if s.blas else 0):
            s.k.pack_bias(s.bias_row + c * self.H * self.item, &first[c], &second[c], self.H, 1,
                          (self.H + s.k.lanes - 1) // s.k.lanes)

    cdef void pack_vectors(self) except *:
        """The per-unit parameters, [vector][H]."""
        cdef weights_t *s = &self.s
        cdef ptrdiff_t size = self.H * self.item
        cdef int v
        for v in range(FL_VECTORS):
            if s.cell.vectors[v].name:
                memcpy(s.vectors + v * size, data_of(self.weights[s.cell.vectors[v].name.decode()]), size)
