"""src_c/fastlstm.h seen from Cython, and the kernels in use. Only `kernels` is linked with src_c."""

cdef extern from "fastlstm.h" nogil:
    enum:
        FL_COLUMNS, FL_PASSES, FL_TERMS, FL_VECTORS
        FL_TANH, FL_SIGMOID, FL_RELU, FL_SOFTSIGN, FL_HARD_TANH, FL_HARD_SIGMOID, FL_IDENTITY, FL_LINEAR_SIGMOID, FL_ELU
        FL_LEAKY_RELU, FL_SOFTPLUS, FL_SCALED_TANH
        FL_PLAIN, FL_BF16, FL_INT8, FL_WEIGHT_TYPES
        FL_IH, FL_HH, FL_HR, FL_WEIGHTS
        FL_ONE, FL_X, FL_H, FL_C, FL_M, FL_GATE

    ctypedef struct fl_term:
        int operand, first, columns, weight
        int step_pass "pass"
        int rows[4]

    ctypedef struct fl_vector:
        const char *name
        int column, operand, gain

    ctypedef struct fl_cell:
        const char *name
        const char *states
        const char *gates
        const char *columns
        int passes, past
        fl_term terms[4]
        fl_vector vectors[10]

    ctypedef struct fl_activation:
        int kind
        double alpha, beta, clip, low, high

    ctypedef struct fl_choices:
        fl_activation act, out, gate
        double cell_clip, proj_clip, epsilon

    ctypedef struct fl_step:
        ptrdiff_t n, D, K, H, begin, end
        int backwards, columns, x_columns, h_first, h_columns
        const void *panels
        const void *scales
        const void *bias
        const void *sums
        const void *x
        const void *h_in
        const void *h_seen
        const void *h_prev
        const void *c_prev
        void *h
        void *h_masked
        void *c
        void *gates
        const void *vectors
        const void *mask
        const void *keep_h
        const void *keep_c
        const void *y
        const void *dy
        const void *dh_in
        void *dh_out
        void *dc
        ptrdiff_t ldsums, ldx, ldh_in, ldh_seen, ldh_prev, ldc_prev, ldh, ldh_masked, ldc, ldgates, ldmask
        ptrdiff_t ldkeep_h, ldkeep_c, ldy, lddy, lddh_in, lddh_out, lddc
        ptrdiff_t ahead
        int tape
        const fl_choices *choices

    ctypedef void (*fl_update)(const fl_step *s, ptrdiff_t row, int rows, ptrdiff_t unit, int columns,
                               void *pre) noexcept nogil
    ctypedef void (*fl_pass)(const fl_step *s, fl_update update) noexcept nogil

    ctypedef struct fl_updates:
        fl_update forward[2]
        fl_update backward[2]

    ctypedef struct fl_kernels:
        const char *isa
        int lanes, rows, strip, panel
        fl_pass run_pass "pass"[3]
        const fl_updates *cells
        fl_updates linear
        fl_update store
        void (*pack)(void *panels, const void *const *weight, ptrdiff_t unit_stride, ptrdiff_t k_stride, ptrdiff_t units,
                     ptrdiff_t K, int sources, int gated, ptrdiff_t block_stride, ptrdiff_t begin,
                     ptrdiff_t end) noexcept nogil
        void (*pack_bias)(void *out, const void *const *first, const void *const *second, ptrdiff_t units, int columns,
                          ptrdiff_t blocks) noexcept nogil
        void (*to_bf16)(void *out, const void *panel, ptrdiff_t K, ptrdiff_t width) noexcept nogil
        void (*to_int8)(void *out, void *scales, const void *panel, ptrdiff_t K, ptrdiff_t width) noexcept nogil
        void (*slices)(void *out, ptrdiff_t slice_stride, ptrdiff_t width, ptrdiff_t n, const void *src, ptrdiff_t ld,
                       ptrdiff_t columns, void *sum, void *sum2) noexcept nogil
        void (*outer)(void *out, ptrdiff_t ldo, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t n, const void *strips,
                      ptrdiff_t stride, const void *panel) noexcept nogil
        void (*weigh)(void *out, ptrdiff_t columns, ptrdiff_t n, const void *g, ptrdiff_t ldg, const void *a,
                      ptrdiff_t lda) noexcept nogil
        void (*map)(const fl_activation *act, const void *values, void *out, ptrdiff_t size) noexcept nogil
        double (*peak)(ptrdiff_t rounds, void *scratch) noexcept nogil
        double (*read)(const void *data, ptrdiff_t size) noexcept nogil
    ptrdiff_t fl_panel_row(int lanes, ptrdiff_t left, int columns)

cdef const fl_kernels *kernels_of(dtype) except NULL
cdef dict caches()
cdef int set_caches(dict sizes) except -1
cdef int cell_index(name) except -1
cdef const fl_cell *cell_at(int index) noexcept

cdef class Choices:
    cdef fl_choices s
    cdef void set(self, fl_activation *act, dtype, choice, clip) except *
