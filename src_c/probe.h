/* What only tests and benchmarks call, for one (type, ISA). */

/* out = activation(in), `size` elements. */
static TARGET void NAME(map)(const fl_activation *act, const void *in, void *out, ptrdiff_t size)
{
    for (ptrdiff_t i = 0; i < size; i += LANES) {
        int lanes = size - i < LANES ? (int) (size - i) : LANES;
        NAME(store_part)((REAL *) out + i, NAME(activate)(act, NAME(load_part)((const REAL *) in + i, lanes)), lanes);
    }
}

/* `rounds` times ROWS x 4 independent multiply-adds of vectors in registers. */
static TARGET double NAME(peak)(ptrdiff_t rounds, void *scratch)
{
    VEC acc[ROWS * FL_COLUMNS], a = NAME(load)(scratch), b = NAME(load)((REAL *) scratch + LANES), sum = {0};
    UNROLL for (int i = 0; i < ROWS * FL_COLUMNS; i++) acc[i] = SPLAT(i);
    for (ptrdiff_t k = 0; k < rounds; k++)
        UNROLL for (int i = 0; i < ROWS * FL_COLUMNS; i++) acc[i] = acc[i] * a + b;
    UNROLL for (int i = 0; i < ROWS * FL_COLUMNS; i++) sum += acc[i];
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
