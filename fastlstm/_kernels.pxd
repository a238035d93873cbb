"""src_c/fastlstm.h seen from Cython."""
cdef extern from "fastlstm.h" nogil:
    enum:
        FL_LSTM, FL_GRU, FL_GRU_RESET_BEFORE, FL_RNN, FL_LINEAR, FL_CELLS
        FL_TANH, FL_SIGMOID, FL_RELU, FL_SOFTSIGN, FL_HARD_TANH, FL_HARD_SIGMOID, FL_IDENTITY

    ctypedef struct fl_cell:
        int columns, x_columns, h_first, h_columns, passes
        int x_gate[4]
        int h_gate[4]

    ctypedef struct fl_step:
        ptrdiff_t n, D, K, H, begin, end
        const void *panels
        const void *bias
        const void *x
        const void *h_in
        const void *h_prev
        const void *c_prev
        void *h
        void *h_masked
        void *c
        void *gates
        const void *mask
        const void *keep_h
        const void *keep_c
        const void *dy
        const void *dh_in
        void *dh_out
        void *dc
        ptrdiff_t ldx, ldh_in, ldh_prev, ldc_prev, ldh, ldh_masked, ldc, ldgates, ldmask
        ptrdiff_t ldkeep_h, ldkeep_c, lddy, lddh_in, lddh_out, lddc
        ptrdiff_t ahead
        int tape, preloaded, activation, recurrent_activation

    ctypedef void (*fl_pass)(const fl_step *) noexcept nogil

    ctypedef struct fl_kernels:
        const char *isa
        int lanes, rows, strip, panel
        fl_pass input[5]
        fl_pass forward[5][2]
        fl_pass backward[5][2]
        fl_pass forward_bf16[5][2]
        void (*pack)(void *panels, const void *const *weight, ptrdiff_t unit_stride, ptrdiff_t k_stride, ptrdiff_t units,
                     ptrdiff_t K, int columns, int gated, ptrdiff_t block_stride, ptrdiff_t begin,
                     ptrdiff_t end) noexcept nogil
        void (*pack_bias)(void *out, const void *const *first, const void *const *second, ptrdiff_t units, int columns,
                          ptrdiff_t blocks) noexcept nogil
        void (*to_bf16)(void *out, const void *panel, ptrdiff_t K, ptrdiff_t width) noexcept nogil
        void (*slices)(void *out, ptrdiff_t slice_stride, ptrdiff_t width, ptrdiff_t n, const void *src, ptrdiff_t ld,
                       ptrdiff_t columns, void *sum, void *sum2) noexcept nogil
        void (*outer)(void *out, ptrdiff_t ldo, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t n, const void *strip,
                      const void *panel) noexcept nogil
        void (*map)(int activation, const void *values, void *out, ptrdiff_t size) noexcept nogil
        double (*peak)(ptrdiff_t rounds, void *scratch) noexcept nogil
        double (*read)(const void *data, ptrdiff_t size) noexcept nogil

    const fl_cell fl_cells[5]
    int fl_isa_count()
    const char *fl_isa_name(int i)
    const fl_kernels *fl_kernels_for(int i, int is_double)

    ctypedef struct fl_barrier:
        int waiting, phase
    void fl_barrier_wait(fl_barrier *barrier, int team)
