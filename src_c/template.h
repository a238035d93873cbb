/* Everything for one (type, ISA): REAL, UINT, IS_FLOAT and NAME(x) come from instantiate.h, the rest from kernels.c.
 * What is defined here and below is undefined at the end, but for macros whose text never changes. */

#include "vmath.h"
#include "pack.h"

/* The sums of a tile: [row][FL_COLUMNS][lanes]; of so many tiles that take the same part of a panel one after the other. */
#define SLOT (ROWS * FL_COLUMNS * LANES)
#define GROUP (96 / ROWS)
#define PRE(row, column) ((REAL *) pre + ((row) * FL_COLUMNS + (column)) * LANES)

static const REAL NAME(zeros)[FL_COLUMNS * LANES] __attribute__((aligned(64)));

/* Sums before the product that do not lie side by side: those of a former pass or product, the bias, or zero. */
INLINE void NAME(begin)(const fl_step *s, int gated, ptrdiff_t unit, ptrdiff_t row, int rows, int columns,
                        const REAL *init, REAL *pre)
{
    const ptrdiff_t apart = gated ? s->H : LANES;
    const int whole = unit + (gated ? 1 : columns) * LANES <= s->H;
    for (int r = 0; r < rows; r++) {
        const REAL *sums = (const REAL *) s->sums + (row + r) * s->ldsums + unit;
        if (!s->sums)
            for (int c = 0; c < columns; c++)
                NAME(store)(PRE(r, c), ((const VEC *) init)[c]);
        else if (whole)
            for (int c = 0; c < columns; c++)
                NAME(store)(PRE(r, c), NAME(load)(sums + c * apart));
        else
            for (int c = 0; c < columns; c++) {
                const ptrdiff_t left = s->H - unit - (gated ? 0 : c * LANES);
                NAME(store)(PRE(r, c), NAME(load_part)(sums + c * apart, left < LANES ? (int) left : LANES));
            }
    }
}

/* The columns of a tile's sums side by side, `span` lanes each, as the panels of the last block have them, and back. */
INLINE void NAME(fold)(REAL *pre, int rows, int columns, int span)
{
    for (int r = 0; r < rows; r++)
        for (int c = 1; c < columns; c++) /* upward: a vector overwrites only what was moved */
            NAME(store)(PRE(r, 0) + c * span, NAME(load)(PRE(r, c)));
}

INLINE void NAME(unfold)(REAL *pre, int rows, int columns, int span)
{
    for (int r = 0; r < rows; r++)
        for (int c = columns - 1; c > 0; c--)
            NAME(store)(PRE(r, c), NAME(load)(PRE(r, 0) + c * span));
}

/* ---- the kinds of weights ---- */

/* as they are */
#define WEIGHT REAL
#define WEIGHT_NAME(x) NAME(x##_plain)
#define WEIGHTS(w, k, columns, column) (((const VEC *) (w))[(k) * (columns) + (column)])
#define DEPTH(k) (k)
#define SCALED 0
#include "panel.h"
#include "pass.h"
#undef WEIGHT
#undef WEIGHT_NAME
#undef WEIGHTS
#undef DEPTH
#undef SCALED

#if IS_FLOAT
/* bfloat16 is the upper half of a float. A word holds an even k below and the next above: two vectors are one load, a
 * shift and a mask. */
INLINE VEC NAME(weights_bf16)(const UINT *w, int k, int columns, int column)
{
    UVEC word = ((const UVEC *) w)[column];
    (void) columns;
    return k ? (VEC) (word & 0xffff0000u) : (VEC) (word << 16);
}
#define WEIGHT UINT
#define WEIGHT_NAME(x) NAME(x##_bf16)
#define WEIGHTS NAME(weights_bf16)
#define DEPTH(k) (((k) + 1) / 2)
#define SCALED 0
#include "panel.h"
#include "pass.h"
#undef WEIGHT
#undef WEIGHT_NAME
#undef WEIGHTS
#undef DEPTH
#undef SCALED

/* int8 with a scale for each unit and column, apart for x and h: sums += scale * (sum of a[k] q[k]). A word holds four k,
 * the lowest below; each is taken as it stands at the top of a word, 2^24 q[k], which the scale makes up for. */
typedef int32_t NAME(words) __attribute__((vector_size(VECTOR_BYTES)));
INLINE VEC NAME(weights_int8)(const UINT *w, int k, int columns, int column)
{
    UVEC word = ((const UVEC *) w)[column];
    (void) columns;
    word <<= 24 - 8 * k;
    return __builtin_convertvector((NAME(words)) (k ? word & 0xff000000u : word), VEC);
}
#define WEIGHT UINT
#define WEIGHT_NAME(x) NAME(x##_int8)
#define WEIGHTS NAME(weights_int8)
#define DEPTH(k) (((k) + 3) / 4)
#define SCALED 1
#include "panel.h"
#include "pass.h"
#undef WEIGHT
#undef WEIGHT_NAME
#undef WEIGHTS
#undef DEPTH
#undef SCALED
#endif

/* ---- the cells ---- */

#include "update.h"

#include "cells/linear.h"
#include "cells/lstm.h"
#include "cells/lstm_peephole.h"
#include "cells/lstm_coupled.h"
#include "cells/lstm_norm.h"
#include "cells/slstm.h"
#include "cells/gru.h"
#include "cells/rnn.h"

#include "outer.h"
#include "probe.h"

#define UPDATES(cell) cell##_UPDATES,
static const fl_updates NAME(updates)[] = {CELLS(UPDATES)};

static const fl_kernels NAME(kernels) = {
    .isa = ISA_NAME,
    .lanes = LANES,
    .rows = ROWS,
    .strip = STRIP,
    .panel = OUTER_COLUMNS * LANES,
#if IS_FLOAT
    .pass = {NAME(pass_plain), NAME(pass_bf16), NAME(pass_int8)},
    .to_bf16 = NAME(to_bf16),
    .to_int8 = NAME(to_int8),
#else
    .pass = {NAME(pass_plain)},
#endif
    .cells = NAME(updates),
    .linear = LINEAR_UPDATES,
    .store = NAME(store_sums),
    .pack = NAME(pack),
    .pack_bias = NAME(pack_bias),
    .slices = NAME(slices),
    .outer = NAME(outer),
    .weigh = NAME(weigh),
    .map = NAME(map),
    .peak = NAME(peak),
    .read = NAME(read),
};

#undef PACKED
#undef MIN
#undef MAX
#undef MASK
#undef MASKED_LOAD
#undef MASKED_STORE
#undef LOWER
#undef UPPER
#undef MAGIC
#undef MANTISSA_BITS
#undef ONE_BITS
#undef SIGN_BIT
#undef LN2_HI
#undef LN2_LO
#undef SIGMOID_LIMIT
#undef SIGMOID_END
#undef TANH_LIMIT
