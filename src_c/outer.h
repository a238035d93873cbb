/* Products over all rows, out[j][k] += sum_r g[r][j] a[r][k], for one (type, ISA): g is cut into strips, a into panels. */

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

/* out [rows][columns] += strips' panel; `strips` of them, `stride` apart. */
INLINE void NAME(outer_tile)(const int strips, const int vectors, REAL *out, ptrdiff_t ldo, ptrdiff_t rows,
                             ptrdiff_t columns, ptrdiff_t n, const REAL *strip, ptrdiff_t stride, const REAL *panel)
{
    VEC acc[2 * STRIP][OUTER_COLUMNS];
    UNROLL for (int j = 0; j < strips * STRIP; j++) UNROLL for (int v = 0; v < vectors; v++)
    {
        ptrdiff_t lanes = columns - v * LANES;
        acc[j][v] = j < rows ? NAME(load_part)(out + j * ldo + v * LANES, lanes < LANES ? (int) lanes : LANES) : SPLAT(0);
        __builtin_prefetch(out + (strips * STRIP + j) * ldo + v * LANES, 1, 2); /* the next strip's */
    }
    for (ptrdiff_t r = 0; r < n; r++) {
        VEC a[OUTER_COLUMNS];
        UNROLL for (int v = 0; v < vectors; v++) a[v] = ((const VEC *) panel)[r * OUTER_COLUMNS + v];
        UNROLL for (int j = 0; j < strips * STRIP; j++)
        {
            REAL value = strip[j / STRIP * stride + r * STRIP + j % STRIP];
            UNROLL for (int v = 0; v < vectors; v++) acc[j][v] += a[v] * value;
        }
    }
    UNROLL for (int j = 0; j < strips * STRIP; j++) UNROLL for (int v = 0; v < vectors; v++)
    {
        ptrdiff_t lanes = columns - v * LANES;
        if (j < rows)
            NAME(store_part)(out + j * ldo + v * LANES, acc[j][v], lanes < LANES ? (int) lanes : LANES);
    }
}

/* out [rows][columns] += strips' panel over n rows; strips of STRIP rows, `stride` elements apart, and one panel
 * [n][3 vectors], of which columns <= 3 vectors. */
static TARGET void NAME(outer)(void *out, ptrdiff_t ldo, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t n, const void *strips,
                               ptrdiff_t stride, const void *panel)
{
    ptrdiff_t row = 0;
#define STRIPS(count, vectors)                                                                                          \
    for (; row + (count - 1) * STRIP < rows; row += count * STRIP)                                                      \
    NAME(outer_tile)(count, vectors, (REAL *) out + row * ldo, ldo, rows - row, columns, n,                             \
                     (const REAL *) strips + row / STRIP * stride, stride, panel)
    if (columns > 2 * LANES) {
        STRIPS(1, 3);
    } else if (columns > LANES) {
        STRIPS(1, 2);
    } else {
        if (STRIP < 8) /* four sums do not hide the latency of a multiply-add */
            STRIPS(2, 1);
        STRIPS(1, 1);
    }
#undef STRIPS
}

/* out [columns] += sum_r g[r] * a[r], n rows in their order; a negative ld walks them backward. */
static TARGET void NAME(weigh)(void *out, ptrdiff_t columns, ptrdiff_t n, const void *g, ptrdiff_t ldg, const void *a,
                               ptrdiff_t lda)
{
    REAL *total = out;
    for (ptrdiff_t r = 0; r < n; r++)
        for (ptrdiff_t j = 0; j < columns; j++)
            total[j] += ((const REAL *) g)[r * ldg + j] * ((const REAL *) a)[r * lda + j];
}
