/* The product of a tile for one (type, ISA, kind of weights): ROWS batch rows x FL_COLUMNS columns of one vector. A pass
 * with several gates has one column per gate for one vector of units, so that the update finds all gates of a unit side by
 * side; the others have up to four vectors of units.
 *
 * The chain of every element is fixed: init, x[0..D), h[0..K). It depends neither on the rows of the tile nor on the batch
 * nor on the thread, and a chain that stops in memory goes on with the same bits.
 *
 * Parameters: WEIGHT, the element of a panel; WEIGHTS(w, k, columns, column, part), vector `column` of its row k (part is
 * k % TOGETHER); WEIGHT_NAME(x), x with a suffix; SCALED. */

/* Rows of a panel that are taken together: those of a word, and two, so that a round has some work. */
#undef TOGETHER
#if SCALED
#define TOGETHER 4
#else
#define TOGETHER 2
#endif

/* acc[p][r][c] += a[r][k] w[p][k][c] for one k; p panels of `stride` elements. */
INLINE void WEIGHT_NAME(step)(const int rows, const int columns, const int panels, const int part,
                              VEC acc[2][ROWS][FL_COLUMNS], const REAL *a, ptrdiff_t lda, ptrdiff_t k, const WEIGHT *w,
                              ptrdiff_t stride)
{
    UNROLL for (int p = 0; p < panels; p++)
    {
        VEC v[FL_COLUMNS];
        UNROLL for (int c = 0; c < columns; c++) v[c] = WEIGHTS(w + p * stride, k, columns, c, part);
        UNROLL for (int r = 0; r < rows; r++)
        {
            REAL value = a[r * lda + k];
            UNROLL for (int c = 0; c < columns; c++) acc[p][r][c] += v[c] * value;
        }
    }
}

/* The same for k = 0 .. K - 1, in order. `ahead`: what the next panel's first tile will read. From beyond the L2 cache that
 * tile would wait: 33 MB of weights a step, 16 rows, ran at 57 % of the peak without. */
INLINE void WEIGHT_NAME(chain)(const int rows, const int columns, const int panels, VEC acc[2][ROWS][FL_COLUMNS],
                               const REAL *a, ptrdiff_t lda, ptrdiff_t K, const WEIGHT *w, ptrdiff_t stride,
                               const char *ahead, ptrdiff_t ahead_step)
{
    ptrdiff_t k = 0;
    for (; k + TOGETHER <= K; k += TOGETHER) {
        if (rows > FEW)
            UNROLL for (int line = 0; line < 4; line++) __builtin_prefetch(ahead + k * ahead_step + line * 64, 0, 2);
        UNROLL for (int part = 0; part < TOGETHER; part++)
            WEIGHT_NAME(step)(rows, columns, panels, part, acc, a, lda, k + part, w, stride);
    }
    UNROLL for (int part = 0; part < TOGETHER - 1; part++)
        if (k + part < K)
            WEIGHT_NAME(step)(rows, columns, panels, part, acc, a, lda, k + part, w, stride);
}

/* pre[p][r][c] = init[p][r][c] + sum_k x[r][k] wx[p][k][c] + sum_k h[r][k] wh[p][k][c]; the sums before the product stand
 * `init_panel` and `init_row` elements apart. SCALED: each sum over k times the scale of its column, and then added. */
#if SCALED
#define SCALE_ARGS , const REAL *scales
#define SCALES , scales
#else
#define SCALE_ARGS
#define SCALES
#endif
#define PRODUCT_ARGS                                                                                                    \
    REAL *pre, const REAL *init, ptrdiff_t init_panel, ptrdiff_t init_row, const WEIGHT *wx, const WEIGHT *wh,          \
        ptrdiff_t stride, const char *ahead, ptrdiff_t ahead_step, const REAL *x, ptrdiff_t ldx, ptrdiff_t D,           \
        const REAL *h, ptrdiff_t ldh, ptrdiff_t K SCALE_ARGS
#if SCALED
INLINE void WEIGHT_NAME(part)(const int rows, const int columns, const int panels, REAL *pre, const REAL *init,
                              ptrdiff_t init_panel, ptrdiff_t init_row, const REAL *a, ptrdiff_t lda, ptrdiff_t K,
                              const WEIGHT *w, ptrdiff_t stride, const char *ahead, ptrdiff_t ahead_step,
                              const REAL *scales)
{
    VEC acc[2][ROWS][FL_COLUMNS];
    UNROLL for (int p = 0; p < panels; p++) UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < columns; c++) acc[p][r][c] = SPLAT(0);
    WEIGHT_NAME(chain)(rows, columns, panels, acc, a, lda, K, w, stride, ahead, ahead_step);
    UNROLL for (int p = 0; p < panels; p++) UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < columns; c++)
    {
        VEC scale = ((const VEC *) scales)[p * 2 * FL_COLUMNS + c], sum = NAME(load)(init + p * init_panel + r * init_row + c * LANES);
        NAME(store)(PRE(p * ROWS + r, c), acc[p][r][c] * scale + sum);
    }
}
#endif

INLINE void WEIGHT_NAME(product)(const int rows, const int columns, const int panels, PRODUCT_ARGS)
{
#if SCALED
    const ptrdiff_t pre_row = FL_COLUMNS * LANES, pre_panel = ROWS * pre_row;
    if (D || !K)
        WEIGHT_NAME(part)(rows, columns, panels, pre, init, init_panel, init_row, x, ldx, D, wx, stride, ahead, ahead_step,
                          scales);
    if (K)
        WEIGHT_NAME(part)(rows, columns, panels, pre, D ? pre : init, D ? pre_panel : init_panel, D ? pre_row : init_row, h,
                          ldh, K, wh, stride, ahead + D * ahead_step, ahead_step, scales + FL_COLUMNS * LANES);
#else
    VEC acc[2][ROWS][FL_COLUMNS];
    UNROLL for (int p = 0; p < panels; p++) UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < columns; c++)
            acc[p][r][c] = ((const VEC *) (init + p * init_panel + r * init_row))[c];
    WEIGHT_NAME(chain)(rows, columns, panels, acc, x, ldx, D, wx, stride, ahead, ahead_step);
    WEIGHT_NAME(chain)(rows, columns, panels, acc, h, ldh, K, wh, stride, ahead + D * ahead_step, ahead_step);
    UNROLL for (int p = 0; p < panels; p++) UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < columns; c++) NAME(store)(PRE(p * ROWS + r, c), acc[p][r][c]);
#endif
}

#define INSTANCE(rows, columns, panels)                                                                                 \
    static TARGET void WEIGHT_NAME(product_##rows##_##columns##_##panels)(PRODUCT_ARGS)                                 \
    {                                                                                                                   \
        WEIGHT_NAME(product)(rows, columns, panels, pre, init, init_panel, init_row, wx, wh, stride, ahead,             \
                             ahead_step, x, ldx, D, h, ldh, K SCALES);                                                  \
    }
#define ENTRY(rows, columns, panels) WEIGHT_NAME(product_##rows##_##columns##_##panels),
#define EACH_COLUMNS(DO, rows, panels) DO(rows, 1, panels) DO(rows, 2, panels) DO(rows, 3, panels) DO(rows, 4, panels)

EACH_COLUMNS(INSTANCE, 1, 1)
EACH_COLUMNS(INSTANCE, 2, 1)
EACH_COLUMNS(INSTANCE, 3, 1)
EACH_COLUMNS(INSTANCE, 1, 2)
#if ROWS == 6
EACH_COLUMNS(INSTANCE, 4, 1)
EACH_COLUMNS(INSTANCE, 5, 1)
EACH_COLUMNS(INSTANCE, 6, 1)
EACH_COLUMNS(INSTANCE, 2, 2)
EACH_COLUMNS(INSTANCE, 3, 2)
#elif ROWS != 3
#error "ROWS: tiles of 3 and of 6 rows are written out"
#endif

/* [panels - 1][rows - 1][columns - 1] */
typedef void (*WEIGHT_NAME(product_fn))(PRODUCT_ARGS);
static const WEIGHT_NAME(product_fn) WEIGHT_NAME(products)[2][ROWS][FL_COLUMNS] = {
    {{EACH_COLUMNS(ENTRY, 1, 1)},
     {EACH_COLUMNS(ENTRY, 2, 1)},
     {EACH_COLUMNS(ENTRY, 3, 1)},
#if ROWS == 6
     {EACH_COLUMNS(ENTRY, 4, 1)},
     {EACH_COLUMNS(ENTRY, 5, 1)},
     {EACH_COLUMNS(ENTRY, 6, 1)},
#endif
    },
    {{EACH_COLUMNS(ENTRY, 1, 2)},
#if ROWS == 6
     {EACH_COLUMNS(ENTRY, 2, 2)},
     {EACH_COLUMNS(ENTRY, 3, 2)},
#endif
    }};
