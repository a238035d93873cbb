/* One pass for one (type, ISA, kind of weights): every block of units x every tile of rows, and the update of each.
 * Parameters: those of panel.h, and DEPTH(k), the rows of a panel that k weights take. */

/* What the blocks of a pass have in common. */
typedef struct {
    const fl_step *s;
    fl_update update;
    int gated, full;            /* a column per gate; FL_COLUMNS gates, which both operands reach: nothing left to decide */
    ptrdiff_t tiles, units;     /* of rows; of a block */
    int wide_x, wide_h;         /* columns of a panel that x and h reach */
    ptrdiff_t offset, stride;   /* elements of a panel before h, and in all */
    ptrdiff_t D, K;             /* rows of a panel that are multiplied */
    ptrdiff_t of_x, of_h;       /* parts of the chains over x and h, where these are cut */
    int cut;
    REAL *sums;                 /* [GROUP][panel][row][column][lanes] */
} WEIGHT_NAME(blocks);

INLINE void WEIGHT_NAME(prepare)(WEIGHT_NAME(blocks) *b)
{
    const fl_step *const s = b->s;
    const int chosen = b->gated && !b->full, multiply = s->panels != 0;
    b->tiles = (s->n + ROWS - 1) / ROWS, b->units = b->gated ? LANES : FL_COLUMNS * LANES;
    b->wide_x = chosen ? s->x_columns : FL_COLUMNS, b->wide_h = chosen ? s->h_columns : FL_COLUMNS;
    b->offset = DEPTH(s->D) * b->wide_x * LANES, b->stride = b->offset + DEPTH(s->K) * b->wide_h * LANES;
    b->D = s->x && multiply ? s->D : 0, b->K = s->h_in && multiply ? s->K : 0;
    /* The chains are cut where a panel is larger than the cache that its tiles are to find it in; a single tile finds it
     * nowhere, and with scales a chain is whole. */
    const ptrdiff_t x_bytes = DEPTH(b->D) * b->wide_x * LANES * (ptrdiff_t) sizeof(WEIGHT);
    const ptrdiff_t h_bytes = DEPTH(b->K) * b->wide_h * LANES * (ptrdiff_t) sizeof(WEIGHT), stretch = STRETCH(b->tiles);
    b->cut = !SCALED && b->tiles > 1 && fl_stretches(x_bytes + h_bytes, stretch) > 1;
    b->of_x = b->D ? fl_stretches(x_bytes, stretch) : 0, b->of_h = b->K ? fl_stretches(h_bytes, stretch) : !b->D;
}

/* One block, or with few rows two, of those before `end`: how many. next: elements from a panel to that of the block that
 * follows; 0: none does. */
INLINE int WEIGHT_NAME(block)(const WEIGHT_NAME(blocks) *b, ptrdiff_t block, ptrdiff_t end, ptrdiff_t next)
{
    const fl_step *const s = b->s;
    const int gated = b->gated, cut = b->cut;
    const ptrdiff_t units = b->units, unit = block * units, left = (s->H - unit + LANES - 1) / LANES;
    const int vectors = left < FL_COLUMNS ? (int) left : FL_COLUMNS;
    const int columns = b->full ? FL_COLUMNS : gated ? s->columns : vectors;
    const int x_columns = gated ? b->wide_x : vectors, h_columns = gated ? b->wide_h : vectors;
    const int alike = b->full || (x_columns == h_columns && !s->h_first); /* x and h reach the same columns */
    const ptrdiff_t bias = (gated ? columns : FL_COLUMNS) * LANES; /* elements of a block's */
    const WEIGHT *const wx = (const WEIGHT *) s->panels + block * b->stride, *const wh = wx + b->offset;
#if SCALED
    const REAL *scales = (const REAL *) s->scales + block * 2 * FL_COLUMNS * LANES;
#endif
    /* Two panels at a time where the rows are few: with one row four sums do not hide the latency of an FMA. */
    int panels = block + 1 < end && (gated || left >= 2 * FL_COLUMNS) ? 2 : 1;
    if (gated && s->n > 1 && fl_span(LANES, s->H - unit - units) < LANES) /* more rows hide it with the next one alone */
        panels = 1;
    const int span = gated ? fl_span(LANES, s->H - unit - (panels - 1) * units) : LANES;
    const int folded = s->panels && span < LANES;
    /* The parts of a tile's chains: so many of x, then those of h, if not all is one part. */
    const int joint = alike && !cut;
    const ptrdiff_t of_x = joint ? 1 : cut ? b->of_x : b->D > 0;
    const ptrdiff_t parts = joint ? 1 : of_x + (cut ? b->of_h : b->K > 0 || !b->D);
    /* All tiles of a group take a part, then the next one; where nothing is cut a tile takes all of them. */
    for (ptrdiff_t group = 0, row = 0, stop; group < b->tiles; group = stop) {
        const ptrdiff_t first_row = row;
        stop = !cut ? group + 1 : group + GROUP < b->tiles ? group + GROUP : b->tiles;
        for (ptrdiff_t part = 0; part < parts; part++) {
            const int of_h = part >= of_x, first = of_h ? s->h_first : 0, wide = of_h ? h_columns : x_columns;
            const ptrdiff_t x0 = of_h ? b->D : fl_cut(b->D, part, of_x), x1 = of_h ? b->D : fl_cut(b->D, part + 1, of_x);
            const ptrdiff_t h0 = of_h ? fl_cut(b->K, part - of_x, parts - of_x) : 0;
            const ptrdiff_t h1 = of_h ? fl_cut(b->K, part - of_x + 1, parts - of_x) : joint ? b->K : 0;
            const int width = (span * wide + LANES - 1) / LANES; /* vectors of the last panel's rows */
            const ptrdiff_t length = x1 - x0 + h1 - h0, reads = DEPTH(length) * width * LANES;
            const WEIGHT *const w_x = wx + DEPTH(x0) * width * LANES, *const w_h = wh + DEPTH(h0) * width * LANES;
            /* Each tile prefetches its share of what follows: what it reads now of the next panel; where chains are cut the
             * next part, for the next group the first, or that of the next panel. A single tile streams, which the hardware
             * sees. */
            const int again = cut && (part + 1 < parts || stop < b->tiles); /* this block */
            const int more = b->tiles > 1 && length && (again || next);
            const WEIGHT *const now = x1 > x0 ? w_x : w_h, *const base = cut ? wx : now;
            const WEIGHT *const follows = !again ? base + next : part + 1 < parts ? now + reads : wx;
            const ptrdiff_t sharers = cut ? stop - group : b->tiles;
            const ptrdiff_t step = more ? reads * (ptrdiff_t) sizeof(WEIGHT) / sharers / length : 0;
            row = first_row;
            for (ptrdiff_t tile = group, row_after; tile < stop; tile++, row = row_after) {
                row_after = (tile + 1) * s->n / b->tiles;
                const int rows = (int) (row_after - row);
                REAL *const pre = b->sums + (tile - group) * SLOT, *const tail = pre + (panels - 1) * SLOT + first * LANES;
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
                        pre + first * LANES, init + first * LANES, init_panel, init_row, w_x, w_h, b->stride,
                        (const char *) follows + (cut ? tile - group : tile) * length * step, step,
                        (const REAL *) s->x + row * s->ldx + x0, s->ldx, x1 - x0,
                        (const REAL *) s->h_in + row * s->ldh_in + h0, s->ldh_in, h1 - h0 SCALES);
                    if (folded)
                        NAME(unfold)(tail, rows, wide, span);
                }
                if (part + 1 == parts)
                    for (int p = 0; p < panels; p++)
                        b->update(s, row, rows, unit + p * units, columns, pre + p * SLOT);
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
    const ptrdiff_t size = s->n <= FEW ? 2 : 1, pairs = (s->end - s->begin + size - 1) / size;
    const ptrdiff_t next = s->backwards ? -b.stride : b.stride;
    for (ptrdiff_t i = 0; i < pairs; i++) {
        ptrdiff_t block = s->begin + (s->backwards ? pairs - 1 - i : i) * size;
        const ptrdiff_t end = block + size < s->end ? block + size : s->end;
        while (block < end)
            block += WEIGHT_NAME(block)(&b, block, end, i + 1 < pairs ? next : 0);
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
