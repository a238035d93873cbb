/* Panel product, packing, and each cell's forward and backward step for one (type, ISA).
 *
 * Parameters: those of vmath_template.h, and
 *   ROWS      rows of the step tile (6 with 32 vector registers, 3 with 16)
 *
 * The tile: ROWS batch rows x 4 columns of one vector. A gated cell (LSTM, GRU) has one column per gate for one vector of
 * units, so that the cell update finds all gates of a unit side by side; the others have four vectors of units. The chain
 * of every element is fixed: bias, x[0..D), h[0..K). It depends neither on the rows of the tile nor on the batch nor on
 * the thread, and a chain that stops in memory goes on with the same bits.
 *
 * The product leaves its sums in `pre` [row][4][lanes] on the stack; the update of a cell is one function that is compiled
 * once and reads them from there, so all tile heights share its bits.
 */

#define COLUMNS 4
#define PRE(row, column) (pre + ((row) * COLUMNS + (column)) * LANES)
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

/* ---- panel product ------------------------------------------------------------------------------------------------ */

/* Vector `column` of row k of a panel; `odd` is k % 2. */
INLINE VEC NAME(weights)(const REAL *w, ptrdiff_t k, int columns, int column, int odd)
{
    (void) odd;
    return ((const VEC *) w)[k * columns + column];
}

#if IS_FLOAT
/* bfloat16 is the upper half of a float. A word holds an even k below and the next above: two vectors are one load, a
 * shift and a mask. */
INLINE VEC NAME(weights_bf16)(const UINT *w, ptrdiff_t k, int columns, int column, int odd)
{
    UVEC word = ((const UVEC *) w)[k / 2 * columns + column];
    return odd ? (VEC) (word & 0xffff0000u) : (VEC) (word << 16);
}
#endif
#define DEPTH(k) (k)                    /* rows of a panel that k weights take */
#define DEPTH_bf16(k) (((k) + 1) / 2)

/* pre[p][r][c] = init[p][r][c] + sum_k a[r][k] w[p][k][c], k in order; p panels of `stride` elements, c columns of one
 * vector; the sums before the product stand `init_panel` and `init_row` elements apart. */
#define PRODUCT_STEP(WEIGHTS, a, lda, k, odd, w)                                                                        \
    UNROLL for (int p = 0; p < panels; p++) {                                                                           \
        VEC v[COLUMNS];                                                                                                 \
        UNROLL for (int c = 0; c < columns; c++) v[c] = WEIGHTS((w) + p * stride, k, columns, c, odd);                  \
        UNROLL for (int r = 0; r < rows; r++) {                                                                         \
            REAL value = (a)[r * (lda) + (k)];                                                                          \
            UNROLL for (int c = 0; c < columns; c++) acc[p][r][c] += v[c] * value;                                      \
        }                                                                                                               \
    }
/* `ahead`: what the next panel's first tile will read. From beyond the L2 cache that tile would wait: 33 MB of weights a
 * step, 16 rows, ran at 57 % of the peak without. */
#define PRODUCT_LOOP(WEIGHTS, a, lda, K, w, ahead)                                                                      \
    for (ptrdiff_t k = 0; k + 1 < (K); k += 2) {                                                                        \
        if (rows > FEW) UNROLL for (int line = 0; line < 4; line++)                                                     \
            __builtin_prefetch((ahead) + k * ahead_step + line * 64, 0, 2);                                             \
        PRODUCT_STEP(WEIGHTS, a, lda, k, 0, w)                                                                          \
        PRODUCT_STEP(WEIGHTS, a, lda, k + 1, 1, w)                                                                      \
    }                                                                                                                   \
    if ((K) % 2) {                                                                                                      \
        PRODUCT_STEP(WEIGHTS, a, lda, (K) - 1, 0, w)                                                                    \
    }

#define PRODUCT_ARGS(TYPE)                                                                                              \
    REAL *pre, const REAL *init, ptrdiff_t init_panel, ptrdiff_t init_row, const TYPE *wx, const TYPE *wh,              \
        ptrdiff_t stride, const char *ahead, ptrdiff_t ahead_step, const REAL *x, ptrdiff_t ldx, ptrdiff_t D,           \
        const REAL *h, ptrdiff_t ldh, ptrdiff_t K
#define PRODUCT_BODY(TYPE, WEIGHTS, SUFFIX)                                                                             \
    INLINE void NAME(product##SUFFIX)(const int rows, const int columns, const int panels, PRODUCT_ARGS(TYPE))          \
    {                                                                                                                   \
        VEC acc[2][ROWS][COLUMNS];                                                                                      \
        UNROLL for (int p = 0; p < panels; p++) UNROLL for (int r = 0; r < rows; r++)                                   \
            UNROLL for (int c = 0; c < columns; c++) acc[p][r][c] = ((const VEC *) (init + p * init_panel + r * init_row))[c]; \
        PRODUCT_LOOP(WEIGHTS, x, ldx, D, wx, ahead)                                                                     \
        PRODUCT_LOOP(WEIGHTS, h, ldh, K, wh, ahead + D * ahead_step)                                                    \
        UNROLL for (int p = 0; p < panels; p++) UNROLL for (int r = 0; r < rows; r++)                                   \
            UNROLL for (int c = 0; c < columns; c++) NAME(store)(PRE(p * ROWS + r, c), acc[p][r][c]);                   \
    }

#define INSTANCE(TYPE, SUFFIX, rows, columns, panels)                                                                   \
    static TARGET void NAME(product##SUFFIX##_##rows##_##columns##_##panels)(PRODUCT_ARGS(TYPE))                        \
    {                                                                                                                   \
        NAME(product##SUFFIX)(rows, columns, panels, pre, init, init_panel, init_row, wx, wh, stride, ahead,  \
                              ahead_step, x, ldx, D, h, ldh, K);                                                        \
    }
#define ENTRY(SUFFIX, rows, columns, panels) NAME(product##SUFFIX##_##rows##_##columns##_##panels)

#if ROWS == 6
#define EACH_ROWS(DO, T, S, c, p) DO(T, S, 1, c, p) DO(T, S, 2, c, p) DO(T, S, 3, c, p) \
    DO(T, S, 4, c, p) DO(T, S, 5, c, p) DO(T, S, 6, c, p)
#define EACH_FEW_ROWS(DO, T, S, c, p) DO(T, S, 1, c, p) DO(T, S, 2, c, p) DO(T, S, 3, c, p)
#define ENTRIES(S, c) {ENTRY(S, 1, c, 1), ENTRY(S, 2, c, 1), ENTRY(S, 3, c, 1), \
    ENTRY(S, 4, c, 1), ENTRY(S, 5, c, 1), ENTRY(S, 6, c, 1)}
#define FEW_ENTRIES(S, c) {ENTRY(S, 1, c, 2), ENTRY(S, 2, c, 2), ENTRY(S, 3, c, 2)}
#elif ROWS == 3
#define EACH_ROWS(DO, T, S, c, p) DO(T, S, 1, c, p) DO(T, S, 2, c, p) DO(T, S, 3, c, p)
#define EACH_FEW_ROWS(DO, T, S, c, p) DO(T, S, 1, c, p)
#define ENTRIES(S, c) {ENTRY(S, 1, c, 1), ENTRY(S, 2, c, 1), ENTRY(S, 3, c, 1)}
#define FEW_ENTRIES(S, c) {ENTRY(S, 1, c, 2)}
#endif

/* Tables [panels - 1][columns - 1][rows - 1]; two panels at a time only where the rows are few (FEW): with one row four
 * sums are too few to hide the latency of an FMA. */
#define FEW (ROWS / 2)
#define PRODUCTS(TYPE, WEIGHTS, SUFFIX)                                                                                 \
    PRODUCT_BODY(TYPE, WEIGHTS, SUFFIX)                                                                                 \
    EACH_ROWS(INSTANCE, TYPE, SUFFIX, 1, 1) EACH_ROWS(INSTANCE, TYPE, SUFFIX, 2, 1)                                     \
    EACH_ROWS(INSTANCE, TYPE, SUFFIX, 3, 1) EACH_ROWS(INSTANCE, TYPE, SUFFIX, 4, 1)                                     \
    EACH_FEW_ROWS(INSTANCE, TYPE, SUFFIX, 1, 2) EACH_FEW_ROWS(INSTANCE, TYPE, SUFFIX, 2, 2)                             \
    EACH_FEW_ROWS(INSTANCE, TYPE, SUFFIX, 3, 2) EACH_FEW_ROWS(INSTANCE, TYPE, SUFFIX, 4, 2)                             \
    typedef void (*NAME(product_fn##SUFFIX))(PRODUCT_ARGS(TYPE));                                                       \
    static const NAME(product_fn##SUFFIX) NAME(products##SUFFIX)[2][COLUMNS][ROWS] = {                                  \
        {ENTRIES(SUFFIX, 1), ENTRIES(SUFFIX, 2), ENTRIES(SUFFIX, 3), ENTRIES(SUFFIX, 4)},                               \
        {FEW_ENTRIES(SUFFIX, 1), FEW_ENTRIES(SUFFIX, 2), FEW_ENTRIES(SUFFIX, 3), FEW_ENTRIES(SUFFIX, 4)}};

PRODUCTS(REAL, NAME(weights), )
#if IS_FLOAT
PRODUCTS(UINT, NAME(weights_bf16), _bf16)
#endif

/* ---- one pass: every block of units x every tile of rows ------------------------------------------------------------ */

typedef void (*NAME(finish))(const fl_step *s, ptrdiff_t row, int rows, ptrdiff_t unit, int columns, REAL *pre);

/* Shape of a pass. gated: one column per gate and LANES units per block, else up to four vectors of units per block.
 * x reaches the columns [0, x_columns), the second operand [h_first, h_first + h_columns). */
typedef struct { int gated, columns, x_columns, h_first, h_columns; } NAME(shape);

/* Sums before the product that do not lie side by side: the gates' content, the bias, or zero. */
INLINE void NAME(begin)(const fl_step *s, int gated, ptrdiff_t unit, ptrdiff_t row, int rows, int columns,
                        const REAL *init, REAL *pre)
{
    for (int c = 0; c < columns; c++) {
        ptrdiff_t u = gated ? unit : unit + c * LANES;
        int lanes = s->H - u < LANES ? (int) (s->H - u) : LANES;
        const REAL *gates = (const REAL *) s->gates + row * s->ldgates + (gated ? c * s->H + u : u);
        for (int r = 0; r < rows; r++)
            NAME(store)(PRE(r, c), s->preloaded ? NAME(load_part)(gates + r * s->ldgates, lanes) : ((const VEC *) init)[c]);
    }
}

static const REAL NAME(zeros)[COLUMNS * LANES] __attribute__((aligned(64)));

#define PASS_BODY(TYPE, SUFFIX)                                                                                         \
    INLINE void NAME(pass##SUFFIX)(const fl_step *s, const NAME(shape) shape, NAME(finish) finish)                      \
    {                                                                                                                   \
        REAL pre[2 * ROWS * COLUMNS * LANES] __attribute__((aligned(64)));                                              \
        const ptrdiff_t tiles = (s->n + ROWS - 1) / ROWS, units = shape.gated ? LANES : COLUMNS * LANES;                \
        const ptrdiff_t offset = DEPTH##SUFFIX(s->D) * shape.x_columns * LANES;                                         \
        const ptrdiff_t stride = offset + DEPTH##SUFFIX(s->K) * shape.h_columns * LANES;                                \
        const ptrdiff_t D = s->x ? s->D : 0, K = s->h_in ? s->K : 0;                                                    \
        const ptrdiff_t bias = (shape.gated ? shape.columns : COLUMNS) * LANES; /* elements of a block's bias */        \
        const ptrdiff_t read = (DEPTH##SUFFIX(D) * shape.x_columns + DEPTH##SUFFIX(K) * shape.h_columns) * LANES *      \
                               (ptrdiff_t) sizeof(TYPE); /* bytes of a panel that a tile reads */                       \
        int panels;                                                                                                     \
        for (ptrdiff_t block = s->begin; block < s->end; block += panels) {                                             \
            const ptrdiff_t unit = block * units;                                                                       \
            const ptrdiff_t left = (s->H - unit + LANES - 1) / LANES;                                                   \
            const int columns = shape.gated ? shape.columns : left < COLUMNS ? (int) left : COLUMNS;                    \
            const int x_columns = shape.gated ? shape.x_columns : columns;                                              \
            const int h_columns = shape.gated ? shape.h_columns : columns;                                              \
            const TYPE *wx = (const TYPE *) s->panels + block * stride, *wh = wx + offset;                              \
            panels = block + 1 < s->end && (shape.gated || left >= 2 * COLUMNS) && s->n <= FEW ? 2 : 1;                 \
            for (ptrdiff_t tile = 0; tile < tiles; tile++) {                                                            \
                const ptrdiff_t row = tile * s->n / tiles;                                                              \
                const int rows = (int) ((tile + 1) * s->n / tiles - row);                                               \
                const REAL *x = (const REAL *) s->x + row * s->ldx, *h = (const REAL *) s->h_in + row * s->ldh_in;      \
                const REAL *init = s->bias ? (const REAL *) s->bias + block * bias : NAME(zeros);                       \
                ptrdiff_t init_panel = s->bias ? bias : 0, init_row = 0;                                                \
                const int together = x_columns == h_columns && !shape.h_first;                                          \
                if (s->preloaded || !together) {                                                                        \
                    for (int p = 0; p < panels; p++)                                                                    \
                        NAME(begin)(s, shape.gated, unit + p * units, row, rows, columns, init + p * init_panel,        \
                                    pre + p * ROWS * COLUMNS * LANES);                                                  \
                    init = pre, init_panel = ROWS * COLUMNS * LANES, init_row = COLUMNS * LANES;                        \
                }                                                                                                       \
                /* Each tile prefetches its share of the next panel; a single tile streams, which the hardware sees. */ \
                const int more = tiles > 1 && D + K && block + 1 < s->end;                                           \
                const ptrdiff_t step = more ? read / tiles / (D + K) : 0;                                               \
                const char *ahead = (const char *) (D ? wx : wh) + (more ? stride * sizeof(TYPE) + tile * (D + K) * step : 0);\
                const NAME(product_fn##SUFFIX) *const products = NAME(products##SUFFIX)[panels - 1][0];                 \
                if (together) {                                                                                         \
                    products[(x_columns - 1) * ROWS + rows - 1](pre, init, init_panel, init_row, wx, wh, stride, ahead, \
                                                                step, x, s->ldx, D, h, s->ldh_in, K);                   \
                } else {                                                                                                \
                    if (D)                                                                                              \
                        products[(x_columns - 1) * ROWS + rows - 1](pre, init, init_panel, init_row, wx, wh, stride,    \
                                                                    ahead, step, x, s->ldx, D, h, s->ldh_in, 0);        \
                    if (K)                                                                                              \
                        products[(h_columns - 1) * ROWS + rows - 1](                                                    \
                            pre + shape.h_first * LANES, init + shape.h_first * LANES, init_panel, init_row, wx, wh,    \
                            stride, ahead + D * step, step, x, s->ldx, 0, h, s->ldh_in, K);                             \
                }                                                                                                       \
                for (int p = 0; p < panels; p++)                                                                        \
                    finish(s, row, rows, unit + p * units, columns, pre + p * ROWS * COLUMNS * LANES);                  \
            }                                                                                                           \
        }                                                                                                               \
    }

PASS_BODY(REAL, )
#if IS_FLOAT
PASS_BODY(UINT, _bf16)
#endif

/* ---- the cells ------------------------------------------------------------------------------------------------------ */

/* FINISH(name) { ... } is the update of a cell. It is compiled for whole vectors with the default activations, where no
 * choice is left inside the loops, and for everything else. */
#define FINISH_ARGS const fl_step *s, ptrdiff_t row, int rows, ptrdiff_t unit, int columns, REAL *pre
#define FINISH(name, gated)                                                                                             \
    INLINE void NAME(name##_body)(FINISH_ARGS, const int whole, const int activation, const int recurrent_activation); \
    static NOINLINE TARGET void NAME(name)(FINISH_ARGS)                                                                 \
    {                                                                                                                   \
        const int whole = unit + (gated ? 1 : columns) * LANES <= s->H;                                                 \
        if (whole && s->activation == FL_TANH && s->recurrent_activation == FL_SIGMOID)                                 \
            NAME(name##_body)(s, row, rows, unit, columns, pre, 1, FL_TANH, FL_SIGMOID);                                \
        else                                                                                                            \
            NAME(name##_body)(s, row, rows, unit, columns, pre, 0, s->activation, s->recurrent_activation);             \
    }                                                                                                                   \
    INLINE void NAME(name##_body)(FINISH_ARGS, const int whole, const int activation, const int recurrent_activation)
/* Element (row, unit) of one of the step's arrays, and vectors of it. */
#define AT(array) ((REAL *) s->array + i * s->ld##array + u)
#define GATE(column) ((REAL *) s->gates + i * s->ldgates + (column) * s->H + u)
#define LOAD(p) NAME(load_part)(p, lanes)
#define STORE(p, v) NAME(store_part)(p, v, lanes)
#define ACT(x) NAME(activate)(activation, x)
#define RECURRENT_ACT(x) NAME(activate)(recurrent_activation, x)
#define SLOPE(y) NAME(slope)(activation, y)
#define RECURRENT_SLOPE(y) NAME(slope)(recurrent_activation, y)
#define LANES_AT(u) (whole || s->H - (u) >= LANES ? LANES : (int) (s->H - (u)))
/* Blocks with one column per gate are one vector of units wide; the others go row by row, vector by vector. */
#define ONE_VECTOR                                                                                                      \
    (void) columns, (void) activation, (void) recurrent_activation;                                                     \
    const ptrdiff_t u = unit;                                                                                           \
    const int lanes = LANES_AT(u)
#define EACH_ROW for (ptrdiff_t i = row; i < row + rows; i++)
#define EACH_VECTOR                                                                                                     \
    (void) activation, (void) recurrent_activation;                                                                     \
    EACH_ROW                                                                                                            \
        for (ptrdiff_t c = 0, u = unit; c < columns; c++, u += LANES)                                                   \
            for (int lanes = LANES_AT(u), once = 1; once; once = 0)
#define SUM(column) NAME(load)(PRE(i - row, column))
#define PUT(column, v) NAME(store)(PRE(i - row, column), v)
/* The next step's gates lie where no hardware prefetch looks: two thirds of a backward update were spent waiting. */
#define PREFETCH_GATES(columns)                                                                                         \
    for (int column = 0; column < (columns); column++)                                                                  \
    __builtin_prefetch(GATE(column) + s->ahead, 0, 2)

/* h = keep_h h_prev + (1 - keep_h) h~ (zoneout, where asked);  h_masked = h * mask */
INLINE void NAME(store_h)(const fl_step *s, ptrdiff_t i, ptrdiff_t u, int lanes, VEC h)
{
    if (s->keep_h) {
        VEC keep = LOAD(AT(keep_h));
        h = keep * LOAD(AT(h_prev)) + (SPLAT(1) - keep) * h;
    }
    STORE(AT(h), h);
    if (s->h_masked)
        STORE(AT(h_masked), h * LOAD(AT(mask)));
}

/* dh = product * mask + dh_in + dy;  of it keep_h dh goes past the cell to h_{t-1} (returned in *past). */
INLINE VEC NAME(gather_dh)(const fl_step *s, ptrdiff_t i, ptrdiff_t u, int lanes, VEC product, VEC *past)
{
    VEC dh = product;
    *past = SPLAT(0);
    if (s->mask)
        dh *= LOAD(AT(mask));
    if (s->dh_in) /* without a product as it is, lest -0 become 0 */
        dh = s->h_in ? dh + LOAD(AT(dh_in)) : LOAD(AT(dh_in));
    if (s->dy)
        dh += LOAD(AT(dy));
    if (s->keep_h) {
        VEC keep = LOAD(AT(keep_h));
        *past = keep * dh;
        dh = (SPLAT(1) - keep) * dh;
    }
    return dh;
}

/* gates = sums */
FINISH(store_gated, 1)
{
    ONE_VECTOR;
    EACH_ROW for (int c = 0; c < columns; c++) STORE(GATE(c), SUM(c));
}

FINISH(store_vectors, 0)
{
    EACH_VECTOR STORE(GATE(0), SUM(c));
}

/* LSTM (Hochreiter and Schmidhuber 1997; Gers 2000):
 *   i, f, o = sigma(W x + R h + b)   g = act(...)   c~ = f c_prev + i g   h~ = o act(c~)
 * zoneout: c = keep_c c_prev + (1 - keep_c) c~ */
FINISH(lstm_forward, 1)
{
    ONE_VECTOR;
    EACH_ROW { /* a loop of its own: what waits for c would keep the next row's gates out of the processor's window */
        PUT(0, RECURRENT_ACT(SUM(0)));
        PUT(1, RECURRENT_ACT(SUM(1)));
        PUT(2, ACT(SUM(2)));
        PUT(3, RECURRENT_ACT(SUM(3)));
    }
    EACH_ROW {
        VEC in = SUM(0), forget = SUM(1), g = SUM(2), out = SUM(3);
        VEC c_prev = LOAD(AT(c_prev));
        VEC c = forget * c_prev + in * g;
        VEC h = out * ACT(c);
        if (s->keep_c) {
            VEC keep = LOAD(AT(keep_c));
            c = keep * c_prev + (SPLAT(1) - keep) * c;
        }
        STORE(AT(c), c);
        if (s->tape) {
            PREFETCH_GATES(4);
            STORE(GATE(0), in);
            STORE(GATE(1), forget);
            STORE(GATE(2), g);
            STORE(GATE(3), out);
        }
        NAME(store_h)(s, i, u, lanes, h);
    }
}

/* do = dh act(c~) sigma'   dc~ = (1 - keep_c) dc + dh o act'(c~)   di = dc~ g sigma'   df = dc~ c_prev sigma'
 * dg = dc~ i act'          dc_prev = f dc~ + keep_c dc              with c~ computed again from the gates */
FINISH(lstm_backward, 0)
{
    EACH_VECTOR {
        VEC past, dh = NAME(gather_dh)(s, i, u, lanes, SUM(c), &past);
        VEC in = LOAD(GATE(0)), forget = LOAD(GATE(1)), g = LOAD(GATE(2)), out = LOAD(GATE(3));
        VEC c_prev = LOAD(AT(c_prev)), dc = LOAD(AT(dc)), kept = SPLAT(0);
        PREFETCH_GATES(4);
        VEC tc = ACT(forget * c_prev + in * g);
        if (s->keep_c) {
            VEC keep = LOAD(AT(keep_c));
            kept = keep * dc;
            dc = (SPLAT(1) - keep) * dc;
        }
        dc += dh * out * SLOPE(tc);
        STORE(GATE(0), dc * g * RECURRENT_SLOPE(in));
        STORE(GATE(1), dc * c_prev * RECURRENT_SLOPE(forget));
        STORE(GATE(2), dc * in * SLOPE(g));
        STORE(GATE(3), dh * tc * RECURRENT_SLOPE(out));
        STORE(AT(dc), dc * forget + kept);
        if (s->dh_out)
            STORE(AT(dh_out), past);
    }
}

/* GRU (Cho 2014, with the reset gate after the product as in cuDNN):
 *   r, z = sigma(W x + R h + b)   q = R_n h + b_hn   n = act(W_n x + b_in + r q)   h~ = (1 - z) n + z h_prev */
FINISH(gru_forward, 1)
{
    ONE_VECTOR;
    EACH_ROW {
        PUT(1, RECURRENT_ACT(SUM(1)));
        PUT(2, RECURRENT_ACT(SUM(2)));
    }
    EACH_ROW {
        VEC r = SUM(1), z = SUM(2), q = SUM(3);
        VEC n = ACT(r * q + SUM(0));
        VEC h = (SPLAT(1) - z) * n + z * LOAD(AT(h_prev));
        if (s->tape) {
            PREFETCH_GATES(4);
            STORE(GATE(0), n);
            STORE(GATE(1), r);
            STORE(GATE(2), z);
            STORE(GATE(3), q);
        }
        NAME(store_h)(s, i, u, lanes, h);
    }
}

/* dn = dh (1 - z) act'   dz = dh (h_prev - n) sigma'   dr = dn q sigma'   dq = dn r   dh_prev gets z dh past the product */
FINISH(gru_backward, 0)
{
    EACH_VECTOR {
        VEC past, dh = NAME(gather_dh)(s, i, u, lanes, SUM(c), &past);
        VEC n = LOAD(GATE(0)), r = LOAD(GATE(1)), z = LOAD(GATE(2)), q = LOAD(GATE(3));
        PREFETCH_GATES(4);
        VEC dn = dh * (SPLAT(1) - z) * SLOPE(n);
        STORE(GATE(0), dn);
        STORE(GATE(1), dn * q * RECURRENT_SLOPE(r));
        STORE(GATE(2), dh * (LOAD(AT(h_prev)) - n) * RECURRENT_SLOPE(z));
        STORE(GATE(3), dn * r);
        STORE(AT(dh_out), z * dh + past);
    }
}

/* GRU as first published, the reset gate before the product, first pass:
 *   r, z = sigma(W x + R h + b)   rh = r h_in   the sums of n so far stay in the gates */
FINISH(gru_reset_before_forward_1, 1)
{
    ONE_VECTOR;
    EACH_ROW {
        VEC r = RECURRENT_ACT(SUM(1));
        STORE(GATE(0), SUM(0));
        STORE(GATE(1), r);
        STORE(GATE(2), RECURRENT_ACT(SUM(2)));
        STORE(GATE(3), r * LOAD(AT(h_in)));
    }
}

/* second pass: n = act(sums + R_n rh)   h~ = (1 - z) n + z h_prev */
FINISH(gru_reset_before_forward_2, 0)
{
    EACH_VECTOR {
        VEC n = ACT(SUM(c)), z = LOAD(GATE(2));
        STORE(GATE(0), n);
        NAME(store_h)(s, i, u, lanes, (SPLAT(1) - z) * n + z * LOAD(AT(h_prev)));
    }
}

/* dn = dh (1 - z) act'   dz = dh (h_prev - n) sigma'   dh_prev gets z dh past the products */
FINISH(gru_reset_before_backward_1, 0)
{
    EACH_VECTOR {
        VEC past, dh = NAME(gather_dh)(s, i, u, lanes, SUM(c), &past);
        VEC n = LOAD(GATE(0)), z = LOAD(GATE(2));
        PREFETCH_GATES(4);
        STORE(GATE(0), dh * (SPLAT(1) - z) * SLOPE(n));
        STORE(GATE(2), dh * (LOAD(AT(h_prev)) - n) * RECURRENT_SLOPE(z));
        STORE(AT(dh_out), z * dh + past);
    }
}

/* second pass, product drh = R_n' dn, c_prev stands for h_in: dr = drh h_in sigma'   dh_prev += mask r drh */
FINISH(gru_reset_before_backward_2, 0)
{
    EACH_VECTOR {
        VEC drh = SUM(c), r = LOAD(GATE(1)), dh = r * drh;
        STORE(GATE(1), drh * LOAD(AT(c_prev)) * RECURRENT_SLOPE(r));
        if (s->mask)
            dh *= LOAD(AT(mask));
        STORE(AT(dh_out), LOAD(AT(dh_out)) + dh);
    }
}

/* RNN (Elman 1990): a = h~ = act(W x + R h + b) */
FINISH(rnn_forward, 0)
{
    EACH_VECTOR {
        VEC a = ACT(SUM(c));
        if (s->tape)
            STORE(GATE(0), a);
        NAME(store_h)(s, i, u, lanes, a);
    }
}

FINISH(rnn_backward, 0)
{
    EACH_VECTOR {
        VEC past, dh = NAME(gather_dh)(s, i, u, lanes, SUM(c), &past);
        STORE(GATE(0), dh * SLOPE(LOAD(GATE(0))));
        if (s->dh_out)
            STORE(AT(dh_out), past);
    }
}

/* Projection (Sak 2014): h~ = W_hr m */
FINISH(linear_forward, 0)
{
    EACH_VECTOR NAME(store_h)(s, i, u, lanes, SUM(c));
}

/* h = dh gathered: dh_0, dx, and the gradient of the projection's output. */
FINISH(linear_backward, 0)
{
    EACH_VECTOR {
        VEC past, dh = NAME(gather_dh)(s, i, u, lanes, SUM(c), &past);
        STORE(AT(h), dh);
        if (s->dh_out)
            STORE(AT(dh_out), past);
    }
}

#define GATED4 ((NAME(shape)) {1, 4, 4, 0, 4})
#define GATED_GRU ((NAME(shape)) {1, 4, 3, 1, 3})
#define GATED_GRU_BEFORE ((NAME(shape)) {1, 3, 3, 1, 2})
#define VECTORS ((NAME(shape)) {0, 4, 4, 0, 4})
#define PASS(SUFFIX, name, shape, finish)                                                                               \
    static TARGET void NAME(pass_##name##SUFFIX)(const fl_step *s) { NAME(pass##SUFFIX)(s, shape, NAME(finish)); }
#define FORWARD_PASSES(SUFFIX)                                                                                          \
    PASS(SUFFIX, lstm_forward, GATED4, lstm_forward)                                                                    \
    PASS(SUFFIX, gru_forward, GATED_GRU, gru_forward)                                                                   \
    PASS(SUFFIX, gru_reset_before_forward_1, GATED_GRU_BEFORE, gru_reset_before_forward_1)                              \
    PASS(SUFFIX, gru_reset_before_forward_2, VECTORS, gru_reset_before_forward_2)                               \
    PASS(SUFFIX, rnn_forward, VECTORS, rnn_forward)                                                                     \
    PASS(SUFFIX, linear_forward, VECTORS, linear_forward)
#define FORWARD_TABLE(SUFFIX)                                                                                           \
    {{NAME(pass_lstm_forward##SUFFIX), 0},                                                                              \
     {NAME(pass_gru_forward##SUFFIX), 0},                                                                               \
     {NAME(pass_gru_reset_before_forward_1##SUFFIX), NAME(pass_gru_reset_before_forward_2##SUFFIX)},            \
     {NAME(pass_rnn_forward##SUFFIX), 0},                                                                               \
     {NAME(pass_linear_forward##SUFFIX), 0}}

FORWARD_PASSES()
#if IS_FLOAT
FORWARD_PASSES(_bf16)
#endif
PASS(, lstm_input, GATED4, store_gated)
PASS(, gru_input, GATED_GRU, store_gated)
PASS(, gru_reset_before_input, GATED_GRU_BEFORE, store_gated)
PASS(, rnn_input, VECTORS, store_vectors)
PASS(, lstm_backward, VECTORS, lstm_backward)
PASS(, gru_backward, VECTORS, gru_backward)
PASS(, gru_reset_before_backward_1, VECTORS, gru_reset_before_backward_1)
PASS(, gru_reset_before_backward_2, VECTORS, gru_reset_before_backward_2)
PASS(, rnn_backward, VECTORS, rnn_backward)
PASS(, linear_backward, VECTORS, linear_backward)

/* Interleaving the lower, the upper halves of two vectors. */
#if VECTOR_BYTES / (IS_FLOAT ? 4 : 8) == 2
#define LOWER 0, 2
#define UPPER 1, 3
#elif VECTOR_BYTES / (IS_FLOAT ? 4 : 8) == 4
#define LOWER 0, 4, 1, 5
#define UPPER 2, 6, 3, 7
#elif VECTOR_BYTES / (IS_FLOAT ? 4 : 8) == 8
#define LOWER 0, 8, 1, 9, 2, 10, 3, 11
#define UPPER 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOWER 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define UPPER 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#endif
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (UVEC) {__VA_ARGS__})
#endif

/* ---- packing -------------------------------------------------------------------------------------------------------- */

/* LANES x LANES elements: log2(LANES) rounds of interleaving row i with row i + LANES/2. */
INLINE void NAME(transpose)(VEC *v)
{
    VEC w[LANES];
    for (int round = 1; round < LANES; round *= 2) {
        UNROLL for (int i = 0; i < LANES; i++) w[i] = v[i];
        UNROLL for (int i = 0; i < LANES / 2; i++)
        {
            v[2 * i] = SHUFFLE(w[i], w[i + LANES / 2], LOWER);
            v[2 * i + 1] = SHUFFLE(w[i], w[i + LANES / 2], UPPER);
        }
    }
}

/* Blocks [begin, end) of panels [block][k][column][lanes], zero beyond `units`. Element (unit, k) of column c is
 * weight[c][unit * unit_stride + k * k_stride], one of the strides being 1; without gates the columns are vectors of units
 * of weight[0], and the last block has only the columns that hold units. */
static TARGET void NAME(pack)(void *panels, const void *const weight[4], ptrdiff_t unit_stride, ptrdiff_t k_stride,
                              ptrdiff_t units, ptrdiff_t K, int columns, int gated, ptrdiff_t block_stride,
                              ptrdiff_t begin, ptrdiff_t end)
{
    for (ptrdiff_t block = begin; block < end; block++) {
        ptrdiff_t first = block * LANES * (gated ? 1 : COLUMNS), left = (units - first + LANES - 1) / LANES;
        int width = gated ? columns : left < COLUMNS ? (int) left : COLUMNS;
        for (int c = 0; c < width; c++) {
            ptrdiff_t unit = gated ? first : first + c * LANES, k = 0;
            int lanes = units - unit < LANES ? (int) (units - unit) : LANES;
            const REAL *from = (const REAL *) weight[gated ? c : 0] + unit * unit_stride;
            REAL *to = (REAL *) panels + block * block_stride + c * LANES;
            for (; k_stride == 1 && lanes == LANES && k + LANES <= K; k += LANES) {
                VEC v[LANES];
                for (int l = 0; l < LANES; l++)
                    v[l] = NAME(load)(from + l * unit_stride + k);
                NAME(transpose)(v);
                for (int l = 0; l < LANES; l++)
                    NAME(store)(to + (k + l) * width * LANES, v[l]);
            }
            for (; k < K; k++) {
                REAL *out = to + k * width * LANES;
                if (unit_stride == 1)
                    NAME(store)(out, NAME(load_part)(from + k * k_stride, lanes));
                else
                    for (int l = 0; l < LANES; l++)
                        out[l] = l < lanes ? from[l * unit_stride + k * k_stride] : 0;
            }
        }
    }
}

/* What the products start from, [block][column][lanes]: first[c] + second[c], either of which may be NULL. */
static TARGET void NAME(pack_bias)(void *out, const void *const first[4], const void *const second[4], ptrdiff_t units,
                                   int columns, ptrdiff_t blocks)
{
    for (ptrdiff_t block = 0; block < blocks; block++)
        for (int c = 0; c < columns; c++)
            for (int l = 0; l < LANES; l++) {
                ptrdiff_t u = block * LANES + l;
                REAL a = first[c] && u < units ? ((const REAL *) first[c])[u] : 0;
                REAL b = second[c] && u < units ? ((const REAL *) second[c])[u] : 0;
                ((REAL *) out)[(block * columns + c) * LANES + l] = a + b;
            }
}

#if IS_FLOAT
/* A panel [K][width] of floats as words of two bfloat16, [(K + 1) / 2][width]: nearest even; a NaN stays a NaN. */
static TARGET void NAME(to_bf16)(void *out, const void *panel, ptrdiff_t K, ptrdiff_t width)
{
    for (ptrdiff_t k = 0; k < K; k++)
        for (ptrdiff_t i = 0; i < width; i++) {
            uint32_t b = ((const uint32_t *) panel)[k * width + i], *word = (uint32_t *) out + k / 2 * width + i;
            b = (b & 0x7fffffffu) > 0x7f800000u ? b | 0x400000u : b + 0x7fffu + (b >> 16 & 1u);
            *word = k % 2 ? *word | (b & 0xffff0000u) : b >> 16;
        }
}
#endif

/* ---- products over all rows: out[j][k] += sum_r g[r][j] a[r][k] ------------------------------------------------------ */

#define STRIP (ROWS == 6 ? 8 : 4) /* rows of the outer tile, from g */
#define OUTER_COLUMNS 3           /* its vectors, from a */

/* Cuts src [n][columns] into slices of `width` columns: slice s at s * slice_stride, [n][width], zero beyond `columns`.
 * A negative ld walks the rows backward. sum, sum2 [columns] += the columns' sums, where asked. */
static TARGET void NAME(slices)(void *out, ptrdiff_t slice_stride, ptrdiff_t width, ptrdiff_t n, const void *src,
                                ptrdiff_t ld, ptrdiff_t columns, void *sum, void *sum2)
{
    REAL *const sums[2] = {sum, sum2};
    for (ptrdiff_t r = 0; r < n; r++) {
        const REAL *from = (const REAL *) src + r * ld;
        REAL *to = (REAL *) out + r * width;
        ptrdiff_t j = 0;
        if (width == STRIP) {
            for (; j + STRIP <= columns; j += STRIP, to += slice_stride) {
                __builtin_prefetch(from + j + 8 * ld); /* short pieces of rows, backward: no hardware prefetch */
                memcpy(to, from + j, STRIP * sizeof(REAL));
            }
        } else {
            for (; j + width <= columns; j += width, to += slice_stride)
                for (ptrdiff_t l = 0; l < width; l += LANES)
                    NAME(store)(to + l, NAME(load)(from + j + l));
        }
        if (j < columns)
            for (ptrdiff_t l = 0; l < width; l++)
                to[l] = j + l < columns ? from[j + l] : 0;
        for (int s = 0; s < 2; s++) {
            REAL *total = sums[s];
            if (!total)
                continue;
            for (j = 0; j + LANES <= columns; j += LANES)
                NAME(store)(total + j, NAME(load)(total + j) + NAME(load)(from + j));
            for (; j < columns; j++)
                total[j] += from[j];
        }
    }
}

INLINE void NAME(outer_tile)(const int vectors, REAL *out, ptrdiff_t ldo, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t n,
                             const REAL *strip, const REAL *panel)
{
    VEC acc[STRIP][OUTER_COLUMNS];
    UNROLL for (int j = 0; j < STRIP; j++) UNROLL for (int v = 0; v < vectors; v++)
    {
        ptrdiff_t lanes = columns - v * LANES;
        acc[j][v] = j < rows ? NAME(load_part)(out + j * ldo + v * LANES, lanes < LANES ? (int) lanes : LANES) : SPLAT(0);
        __builtin_prefetch(out + (STRIP + j) * ldo + v * LANES, 1, 2); /* the next strip's */
    }
    for (ptrdiff_t r = 0; r < n; r++) {
        VEC a[OUTER_COLUMNS];
        UNROLL for (int v = 0; v < vectors; v++) a[v] = ((const VEC *) panel)[r * OUTER_COLUMNS + v];
        UNROLL for (int j = 0; j < STRIP; j++)
        {
            REAL value = strip[r * STRIP + j];
            UNROLL for (int v = 0; v < vectors; v++) acc[j][v] += a[v] * value;
        }
    }
    UNROLL for (int j = 0; j < STRIP; j++) UNROLL for (int v = 0; v < vectors; v++)
    {
        ptrdiff_t lanes = columns - v * LANES;
        if (j < rows)
            NAME(store_part)(out + j * ldo + v * LANES, acc[j][v], lanes < LANES ? (int) lanes : LANES);
    }
}

/* One tile: out [rows][columns] += strip' panel over n rows; rows <= STRIP, columns <= 3 vectors; the panel is
 * [n][3 vectors]. */
static TARGET void NAME(outer)(void *out, ptrdiff_t ldo, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t n, const void *strip,
                               const void *panel)
{
    if (columns > 2 * LANES)
        NAME(outer_tile)(3, out, ldo, rows, columns, n, strip, panel);
    else if (columns > LANES)
        NAME(outer_tile)(2, out, ldo, rows, columns, n, strip, panel);
    else
        NAME(outer_tile)(1, out, ldo, rows, columns, n, strip, panel);
}

/* ---- for tests and benchmarks ---------------------------------------------------------------------------------------- */

/* out = activation(in), `size` elements. */
static TARGET void NAME(map)(int activation, const void *in, void *out, ptrdiff_t size)
{
    for (ptrdiff_t i = 0; i < size; i += LANES) {
        int lanes = size - i < LANES ? (int) (size - i) : LANES;
        NAME(store_part)((REAL *) out + i, NAME(activate)(activation, NAME(load_part)((const REAL *) in + i, lanes)), lanes);
    }
}

/* `rounds` times ROWS x 4 independent multiply-adds of vectors in registers. */
static TARGET double NAME(peak)(ptrdiff_t rounds, void *scratch)
{
    VEC acc[ROWS * COLUMNS], a = NAME(load)(scratch), b = NAME(load)((REAL *) scratch + LANES), sum = {0};
    UNROLL for (int i = 0; i < ROWS * COLUMNS; i++) acc[i] = SPLAT(i);
    for (ptrdiff_t k = 0; k < rounds; k++)
        UNROLL for (int i = 0; i < ROWS * COLUMNS; i++) acc[i] = acc[i] * a + b;
    UNROLL for (int i = 0; i < ROWS * COLUMNS; i++) sum += acc[i];
    return sum[0];
}

/* Reads `size` elements once. */
static TARGET double NAME(read)(const void *data, ptrdiff_t size)
{
    const REAL *p = data;
    VEC sum[8] = {{0}};
    for (ptrdiff_t i = 0; i + 8 * LANES <= size; i += 8 * LANES)
        UNROLL for (int j = 0; j < 8; j++) sum[j] += NAME(load)(p + i + j * LANES);
    for (int j = 1; j < 8; j++)
        sum[0] += sum[j];
    return sum[0][0];
}

static const fl_kernels NAME(kernels) = {
    .isa = ISA_NAME,
    .lanes = LANES,
    .rows = ROWS,
    .strip = STRIP,
    .panel = OUTER_COLUMNS * LANES,
    .input = {NAME(pass_lstm_input), NAME(pass_gru_input), NAME(pass_gru_reset_before_input), NAME(pass_rnn_input), 0},
    .forward = FORWARD_TABLE(),
#if IS_FLOAT
    .forward_bf16 = FORWARD_TABLE(_bf16),
    .to_bf16 = NAME(to_bf16),
#endif
    .backward = {{NAME(pass_lstm_backward), 0},
                 {NAME(pass_gru_backward), 0},
                 {NAME(pass_gru_reset_before_backward_1), NAME(pass_gru_reset_before_backward_2)},
                 {NAME(pass_rnn_backward), 0},
                 {NAME(pass_linear_backward), 0}},
    .pack = NAME(pack),
    .pack_bias = NAME(pack_bias),
    .slices = NAME(slices),
    .outer = NAME(outer),
    .map = NAME(map),
    .peak = NAME(peak),
    .read = NAME(read),
};

#undef LOWER
#undef UPPER
#undef EACH_ROWS
#undef EACH_FEW_ROWS
#undef ENTRIES
#undef FEW_ENTRIES
