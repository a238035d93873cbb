/* The product of a tile for one (type, ISA, kind of weights): ROWS batch rows x FL_COLUMNS columns of one vector. A pass
 * with several gates has one column per gate for one vector of units, so that the update finds all gates of a unit side by
 * side; the others have up to four vectors of units.
 *
 * The chain of every element is fixed: init, x[0..D), h[0..K). It depends neither on the rows of the tile nor on the batch
 * nor on the thread, and without scales a chain that stops in memory goes on with the same bits.
 *
 * Parameters: WEIGHT, the element of a panel; WEIGHTS(w, k, columns, column), vector `column` of its row k < TOGETHER;
 * DEPTH(k), the rows of a panel that k weights take; WEIGHT_NAME(x), x with a suffix; SCALED; and those of the ISA. */

/* Rows of a panel that are taken together: those of a word, and two, so that a round has some work. Of two gcc starts the
 * second's products before the first's sums, and where a product takes a register (SSE2) these then go through memory: 2 to
 * 5 % slower than one. */
#undef TOGETHER
#if SCALED
#define TOGETHER 4
#elif DEPTH(2) == 2 && VECTOR_BYTES == 16 && ROWS == 3
#define TOGETHER 1
#else
#define TOGETHER 2
#endif

/* Loops over the sums of a tile: panels `columns` vectors wide, the second one (0: there is none) `second`. Bounds are
 * written out and a condition leaves out the rest: Clang unrolls no loop whose bound is another loop's, and the sums would
 * stay in memory. */
#define EACH_PANEL UNROLL for (int p = 0; p < 2; p++)
#define EACH_COLUMN UNROLL for (int c = 0; c < FL_COLUMNS; c++) if (c >= (p ? second : columns)) {} else
#define EACH_TILE_ROW UNROLL for (int r = 0; r < ROWS; r++) if (r >= rows) {} else
#define EACH_SUM EACH_PANEL EACH_TILE_ROW EACH_COLUMN

/* What the compilers need to be told, with gcc 12 and Clang 14 on a Zen 4; rows x units, GFLOP/s.
 * gcc reads a weight anew for every row, as an operand of the multiply-add, unless told that its register changes: that
 * crowds the load ports. To tell it pays where the sums leave room for all weights of a round, with few rows: 4 x 256 runs
 * at 81 for 65 with AVX2, 3 x 256 at 102 for 90 with AVX-512. Clang orders loads by itself: it wants to know all of a round's
 * weights at once, 16 x 256 of int8 runs at 67 for 48 with AVX2. */
#undef HOLD
#undef AT_ONCE
#if defined(__clang__)
#define AT_ONCE(rows) 1
#else
#define AT_ONCE(rows) (rows > FL_COLUMNS)
#endif
#if REGISTERS && !defined(__clang__)
#define HOLD(rows, sums, weight)                                                                                        \
    if (rows > 1 && sums + rows + FL_COLUMNS <= REGISTERS)                                                              \
    __asm__("" : "+v"(weight))
#else
#define HOLD(rows, sums, weight)
#endif

/* acc[p][r][c] += a[r][part] w[p][part][c]. Of rows and columns the fewer stay in registers, the others come one at a time:
 * the sums, a value of each of three rows and one weight are 16 registers in AVX2; with four weights and a value, which were
 * 17, 96 x 256 ran at 87 GFLOP/s instead of 98. The rows go by two pointers, so that the addresses of six need no memory. */
INLINE void WEIGHT_NAME(step)(const int rows, const int columns, const int second, const int part,
                              VEC acc[2][ROWS][FL_COLUMNS], const REAL *low, const REAL *high, ptrdiff_t lda,
                              const WEIGHT *const w[2])
{
    EACH_PANEL
    {
        REAL v[ROWS];
        VEC weight[FL_COLUMNS];
        EACH_TILE_ROW v[r] = r < ROWS / 2 ? low[r * lda + part] : high[(r - ROWS / 2) * lda + part];
        if (AT_ONCE(rows))
            EACH_COLUMN weight[c] = WEIGHTS(w[p], part, (p ? second : columns), c);
        if (rows > FL_COLUMNS)
            EACH_TILE_ROW EACH_COLUMN acc[p][r][c] += weight[c] * v[r];
        else
            EACH_COLUMN
            {
                if (!AT_ONCE(rows))
                    weight[c] = WEIGHTS(w[p], part, (p ? second : columns), c);
                HOLD(rows, rows * (columns + second), weight[c]);
                EACH_TILE_ROW acc[p][r][c] += weight[c] * v[r];
            }
    }
}

/* The same for k = 0 .. K - 1, in order. `ahead`: a share of what is read next, `ahead_step` bytes a k. From beyond the L2
 * cache the first tile of a panel would wait: 33 MB of weights a step, 16 rows, ran at 57 % of the peak without. */
INLINE void WEIGHT_NAME(chain)(const int rows, const int columns, const int second, VEC acc[2][ROWS][FL_COLUMNS],
                               const REAL *a, ptrdiff_t lda, ptrdiff_t K, const WEIGHT *first, ptrdiff_t stride,
                               const char *ahead, ptrdiff_t ahead_step)
{
    const WEIGHT *w[2] = {first, first + stride};
    const REAL *low = a, *high = a + ROWS / 2 * lda;
    ptrdiff_t left = K;
    for (; left >= TOGETHER; left -= TOGETHER) {
        if (rows > FEW) {
            __builtin_prefetch(ahead, 0, 2);
            if (TOGETHER * ahead_step > 64) /* few tiles; else more than a line would crowd the load ports of AVX2: 7 % */
                UNROLL for (int line = 1; line < 4; line++) __builtin_prefetch(ahead + line * 64, 0, 2);
        }
        UNROLL for (int part = 0; part < TOGETHER; part++)
            WEIGHT_NAME(step)(rows, columns, second, part, acc, low, high, lda, w);
        low += TOGETHER, high += TOGETHER, ahead += TOGETHER * ahead_step;
        w[0] += DEPTH(TOGETHER) * columns * LANES, w[1] += DEPTH(TOGETHER) * second * LANES;
    }
    UNROLL for (int part = 0; part < TOGETHER - 1; part++)
        if (part < left)
            WEIGHT_NAME(step)(rows, columns, second, part, acc, low, high, lda, w);
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
INLINE void WEIGHT_NAME(part)(const int rows, const int columns, const int second, REAL *pre, const REAL *init,
                              ptrdiff_t init_panel, ptrdiff_t init_row, const REAL *a, ptrdiff_t lda, ptrdiff_t K,
                              const WEIGHT *w, ptrdiff_t stride, const char *ahead, ptrdiff_t ahead_step,
                              const REAL *scales)
{
    VEC acc[2][ROWS][FL_COLUMNS];
    EACH_SUM acc[p][r][c] = SPLAT(0);
    WEIGHT_NAME(chain)(rows, columns, second, acc, a, lda, K, w, stride, ahead, ahead_step);
    EACH_SUM
    {
        VEC scale = ((const VEC *) scales)[p * 2 * FL_COLUMNS + c], sum = NAME(load)(init + p * init_panel + r * init_row + c * LANES);
        NAME(store)(PRE(p * ROWS + r, c), acc[p][r][c] * scale + sum);
    }
}
#endif

INLINE void WEIGHT_NAME(product)(const int rows, const int columns, const int second, PRODUCT_ARGS)
{
#if SCALED
    const ptrdiff_t pre_row = FL_COLUMNS * LANES, pre_panel = ROWS * pre_row;
    if (D || !K)
        WEIGHT_NAME(part)(rows, columns, second, pre, init, init_panel, init_row, x, ldx, D, wx, stride, ahead, ahead_step,
                          scales);
    if (K)
        WEIGHT_NAME(part)(rows, columns, second, pre, D ? pre : init, D ? pre_panel : init_panel, D ? pre_row : init_row, h,
                          ldh, K, wh, stride, ahead + D * ahead_step, ahead_step, scales + FL_COLUMNS * LANES);
#else
    VEC acc[2][ROWS][FL_COLUMNS];
    EACH_SUM acc[p][r][c] = ((const VEC *) (init + p * init_panel + r * init_row))[c];
    WEIGHT_NAME(chain)(rows, columns, second, acc, x, ldx, D, wx, stride, ahead, ahead_step);
    WEIGHT_NAME(chain)(rows, columns, second, acc, h, ldh, K, wh, stride, ahead + D * ahead_step, ahead_step);
    EACH_SUM NAME(store)(PRE(p * ROWS + r, c), acc[p][r][c]);
#endif
}

/* Each begins at a line of the cache, so that its loops lie in it in one way, whatever stands before: with SSE2 on a Zen 4 a
 * product ran 4 % faster or slower from one build to the next. */
#define INSTANCE(rows, columns, second)                                                                                 \
    static TARGET __attribute__((aligned(64))) void                                                                     \
    WEIGHT_NAME(product_##rows##_##columns##_##second)(PRODUCT_ARGS)                                                    \
    {                                                                                                                   \
        WEIGHT_NAME(product)(rows, columns, second, pre, init, init_panel, init_row, wx, wh, stride, ahead,             \
                             ahead_step, x, ldx, D, h, ldh, K SCALES);                                                  \
    }
#define ENTRY(rows, columns, second) [rows - 1][columns - 1][second] = WEIGHT_NAME(product_##rows##_##columns##_##second),
#define SINGLE(DO, rows) DO(rows, 1, 0) DO(rows, 2, 0) DO(rows, 3, 0) DO(rows, 4, 0)
/* Two panels as wide; with one row, the second one may be the last and folded. */
#define PAIRS(DO, rows) DO(rows, 1, 1) DO(rows, 2, 2) DO(rows, 3, 3) DO(rows, 4, 4)
#define MIXED(DO) DO(1, 2, 1) DO(1, 3, 1) DO(1, 3, 2) DO(1, 4, 1) DO(1, 4, 2)
#if ROWS == 6
#define EACH_PRODUCT(DO)                                                                                                \
    SINGLE(DO, 1) SINGLE(DO, 2) SINGLE(DO, 3) SINGLE(DO, 4) SINGLE(DO, 5) SINGLE(DO, 6) PAIRS(DO, 1) PAIRS(DO, 2)       \
    PAIRS(DO, 3) MIXED(DO)
#elif ROWS == 3
#define EACH_PRODUCT(DO) SINGLE(DO, 1) SINGLE(DO, 2) SINGLE(DO, 3) PAIRS(DO, 1) MIXED(DO)
#else
#error "ROWS: tiles of 3 and of 6 rows are written out"
#endif

EACH_PRODUCT(INSTANCE)

/* [rows - 1][columns - 1][columns of the second panel] */
typedef void (*WEIGHT_NAME(product_fn))(PRODUCT_ARGS);
static const WEIGHT_NAME(product_fn) WEIGHT_NAME(products)[ROWS][FL_COLUMNS][FL_COLUMNS + 1] = {EACH_PRODUCT(ENTRY)};
#undef EACH_PRODUCT
