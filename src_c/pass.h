/* One pass for one (type, ISA, kind of weights): every block of units x every tile of rows, and the update of each.
 * Parameters: those of panel.h, and DEPTH(k), the rows of a panel that k weights take. */

/* What the blocks of a pass have in common. */
typedef struct {
    const fl_step *s;
    fl_update update;
    int gated, full;            /* a column per gate; FL_COLUMNS gates, which both operands reach, and one tile */
    ptrdiff_t tiles, height, higher;    /* of rows: so many each, and one more the first `higher` */
    ptrdiff_t units;            /* of a block */
    int wide_x, wide_h;         /* columns of a panel that x and h reach */
    ptrdiff_t offset, stride;   /* elements of a panel before h, and in all */
    ptrdiff_t D, K;             /* of x and h; 0: no product with it */
    int cut;                    /* the chains, into so many parts: */
    ptrdiff_t of_x, of_h;
    REAL *sums;                 /* [GROUP tiles, or two panels of the only one][row][column][lanes] */
} WEIGHT_NAME(blocks);

INLINE void WEIGHT_NAME(prepare)(WEIGHT_NAME(blocks) *b)
{
    const fl_step *const s = b->s;
    const int multiply = s->panels != 0;
    b->tiles = (s->n + ROWS - 1) / ROWS;
    if (b->tiles > 1)
        b->height = s->n / b->tiles, b->higher = s->n % b->tiles;
    else
        b->height = s->n;
    b->units = b->gated ? LANES : FL_COLUMNS * LANES;
    b->wide_x = b->gated && !b->full ? s->x_columns : FL_COLUMNS;
    b->wide_h = b->gated && !b->full ? s->h_columns : FL_COLUMNS;
    b->offset = DEPTH(s->D) * b->wide_x * LANES, b->stride = b->offset + DEPTH(s->K) * b->wide_h * LANES;
    b->D = s->x && multiply ? s->D : 0, b->K = s->h_in && multiply ? s->K : 0;
    /* The chains are cut where a panel is larger than the cache that its tiles are to find it in; a single tile finds it
     * nowhere, and with scales a chain is whole. */
    const ptrdiff_t x_bytes = DEPTH(b->D) * b->wide_x * LANES * (ptrdiff_t) sizeof(WEIGHT);
    const ptrdiff_t h_bytes = DEPTH(b->K) * b->wide_h * LANES * (ptrdiff_t) sizeof(WEIGHT), stretch = STRETCH(b->tiles);
    b->cut = !SCALED && b->tiles > 1 && fl_stretches(x_bytes + h_bytes, stretch) > 1;
    b->of_x = !b->D ? 0 : b->cut ? fl_stretches(x_bytes, stretch) : 1;
    b->of_h = !b->K ? !b->D : b->cut ? fl_stretches(h_bytes, stretch) : 1;
}

/* A part of the chains: the weights [x0, x1) of x and [h0, h1) of h, which stand in the panel from w_x and w_h on, `size`
 * elements in rows of so many vectors; they reach so many columns from `first` on. */
typedef struct {
    ptrdiff_t x0, x1, h0, h1, size;
    const WEIGHT *w_x, *w_h;
    int first, columns, vectors;
} WEIGHT_NAME(part_of_chains);

/* Part `i` of a block: of_x of x, then of_h of h; all of both in one where of_h is 0. */
INLINE WEIGHT_NAME(part_of_chains) WEIGHT_NAME(part_at)(const WEIGHT_NAME(blocks) *b, const WEIGHT *wx, int x_columns,
                                                       int h_columns, int span, ptrdiff_t i, ptrdiff_t of_x, ptrdiff_t of_h)
{
    const int h_alone = i >= of_x;
    WEIGHT_NAME(part_of_chains) part = {.first = h_alone ? b->s->h_first : 0, .columns = h_alone ? h_columns : x_columns};
    part.vectors = (span * part.columns + LANES - 1) / LANES;
    part.x0 = h_alone ? b->D : fl_cut(b->D, i, of_x), part.x1 = h_alone ? b->D : fl_cut(b->D, i + 1, of_x);
    part.h0 = h_alone ? fl_cut(b->K, i - of_x, of_h) : 0;
    part.h1 = h_alone ? fl_cut(b->K, i - of_x + 1, of_h) : of_h ? 0 : b->K;
    part.size = DEPTH(part.x1 - part.x0 + part.h1 - part.h0) * part.vectors * LANES;
    part.w_x = wx + DEPTH(part.x0) * part.vectors * LANES;
    part.w_h = wx + b->offset + DEPTH(part.h0) * part.vectors * LANES;
    return part;
}

/* One block, or with few rows two, of those before `end`: how many. one_tile: all rows are one. next: elements from a panel
 * to that of the block that follows; 0: none does. */
INLINE int WEIGHT_NAME(block)(const WEIGHT_NAME(blocks) *b, const int one_tile, ptrdiff_t block, ptrdiff_t end,
                              ptrdiff_t next)
{
    const fl_step *const s = b->s;
    const int gated = b->gated;
    const ptrdiff_t tiles = one_tile ? 1 : b->tiles, units = b->units, unit = block * units;
    const ptrdiff_t left = (s->H - unit + LANES - 1) / LANES;
    const int vectors = left < FL_COLUMNS ? (int) left : FL_COLUMNS;
    const int columns = b->full ? FL_COLUMNS : gated ? s->columns : vectors;
    const int x_columns = gated ? b->wide_x : vectors, h_columns = gated ? b->wide_h : vectors;
    const int alike = b->full || (x_columns == h_columns && !s->h_first); /* x and h reach the same columns */
    const ptrdiff_t bias = (gated ? columns : FL_COLUMNS) * LANES; /* elements of a block's */
    const WEIGHT *const wx = (const WEIGHT *) s->panels + block * b->stride;
#if SCALED
    const REAL *scales = (const REAL *) s->scales + block * 2 * FL_COLUMNS * LANES;
#endif
    /* Two panels at a time where the rows are few: with one row four sums do not hide the latency of an FMA. */
    int panels = block + 1 < end && (gated || left >= 2 * FL_COLUMNS) ? 2 : 1;
    if (gated && s->n > 1 && fl_span(LANES, s->H - unit - units) < LANES) /* more rows hide it with the next one alone */
        panels = 1;
    const int span = gated ? fl_span(LANES, s->H - unit - (panels - 1) * units) : LANES; /* of the last panel's columns */
    const int folded = s->panels && span < LANES;
    const int joint = alike && (one_tile || !b->cut);
    const ptrdiff_t of_x = joint ? 1 : b->of_x, of_h = joint ? 0 : b->of_h, parts = of_x + of_h;
    /* All tiles of a group take a part, then the next one. */
    for (ptrdiff_t group = 0, row = 0, stop; group < tiles; group = stop) {
        const ptrdiff_t first_row = row;
        stop = parts > 1 && group + GROUP < tiles ? group + GROUP : tiles;
        for (ptrdiff_t i = 0; i < parts; i++) {
            const WEIGHT_NAME(part_of_chains) part = WEIGHT_NAME(part_at)(b, wx, x_columns, h_columns, span, i, of_x, of_h);
            const ptrdiff_t x_length = part.x1 - part.x0, h_length = part.h1 - part.h0, length = x_length + h_length;
            /* Each tile prefetches its share of what follows: the next part, for the next group the first, or that of the
             * next panel. A single tile streams, which the hardware sees. */
            const char *ahead = (const char *) wx;
            ptrdiff_t step = 0;
            const int here = i + 1 < parts || stop < tiles;
            if (!one_tile && length && (here || next)) {
                const WEIGHT_NAME(part_of_chains) then =
                    WEIGHT_NAME(part_at)(b, wx, x_columns, h_columns, span, i + 1 < parts ? i + 1 : 0, of_x, of_h);
                ahead = (const char *) ((then.x1 > then.x0 ? then.w_x : then.w_h) + (here ? 0 : next));
                step = then.size * (ptrdiff_t) sizeof(WEIGHT) / (stop - group) / length;
            }
            row = first_row;
            for (ptrdiff_t tile = group; tile < stop; tile++, ahead += length * step) {
                const int rows = (int) b->height + (!one_tile && tile < b->higher);
                REAL *const pre = b->sums + (parts > 1 ? tile - group : 0) * SLOT;
                REAL *const tail = pre + (panels - 1) * SLOT + part.first * LANES;
                const REAL *init = pre;
                ptrdiff_t init_panel = SLOT, init_row = FL_COLUMNS * LANES;
                if (i == 0) {
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
                        NAME(fold)(tail, rows, part.columns, span);
                    WEIGHT_NAME(products)
                    [rows - 1][(panels == 2 ? part.columns : part.vectors) - 1][panels == 2 ? part.vectors : 0](
                        pre + part.first * LANES, init + part.first * LANES, init_panel, init_row, part.w_x, part.w_h,
                        b->stride, ahead, step, (const REAL *) s->x + row * s->ldx + part.x0, s->ldx, x_length,
                        (const REAL *) s->h_in + row * s->ldh_in + part.h0, s->ldh_in, h_length SCALES);
                    if (folded)
                        NAME(unfold)(tail, rows, part.columns, span);
                }
                if (i + 1 == parts)
                    for (int p = 0; p < panels; p++)
                        b->update(s, row, rows, unit + p * units, columns, pre + p * SLOT);
                row += rows;
            }
        }
    }
    return panels;
}

INLINE void WEIGHT_NAME(pass_body)(const fl_step *s, fl_update update, const int gated, const int full)
{
    REAL sums[GROUP * SLOT] __attribute__((aligned(64)));
    WEIGHT_NAME(blocks) b = {.s = s, .update = update, .gated = gated, .full = full, .sums = sums};
    WEIGHT_NAME(prepare)(&b);
    /* Backwards at every other step: what a step read last is still in the cache for the next one. Weights that are larger
     * than a cache, always read in one order, would find nothing there. */
    const ptrdiff_t most = s->n <= FEW ? 2 : 1, count = (s->end - s->begin + most - 1) / most;
    const ptrdiff_t next = s->backwards ? -b.stride : b.stride;
    for (ptrdiff_t i = 0; i < count; i++) {
        ptrdiff_t block = s->begin + (s->backwards ? count - 1 - i : i) * most;
        const ptrdiff_t end = block + most < s->end ? block + most : s->end;
        while (block < end)
            block += full || b.tiles == 1 ? WEIGHT_NAME(block)(&b, 1, block, end, 0)
                                          : WEIGHT_NAME(block)(&b, 0, block, end, i + 1 < count ? next : 0);
    }
}

static TARGET void WEIGHT_NAME(pass)(const fl_step *s, fl_update update)
{
    /* With more tiles, or narrowed weights, this one gains nothing. */
    if (DEPTH(4) == 4 && s->x_columns == FL_COLUMNS && s->h_columns == FL_COLUMNS && s->n > 0 && s->n <= ROWS)
        WEIGHT_NAME(pass_body)(s, update, 1, 1);
    else if (s->columns > 1)
        WEIGHT_NAME(pass_body)(s, update, 1, 0);
    else
        WEIGHT_NAME(pass_body)(s, update, 0, 0);
}

#undef SCALE_ARGS
#undef SCALES
