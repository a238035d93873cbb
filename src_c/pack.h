/* Weights in the order in which the product reads them, for one (type, ISA). */

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

/* Blocks [begin, end) of panels [block][k][column][lanes], zero beyond `units`.
 * gated: source c is column c of a block of LANES units; in the last one it takes fl_span() lanes. Else a block has FL_COLUMNS vectors of units (the last one only
 * those that hold units), and the sources follow each other along k: [block][source][k][vector][lanes].
 * Element (unit, k) of source c is weight[c][unit * unit_stride + k * k_stride], one of the strides being 1. */
static TARGET void NAME(pack)(void *panels, const void *const weight[FL_COLUMNS], ptrdiff_t unit_stride, ptrdiff_t k_stride,
                              ptrdiff_t units, ptrdiff_t K, int sources, int gated, ptrdiff_t block_stride,
                              ptrdiff_t begin, ptrdiff_t end)
{
    for (ptrdiff_t block = begin; block < end; block++) {
        const ptrdiff_t first = block * LANES * (gated ? 1 : FL_COLUMNS), left = (units - first + LANES - 1) / LANES;
        const int vectors = gated ? 1 : left < FL_COLUMNS ? (int) left : FL_COLUMNS;
        const int span = gated ? fl_span(LANES, units - first) : LANES;
        const ptrdiff_t width = gated ? fl_panel_row(LANES, units - first, sources) : vectors * LANES;
        for (int source = 0; source < sources; source++)
            for (int v = 0; v < vectors; v++) {
                ptrdiff_t unit = first + v * LANES, k = 0;
                int lanes = units - unit < LANES ? (int) (units - unit) : LANES;
                const REAL *from = (const REAL *) weight[source] + unit * unit_stride;
                const ptrdiff_t at = gated ? source * span : source * K * width + v * LANES;
                const ptrdiff_t filled = gated && source == sources - 1 ? width - at : span;
                REAL *to = (REAL *) panels + block * block_stride + at;
                for (; k_stride == 1 && lanes == LANES && k + LANES <= K; k += LANES) {
                    VEC rows[LANES];
                    for (int l = 0; l < LANES; l++)
                        rows[l] = NAME(load)(from + l * unit_stride + k);
                    NAME(transpose)(rows);
                    for (int l = 0; l < LANES; l++)
                        NAME(store)(to + (k + l) * width, rows[l]);
                }
                for (; k < K; k++) {
                    REAL *out = to + k * width;
                    if (unit_stride == 1)
                        NAME(store)(out, NAME(load_part)(from + k * k_stride, lanes));
                    else
                        for (int l = 0; l < filled; l++)
                            out[l] = l < lanes ? from[l * unit_stride + k * k_stride] : 0;
                }
            }
    }
}

/* What the products start from, [block][column][lanes]: first[c] + second[c], either of which may be NULL. */
static TARGET void NAME(pack_bias)(void *out, const void *const first[FL_COLUMNS], const void *const second[FL_COLUMNS], ptrdiff_t units,
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

/* A panel [K][width] of floats as words of four int8, [(K + 3) / 4][width], with a scale for each of its columns: nearest
 * even of w / scale, the largest being 127; 0 where the scale would be subnormal. The scales are stored times 2^-24, see
 * weights_int8(). A column with a NaN or an infinity has a NaN as its scale. */
static TARGET void NAME(to_int8)(void *out, void *scales, const void *panel, ptrdiff_t K, ptrdiff_t width)
{
    const float *w = panel;
    memset(out, 0, (size_t) ((K + 3) / 4 * width) * sizeof(uint32_t));
    for (ptrdiff_t i = 0; i < width; i++) {
        float most = 0;
        for (ptrdiff_t k = 0; k < K; k++) {
            float size = __builtin_fabsf(w[k * width + i]);
            most = size > most || size != size ? size : most; /* a NaN is kept */
        }
        float scale = most / 127;
        ((float *) scales)[i] = most - most != 0 ? __builtin_nanf("") : scale * 0x1p-24f;
        for (ptrdiff_t k = 0; k < K && scale >= 0x1p-102f && most - most == 0; k++) {
            float q = (w[k * width + i] / scale + MAGIC) - MAGIC;
            ((uint32_t *) out)[k / 4 * width + i] |= (uint32_t) (uint8_t) (int8_t) q << 8 * (k % 4);
        }
    }
}
#endif
