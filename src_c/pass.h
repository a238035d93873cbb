/* One pass for one (type, ISA, kind of weights): every block of units x every tile of rows, and the update of each.
 * Parameters: those of panel.h, and DEPTH(k), the rows of a panel that k weights take. */

/* gated: a column per gate. full: FL_COLUMNS gates, which both operands reach; nothing about them is left to decide. */
INLINE void WEIGHT_NAME(pass_body)(const fl_step *s, fl_update update, const int gated, const int full)
{
    REAL sums[GROUP * SLOT] __attribute__((aligned(64)));
    const int multiply = s->panels != 0;
    const ptrdiff_t tiles = (s->n + ROWS - 1) / ROWS, units = gated ? LANES : FL_COLUMNS * LANES;
    const int wide_x = gated && !full ? s->x_columns : FL_COLUMNS, wide_h = gated && !full ? s->h_columns : FL_COLUMNS;
    const ptrdiff_t offset = DEPTH(s->D) * wide_x * LANES, stride = offset + DEPTH(s->K) * wide_h * LANES;
    const ptrdiff_t D = s->x && multiply ? s->D : 0, K = s->h_in && multiply ? s->K : 0;
    const ptrdiff_t bias = (gated && !full ? s->columns : FL_COLUMNS) * LANES; /* elements of a block's bias */
    /* The chains are cut where a panel is larger than the cache that its tiles are to find it in; a single tile finds it
     * nowhere, and with scales a chain is whole. */
    const ptrdiff_t x_bytes = DEPTH(D) * wide_x * LANES * (ptrdiff_t) sizeof(WEIGHT);
    const ptrdiff_t h_bytes = DEPTH(K) * wide_h * LANES * (ptrdiff_t) sizeof(WEIGHT), stretch = STRETCH(tiles);
    const int cut = !SCALED && tiles > 1 && fl_stretches(x_bytes + h_bytes, stretch) > 1;
    int panels;
    for (ptrdiff_t block = s->begin; block < s->end; block += panels) {
        const ptrdiff_t unit = block * units, left = (s->H - unit + LANES - 1) / LANES;
        const int vectors = left < FL_COLUMNS ? (int) left : FL_COLUMNS;
        const int columns = full ? FL_COLUMNS : gated ? s->columns : vectors;
        const int x_columns = gated ? wide_x : vectors, h_columns = gated ? wide_h : vectors;
        const int alike = full || (x_columns == h_columns && !s->h_first); /* x and h reach the same columns */
        const WEIGHT *const wx = (const WEIGHT *) s->panels + block * stride, *const wh = wx + offset;
#if SCALED
        const REAL *scales = (const REAL *) s->scales + block * 2 * FL_COLUMNS * LANES;
#endif
        /* Two panels at a time where the rows are few: with one row four sums do not hide the latency of an FMA. */
        panels = block + 1 < s->end && (gated || left >= 2 * FL_COLUMNS) && s->n <= FEW ? 2 : 1;
        if (gated && s->n > 1 && fl_span(LANES, s->H - unit - units) < LANES) /* more rows hide it with the next one alone */
            panels = 1;
        const int span = gated ? fl_span(LANES, s->H - unit - (panels - 1) * units) : LANES;
        const int folded = multiply && span < LANES;
        /* The parts of a tile's chains: so many of x, then those of h, if not all is one part. */
        const int joint = alike && !cut;
        const ptrdiff_t of_x = joint ? 1 : !D ? 0 : cut ? fl_stretches(x_bytes, stretch) : 1;
        const ptrdiff_t parts = joint ? 1 : of_x + (!K ? !D : cut ? fl_stretches(h_bytes, stretch) : 1);
        /* All tiles of a group take a part, then the next one; where nothing is cut a tile takes all of them. */
        for (ptrdiff_t group = 0, row = 0, end; group < tiles; group = end) {
            const ptrdiff_t first_row = row;
            end = !cut ? group + 1 : group + GROUP < tiles ? group + GROUP : tiles;
            for (ptrdiff_t part = 0; part < parts; part++) {
                const int of_h = part >= of_x, first = of_h ? s->h_first : 0, wide = of_h ? h_columns : x_columns;
                const ptrdiff_t x0 = of_h ? D : fl_cut(D, part, of_x), x1 = of_h ? D : fl_cut(D, part + 1, of_x);
                const ptrdiff_t h0 = of_h ? fl_cut(K, part - of_x, parts - of_x) : 0;
                const ptrdiff_t h1 = of_h ? fl_cut(K, part - of_x + 1, parts - of_x) : joint ? K : 0;
                const int width = (span * wide + LANES - 1) / LANES; /* vectors of the last panel's rows */
                const ptrdiff_t length = x1 - x0 + h1 - h0, reads = DEPTH(length) * width * LANES;
                const WEIGHT *const w_x = wx + DEPTH(x0) * width * LANES, *const w_h = wh + DEPTH(h0) * width * LANES;
                /* Each tile prefetches its share of what follows: the next part, or what it reads now of the next panel. A
                 * single tile streams, which the hardware sees. */
                const int more = tiles > 1 && length && (block + 1 < s->end || (cut && part + 1 < parts));
                const WEIGHT *const follows = (x1 > x0 ? w_x : w_h) + (!more ? 0 : cut ? reads : stride);
                const ptrdiff_t step = more ? reads * (ptrdiff_t) sizeof(WEIGHT) / (cut ? end - group : tiles) / length : 0;
                row = first_row;
                for (ptrdiff_t tile = group, next; tile < end; tile++, row = next) {
                    next = (tile + 1) * s->n / tiles;
                    const int rows = (int) (next - row);
                    REAL *const pre = sums + (tile - group) * SLOT, *const tail = pre + (panels - 1) * SLOT + first * LANES;
                    const REAL *init = pre;
                    ptrdiff_t init_panel = SLOT, init_row = FL_COLUMNS * LANES;
                    if (part == 0) {
                        init = s->bias ? (const REAL *) s->bias + block * bias : NAME(zeros);
                        init_panel = s->bias ? bias : 0, init_row = 0;
                        if (s->sums || !alike || folded) {
                            for (int p = 0; p < panels; p++)
                                NAME(begin)(s, gated, unit + p * units, row, rows, columns, init + p * init_panel,
                                            pre + p * SLOT);
                            init = pre, init_panel = SLOT, init_row = FL_COLUMNS * LANES;
                        }
                    }
                    if (length || init != pre) {
                        if (folded)
                            NAME(fold)(tail, rows, wide, span);
                        WEIGHT_NAME(products)[rows - 1][(panels == 2 ? wide : width) - 1][panels == 2 ? width : 0](
                            pre + first * LANES, init + first * LANES, init_panel, init_row, w_x, w_h, stride,
                            (const char *) follows + (cut ? tile - group : tile) * length * step, step,
                            (const REAL *) s->x + row * s->ldx + x0, s->ldx, x1 - x0,
                            (const REAL *) s->h_in + row * s->ldh_in + h0, s->ldh_in, h1 - h0 SCALES);
                        if (folded)
                            NAME(unfold)(tail, rows, wide, span);
                    }
                    if (part + 1 == parts)
                        for (int p = 0; p < panels; p++)
                            update(s, row, rows, unit + p * units, columns, pre + p * SLOT);
                }
            }
        }
    }
}

static TARGET void WEIGHT_NAME(pass)(const fl_step *s, fl_update update)
{
    if (DEPTH(4) == 4 && s->x_columns == FL_COLUMNS && s->h_columns == FL_COLUMNS) /* narrowed weights gain nothing by it */
        WEIGHT_NAME(pass_body)(s, update, 1, 1);
    else if (s->columns > 1)
        WEIGHT_NAME(pass_body)(s, update, 1, 0);
    else
        WEIGHT_NAME(pass_body)(s, update, 0, 0);
}

#undef SCALE_ARGS
#undef SCALES
