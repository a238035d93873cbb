/* The whole C interface of fastlstm: array glossary, cells, one step's arguments, the kernel table.
 *
 * T steps, N batch, D input width, H hidden units, P width of h (H, or the projection size), G columns of gates.
 * A pass works on n rows (sequences at one time step). All arrays are row-major; ld* is the distance of two rows
 * in elements. Every array of a pass has the kernel table's element type. Kernels cannot fail: the caller owns
 * all memory and has validated all sizes.
 *
 * gates [n][G*H]: column c of unit u stands at c*H + u. Columns, in this order:
 *   LSTM               i  f  g  o          x and h reach all
 *   GRU                n  r  z  q          x reaches n r z; h reaches r z q; q = R_n h + b_hn
 *   GRU, reset before  n  r  z  rh         x reaches n r z; h reaches r z; r*h reaches n (second pass)
 *   RNN                a                   x and h reach it
 * Pre-activations on the way in, activations for the tape, gradients of the pre-activations after backward (the GRU's
 * q column then holds the gradient of q; the rh column keeps r*h).
 */
#ifndef FASTLSTM_H
#define FASTLSTM_H

#include <stddef.h>
#include <stdint.h>

enum { FL_LSTM, FL_GRU, FL_GRU_RESET_BEFORE, FL_RNN, FL_LINEAR, FL_CELLS };
enum { FL_TANH, FL_SIGMOID, FL_RELU, FL_SOFTSIGN, FL_HARD_TANH, FL_HARD_SIGMOID, FL_IDENTITY };

/* Columns of a cell: x reaches the columns [0, x_columns), h the columns [h_first, h_first + h_columns).
 * x_gate / h_gate: which gate of PyTorch's weight rows feeds each of those columns. passes: kernel calls per step. */
typedef struct {
    int columns, x_columns, h_first, h_columns, passes;
    int x_gate[4], h_gate[4];
} fl_cell;

/* One pass over n rows. A pass reads and writes what its comment in kernel_template.h names; a pointer that is optional
 * may be NULL. */
typedef struct {
    ptrdiff_t n;                /* rows */
    ptrdiff_t D, K, H;          /* width of x, width of the second operand, units computed by this pass */
    ptrdiff_t begin, end;       /* blocks of units to compute: [begin, end) */
    const void *panels;         /* packed weights, see pack() */
    const void *bias;           /* [block][column][lanes]; NULL: 0, or the gates hold bias + W x already */
    const void *x;              /* [n][D]; NULL: no first operand */
    const void *h_in;           /* [n][K] second operand: h_{t-1} (masked), dG_{t+1}, ...; NULL: none */
    const void *h_prev;         /* [n][P] h_{t-1} as it is */
    const void *c_prev;         /* [n][H] */
    void *h;                    /* [n][P] out */
    void *h_masked;             /* [n][P] out, h * mask; optional */
    void *c;                    /* [n][H] out */
    void *gates;                /* [n][G*H] */
    const void *mask;           /* [n][P] recurrent dropout; optional */
    const void *keep_h;         /* [n][P] zoneout: share of h_{t-1} that is kept; optional */
    const void *keep_c;         /* [n][H] zoneout of the cell; optional */
    const void *dy;             /* [n][P] gradient of y; optional */
    const void *dh_in;          /* [n][P] gradient of h_t that does not come through the product; optional */
    void *dh_out;               /* [n][P] the same for h_{t-1}; optional */
    void *dc;                   /* [n][H] gradient of c_t in, of c_{t-1} out */
    ptrdiff_t ldx, ldh_in, ldh_prev, ldc_prev, ldh, ldh_masked, ldc, ldgates, ldmask, ldkeep_h, ldkeep_c, lddy, lddh_in,
        lddh_out, lddc;
    ptrdiff_t ahead;            /* elements from these gates to those of the next step: prefetched */
    int tape;                   /* store the activations in gates */
    int preloaded;              /* gates hold bias + W x */
    int activation, recurrent_activation;
} fl_step;

typedef void (*fl_pass)(const fl_step *);

/* The kernels of one (type, ISA). */
typedef struct {
    const char *isa;
    int lanes, rows;            /* vector length in elements; rows of the step tile */
    int strip, panel;           /* rows and columns of the outer-product tile */
    fl_pass input[FL_CELLS];    /* gates = bias + W x */
    fl_pass forward[FL_CELLS][2], backward[FL_CELLS][2];
    fl_pass forward_bf16[FL_CELLS][2];   /* the same with bfloat16 panels; NULL in double */
    void (*pack)(void *panels, const void *const weight[4], ptrdiff_t unit_stride, ptrdiff_t k_stride, ptrdiff_t units,
                 ptrdiff_t K, int columns, int gated, ptrdiff_t block_stride, ptrdiff_t begin, ptrdiff_t end);
    void (*pack_bias)(void *out, const void *const first[4], const void *const second[4], ptrdiff_t units, int columns,
                      ptrdiff_t blocks);
    void (*to_bf16)(void *out, const void *panel, ptrdiff_t K, ptrdiff_t width);
    void (*slices)(void *out, ptrdiff_t slice_stride, ptrdiff_t width, ptrdiff_t n, const void *src, ptrdiff_t ld,
                   ptrdiff_t columns, void *sum, void *sum2);
    void (*outer)(void *out, ptrdiff_t ldo, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t n, const void *strip,
                  const void *panel);
    void (*map)(int activation, const void *in, void *out, ptrdiff_t size);
    double (*peak)(ptrdiff_t rounds, void *scratch);
    double (*read)(const void *data, ptrdiff_t size);
} fl_kernels;

extern const fl_cell fl_cells[FL_CELLS];

int fl_isa_count(void);                                  /* ISAs this binary holds and this machine can run */
const char *fl_isa_name(int i);                          /* weakest first */
const fl_kernels *fl_kernels_for(int i, int is_double);

/* A barrier for a team that meets once per step: spins a bounded while, then yields the processor. */
typedef struct { int waiting, phase; char pad[56]; } fl_barrier;
void fl_barrier_wait(fl_barrier *barrier, int team);

#endif
