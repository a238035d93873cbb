/* The whole C interface of fastlstm: array glossary, a cell's descriptor, one step's arguments, the kernel table.
 *
 * T steps, N batch, D input width, H hidden units, P width of h (H, or the projection size), G columns of gates, S states
 * beside h. A pass works on n rows (sequences at one time step). All arrays are row-major; ld* is the distance of two rows
 * in elements. Every array of a pass has the kernel table's element type. Kernels cannot fail: the caller owns all memory
 * and has validated all sizes.
 *
 * gates [n][G*H]: column c of unit u stands at c*H + u. Pre-activations on the way in, activations for the tape, gradients
 * of the pre-activations after backward. c [n][S*H]: the states beside h, side by side.
 */
#ifndef FASTLSTM_H
#define FASTLSTM_H

#include <stddef.h>
#include <stdint.h>

#define FL_COLUMNS 4            /* of a tile: gates of a pass, or vectors of units where a pass has one gate */
#define FL_PASSES 2
#define FL_TERMS 4
#define FL_VECTORS 10

enum {
    FL_TANH, FL_SIGMOID, FL_RELU, FL_SOFTSIGN, FL_HARD_TANH, FL_HARD_SIGMOID, FL_IDENTITY, FL_LINEAR_SIGMOID, FL_ELU,
    FL_LEAKY_RELU, FL_SOFTPLUS, FL_SCALED_TANH
};
enum { FL_PLAIN, FL_BF16, FL_INT8, FL_WEIGHT_TYPES };    /* how packed weights are stored */
enum { FL_IH, FL_HH, FL_HR, FL_WEIGHTS };       /* weight_ih with bias_ih, weight_hh with bias_hh, weight_hr */
/* Operands: x_t, h_{t-1} (masked), c_{t-1}, the cell's output before a projection; FL_GATE + k: column k of the gates; FL_ONE:
 * the number 1, of a parameter that is added. */
enum { FL_ONE = -1, FL_X, FL_H, FL_C, FL_M, FL_GATE };

/* One matrix product of a step: gates[first .. first + columns) += operand weight', column by column of H units. */
typedef struct {
    int pass;                   /* the kernel call of the step that computes it */
    int operand;
    int first, columns;
    int weight;
    int rows[FL_COLUMNS];       /* which block of H rows of the weight (and its bias) feeds each column */
} fl_term;

/* A parameter with one value a unit. Its gradient is the sum over the rows of gates[column] * operand, after backward. */
typedef struct {
    const char *name;
    int column, operand;
    int gain;                   /* a factor: 1 at the beginning, not 0 */
} fl_vector;

/* All that the engine must know of a cell; each stands on the cell's page in cells/. Names are one letter each. */
typedef struct {
    const char *name;
    const char *states;         /* h first */
    const char *gates;          /* in the order of the weights' rows */
    const char *columns;        /* of the tape: the gates as they stand in memory, and what else backward needs */
    int passes;                 /* kernel calls of a step; one without terms takes whole rows and has no product */
    int past;                   /* a part of dh_{t-1} goes past the products */
    fl_term terms[FL_TERMS];    /* x before h in a pass; ends with columns == 0 */
    fl_vector vectors[FL_VECTORS];  /* ends with name == NULL */
} fl_cell;

/* An activation with its numbers, y = act(min(max(a, -clip), clip)). All of them rise, so that y tells where a was cut. */
typedef struct {
    int kind;
    double alpha, beta;
    double clip;                /* infinity: none */
    double low, high;           /* y at -clip and at clip */
} fl_activation;

/* What a layer may choose. A step without has tanh, tanh, sigmoid and no limits. */
typedef struct {
    fl_activation act;          /* of the candidate */
    fl_activation out;          /* of the cell on its way out */
    fl_activation gate;
    double cell_clip;           /* limit of the new cell; infinity: none */
    double proj_clip;           /* limit of the projected h */
    double epsilon;             /* added to a variance */
} fl_choices;

/* The panels of a pass with a column per gate: lanes that each column takes in a block with `left` units. The last block has
 * its columns side by side in a half or a quarter of a vector each, where that is enough. */
static inline int fl_span(int lanes, ptrdiff_t left)
{
    return left > lanes / 2 ? lanes : left > lanes / 4 ? lanes / 2 : lanes / 4;
}

/* Elements of a row of that panel: whole vectors. */
static inline ptrdiff_t fl_panel_row(int lanes, ptrdiff_t left, int columns)
{
    return ((ptrdiff_t) fl_span(lanes, left) * columns + lanes - 1) / lanes * lanes;
}

/* Bytes of this core's caches, which say where a pass cuts its panels, and whether tiles find weights in the second as fast as
 * they take them. */
typedef struct { ptrdiff_t l1, l2; int l2_feeds; } fl_cache_sizes;
extern fl_cache_sizes fl_caches;

/* In how many stretches of about this length so many bytes are cut, and element i of count's beginning: whole words. */
static inline ptrdiff_t fl_stretches(ptrdiff_t bytes, ptrdiff_t length)
{
    return bytes > length + length / 2 ? (bytes + length / 2) / length : 1;
}
static inline ptrdiff_t fl_cut(ptrdiff_t n, ptrdiff_t i, ptrdiff_t count)
{
    return i == 0 ? 0 : i == count ? n : n * i / count & ~(ptrdiff_t) 3;
}

/* One pass over n rows. A pass reads and writes what the comment at its update names; a pointer that is optional may be
 * NULL. */
typedef struct {
    ptrdiff_t n;                /* rows */
    ptrdiff_t D, K, H;          /* width of x, width of the second operand, units computed by this pass */
    ptrdiff_t begin, end;       /* blocks of units to compute: [begin, end) */
    int backwards;              /* from the last one to the first */
    int columns;                /* gates of the pass; 1: a block holds FL_COLUMNS vectors of units, else one */
    int x_columns;              /* x reaches the columns [0, x_columns) */
    int h_first, h_columns;     /* the second operand reaches [h_first, h_first + h_columns) */
    const void *panels;         /* packed weights, see pack(); NULL: no product, the sums are complete */
    const void *scales;         /* [block][x, h][column][lanes] of int8 panels, times 2^-24 */
    const void *bias;           /* [block][column][lanes] what the sums start from; NULL: 0 */
    const void *sums;           /* [n][columns*H] the same, of a former pass or product, in place of the bias; optional */
    const void *x;              /* [n][D]; NULL: no first operand */
    const void *h_in;           /* [n][K] second operand: h_{t-1} (masked), dG_{t+1}, ...; NULL: none */
    const void *h_seen;         /* [n][P] h_{t-1} as the products see it (masked) */
    const void *h_prev;         /* [n][P] h_{t-1} as it is */
    const void *c_prev;         /* [n][S*H] */
    void *h;                    /* [n][P] out */
    void *h_masked;             /* [n][P] out, h * mask; optional */
    void *c;                    /* [n][S*H] out */
    void *gates;                /* [n][G*H] */
    const void *vectors;        /* [vector][H] */
    const void *mask;           /* [n][P] recurrent dropout; optional */
    const void *keep_h;         /* [n][P] zoneout: share of h_{t-1} that is kept; optional */
    const void *keep_c;         /* [n][H] zoneout of the cell; optional */
    const void *y;              /* [n][P] h_t as forward left it, for the limit of the projection */
    const void *dy;             /* [n][P] gradient of y; optional */
    const void *dh_in;          /* [n][P] gradient of h_t that does not come through the product; optional */
    void *dh_out;               /* [n][P] the same for h_{t-1}; optional */
    void *dc;                   /* [n][S*H] gradient of c_t in, of c_{t-1} out */
    ptrdiff_t ldsums, ldx, ldh_in, ldh_seen, ldh_prev, ldc_prev, ldh, ldh_masked, ldc, ldgates, ldmask, ldkeep_h, ldkeep_c,
        ldy, lddy, lddh_in, lddh_out, lddc;
    ptrdiff_t ahead;            /* elements from these gates to those of the next step: prefetched */
    int tape;                   /* store the activations in gates */
    const fl_choices *choices;  /* NULL: the defaults */
} fl_step;

/* What a cell does with the sums of one tile of a pass: `rows` rows from `row`, one block of units from `unit`,
 * pre [row][FL_COLUMNS][lanes]. */
typedef void (*fl_update)(const fl_step *s, ptrdiff_t row, int rows, ptrdiff_t unit, int columns, void *pre);

/* Every block of units x every tile of rows: the product, then the update. */
typedef void (*fl_pass)(const fl_step *s, fl_update update);

typedef struct { fl_update forward[FL_PASSES], backward[FL_PASSES]; } fl_updates;

/* The kernels of one (type, ISA). */
typedef struct {
    const char *isa;
    int lanes, rows;            /* vector length in elements; rows of the step tile */
    int strip, panel;           /* rows and columns of the outer-product tile */
    fl_pass pass[FL_WEIGHT_TYPES];      /* bfloat16, int8: NULL in double */
    const fl_updates *cells;    /* in the order of fl_cells */
    fl_updates linear;          /* a product and nothing else: the projection, dx, dh_0 */
    fl_update store;            /* gates = sums */
    void (*pack)(void *panels, const void *const weight[FL_COLUMNS], ptrdiff_t unit_stride, ptrdiff_t k_stride,
                 ptrdiff_t units, ptrdiff_t K, int sources, int gated, ptrdiff_t block_stride, ptrdiff_t begin,
                 ptrdiff_t end);
    void (*pack_bias)(void *out, const void *const first[FL_COLUMNS], const void *const second[FL_COLUMNS], ptrdiff_t units,
                      int columns, ptrdiff_t blocks);
    void (*to_bf16)(void *out, const void *panel, ptrdiff_t K, ptrdiff_t width);
    void (*to_int8)(void *out, void *scales, const void *panel, ptrdiff_t K, ptrdiff_t width);
    void (*slices)(void *out, ptrdiff_t slice_stride, ptrdiff_t width, ptrdiff_t n, const void *src, ptrdiff_t ld,
                   ptrdiff_t columns, void *sum, void *sum2);
    void (*outer)(void *out, ptrdiff_t ldo, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t n, const void *strips,
                  ptrdiff_t stride, const void *panel);
    void (*weigh)(void *out, ptrdiff_t columns, ptrdiff_t n, const void *g, ptrdiff_t ldg, const void *a, ptrdiff_t lda);
    void (*map)(const fl_activation *act, const void *in, void *out, ptrdiff_t size);
    double (*peak)(ptrdiff_t rounds, void *scratch);
    double (*read)(const void *data, ptrdiff_t size);
} fl_kernels;

extern const fl_cell fl_cells[];
extern const int fl_cell_count;

int fl_l2_feeds(void);                                   /* of this machine */
int fl_isa_count(void);                                  /* ISAs this binary holds and this machine can run */
const char *fl_isa_name(int i);                          /* weakest first */
const fl_kernels *fl_kernels_for(int i, int is_double);

#endif
