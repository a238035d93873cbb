/* The words in which the pages in cells/ are written, for one (type, ISA).
 *
 * UPDATE(name) { ... } is what a cell does with the sums of a tile. It is compiled for the default activations, where no
 * choice is left inside the loops, with whole vectors and with a part of one, and for all others. The sums come in memory,
 * so that one function serves all heights of the tile and all kinds of weights, and they share its bits. */

#define UPDATE_ARGS const fl_step *s, ptrdiff_t row, int rows, ptrdiff_t unit, int columns
#define UPDATE(name)                                                                                                    \
    INLINE void NAME(name##_body)(UPDATE_ARGS, REAL *pre, const int whole, const fl_choices *const o);                  \
    static NOINLINE TARGET void NAME(name)(UPDATE_ARGS, void *pre)                                                      \
    {                                                                                                                   \
        const int whole = unit + (s->columns > 1 ? 1 : columns) * LANES <= s->H;                                        \
        if (s->choices)                                                                                                 \
            NAME(name##_body)(s, row, rows, unit, columns, pre, 0, s->choices);                                         \
        else if (whole)                                                                                                 \
            NAME(name##_body)(s, row, rows, unit, columns, pre, 1, &defaults);                                          \
        else                                                                                                            \
            NAME(name##_body)(s, row, rows, unit, columns, pre, 0, &defaults);                                          \
    }                                                                                                                   \
    INLINE void NAME(name##_body)(UPDATE_ARGS, REAL *pre, const int whole, const fl_choices *const o)

/* Loops. Blocks with a column per gate are one vector of units wide; the others go row by row, vector by vector. */
#define LANES_AT(u) (whole || s->H - (u) >= LANES ? LANES : (int) (s->H - (u)))
#define ONE_VECTOR                                                                                                      \
    (void) columns, (void) o;                                                                                           \
    const ptrdiff_t u = unit;                                                                                           \
    const int lanes = LANES_AT(u)
#define EACH_ROW for (ptrdiff_t i = row; i < row + rows; i++)
#define EACH_VECTOR                                                                                                     \
    (void) o;                                                                                                           \
    EACH_ROW                                                                                                            \
        for (ptrdiff_t c = 0, u = unit; c < columns; c++, u += LANES)                                                   \
            for (int lanes = LANES_AT(u), once = 1; once; once = 0)

/* Element (row i, unit u) of one of the step's arrays, of a column of the gates, of a state beside h, of a parameter
 * vector; vectors of them; the tile's sums. */
#define AT(array) ((REAL *) s->array + i * s->ld##array + u)
#define GATE(column) ((REAL *) s->gates + i * s->ldgates + (column) * s->H + u)
#define STATE(array, k) (AT(array) + (k) * s->H)
#define PARAMETER(k) NAME(load_part)((const REAL *) s->vectors + (k) * s->H + u, lanes)
#define LOAD(p) NAME(load_part)(p, lanes)
#define STORE(p, v) NAME(store_part)(p, v, lanes)
#define SUM(column) NAME(load)(PRE(i - row, column))
#define PUT(column, v) NAME(store)(PRE(i - row, column), v)

/* Activations of the candidate, of the cell on its way out, of a gate, and their slopes. */
#define ACT(x) NAME(activate)(&o->act, x)
#define OUT_ACT(x) NAME(activate)(&o->out, x)
#define GATE_ACT(x) NAME(activate)(&o->gate, x)
#define SLOPE(y) NAME(slope)(&o->act, y)
#define OUT_SLOPE(y) NAME(slope)(&o->out, y)
#define GATE_SLOPE(y) NAME(slope)(&o->gate, y)

/* min(max(v, -limit), limit) for one of the choices; a gradient, 0 where v was cut; a NaN stays. */
#define LIMIT(v, choice) NAME(limit)(v, o->choice)
#define WITHIN(v, choice, gradient) NAME(within)(v, o->choice, gradient)
INLINE VEC NAME(within)(VEC v, double limit, VEC gradient)
{
    if (limit < NO_LIMIT)
        return SELECT((UVEC) (v >= SPLAT(limit)) | (UVEC) (v <= SPLAT(-limit)), SPLAT(0), gradient);
    return gradient;
}

/* The next step's gates lie where no hardware prefetch looks: two thirds of a backward update were spent waiting. */
#define PREFETCH_GATES(columns)                                                                                         \
    for (int column = 0; column < (columns); column++)                                                                  \
    __builtin_prefetch(GATE(column) + s->ahead, 0, 2)

/* h = keep_h h_prev + (1 - keep_h) h~ (zoneout, where asked);  h_masked = h * mask
 * Reads keep_h, h_prev, mask; writes h, h_masked. */
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

/* dh = product * mask + dh_in + dy;  of it keep_h dh goes past the cell to h_{t-1} (returned in *past).
 * Reads mask, dh_in, dy, keep_h. */
INLINE VEC NAME(gather_dh)(const fl_step *s, ptrdiff_t i, ptrdiff_t u, int lanes, VEC product, VEC *past)
{
    VEC dh = product;
    *past = SPLAT(0);
    if (s->mask)
        dh *= LOAD(AT(mask));
    if (s->dh_in) /* without a product as it is, lest -0 become 0 */
        dh = s->h_in || s->sums ? dh + LOAD(AT(dh_in)) : LOAD(AT(dh_in));
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
UPDATE(store_sums)
{
    (void) whole, (void) o;
    const int gated = s->columns > 1;
    EACH_ROW for (int c = 0; c < columns; c++)
    {
        const ptrdiff_t u = gated ? unit : unit + c * LANES;
        const int lanes = LANES_AT(u);
        STORE(GATE(gated ? c : 0), SUM(c));
    }
}
