/* One pass for one (type, ISA, kind of weights): every block of units x every tile of rows, and the update of each.
 * Parameters: those of panel.h, and DEPTH(k), the rows of a panel that k weights take. */

/* gated: a column per gate. full: FL_COLUMNS gates, which both operands reach; nothing about them is left to decide. */
INLINE void WEIGHT_NAME(pass_body)(const fl_step *s, fl_update update, const int gated, const int full)
{
    REAL pre[2 * ROWS * FL_COLUMNS * LANES] __attribute__((aligned(64)));
    const int multiply = s->panels != 0;
    const ptrdiff_t tiles = (s->n + ROWS - 1) / ROWS, units = gated ? LANES : FL_COLUMNS * LANES;
    const int wide_x = gated && !full ? s->x_columns : FL_COLUMNS, wide_h = gated && !full ? s->h_columns : FL_COLUMNS;
    const ptrdiff_t offset = DEPTH(s->D) * wide_x * LANES, stride = offset + DEPTH(s->K) * wide_h * LANES;
    const ptrdiff_t D = s->x && multiply ? s->D : 0, K = s->h_in && multiply ? s->K : 0;
    const ptrdiff_t bias = (gated && !full ? s->columns : FL_COLUMNS) * LANES; /* elements of a block's bias */
    const ptrdiff_t read = (DEPTH(D) * wide_x + DEPTH(K) * wide_h) * LANES *
                           (ptrdiff_t) sizeof(WEIGHT); /* bytes of a panel that a tile reads */
    int panels;
    for (ptrdiff_t block = s->begin; block < s->end; block += panels) {
        const ptrdiff_t unit = block * units, left = (s->H - unit + LANES - 1) / LANES;
        const int vectors = left < FL_COLUMNS ? (int) left : FL_COLUMNS;
        const int columns = full ? FL_COLUMNS : gated ? s->columns : vectors;
        const int x_columns = gated ? wide_x : vectors, h_columns = gated ? wide_h : vectors;
        const int together = full || (x_columns == h_columns && !s->h_first);
        const WEIGHT *wx = (const WEIGHT *) s->panels + block * stride, *wh = wx + offset;
        /* Two panels at a time where the rows are few: with one row four sums do not hide the latency of an FMA. */
#if SCALED
        const REAL *scales = (const REAL *) s->scales + block * 2 * FL_COLUMNS * LANES;
#endif
        panels = block + 1 < s->end && (gated || left >= 2 * FL_COLUMNS) && s->n <= FEW ? 2 : 1;
        if (gated && s->n > 1 && fl_span(LANES, s->H - unit - units) < LANES) /* more rows hide it with the next one alone */
            panels = 1;
        const int span = gated ? fl_span(LANES, s->H - unit - (panels - 1) * units) : LANES;
        const int folded = multiply && span < LANES;
        for (ptrdiff_t tile = 0, row = 0, next; tile < tiles; tile++, row = next) {
            next = (tile + 1) * s->n / tiles;
            const int rows = (int) (next - row);
            const REAL *x = (const REAL *) s->x + row * s->ldx, *h = (const REAL *) s->h_in + row * s->ldh_in;
            const REAL *init = s->bias ? (const REAL *) s->bias + block * bias : NAME(zeros);
            ptrdiff_t init_panel = s->bias ? bias : 0, init_row = 0;
            if (s->sums || !together || folded) {
                for (int p = 0; p < panels; p++)
                    NAME(begin)(s, gated, unit + p * units, row, rows, columns, init + p * init_panel,
                                pre + p * ROWS * FL_COLUMNS * LANES);
                init = pre, init_panel = ROWS * FL_COLUMNS * LANES, init_row = FL_COLUMNS * LANES;
            }
            /* Each tile prefetches its share of the next panel; a single tile streams, which the hardware sees. */
            const int more = tiles > 1 && D + K && block + 1 < s->end;
            const ptrdiff_t step = more ? read / tiles / (D + K) : 0;
            const char *ahead =
                (const char *) (D ? wx : wh) + (more ? stride * (ptrdiff_t) sizeof(WEIGHT) + tile * (D + K) * step : 0);
            for (int part = 0; part < (together ? 1 : 2); part++) {
                const int first = part ? s->h_first : 0, wide = part ? h_columns : x_columns;
                const int width = (span * wide + LANES - 1) / LANES; /* vectors of the last panel's rows */
                const ptrdiff_t from_x = part ? 0 : D, from_h = part || together ? K : 0;
                REAL *const tail = pre + (panels - 1) * ROWS * FL_COLUMNS * LANES + first * LANES;
                if (from_x + from_h == 0 && init == pre)
                    continue;
                if (folded)
                    NAME(fold)(tail, rows, wide, span);
                WEIGHT_NAME(products)[rows - 1][(panels == 2 ? wide : width) - 1][panels == 2 ? width : 0](
                    pre + first * LANES, init + first * LANES, init_panel, init_row, wx, wh, stride,
                    part ? ahead + D * step : ahead, step, x, s->ldx, from_x, h, s->ldh_in, from_h SCALES);
                if (folded)
                    NAME(unfold)(tail, rows, wide, span);
            }
            for (int p = 0; p < panels; p++)
                update(s, row, rows, unit + p * units, columns, pre + p * ROWS * FL_COLUMNS * LANES);
        }
    }
}

static TARGET void WEIGHT_NAME(pass)(const fl_step *s, fl_update update)
{
    if (s->x_columns == FL_COLUMNS && s->h_columns == FL_COLUMNS)
        WEIGHT_NAME(pass_body)(s, update, 1, 1);
    else if (s->columns > 1)
        WEIGHT_NAME(pass_body)(s, update, 1, 0);
    else
        WEIGHT_NAME(pass_body)(s, update, 0, 0);
}

#undef SCALE_ARGS
#undef SCALES
