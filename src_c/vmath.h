/* Vector type, loads and stores, exp-based activations for one (type, ISA).
 *
 * Parameters (set by instantiate.h and kernels.c):
 *   REAL, UINT       element type and the unsigned integer of the same size
 *   VECTOR_BYTES     vector size of the ISA
 *   NAME(x)          x with the suffix of this (type, ISA)
 *   TARGET           the ISA's target attribute
 *   IS_FLOAT         1 for float, 0 for double
 */

#define LANES ((int) (VECTOR_BYTES / sizeof(REAL)))

typedef REAL NAME(vec) __attribute__((vector_size(VECTOR_BYTES)));
typedef UINT NAME(uvec) __attribute__((vector_size(VECTOR_BYTES)));
/* The same vector at any address a REAL may have. */
typedef REAL NAME(vec_any) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));

#define VEC NAME(vec)
#define UVEC NAME(uvec)
#define SPLAT(value) ((VEC) {0} + (REAL) (value))
#define SELECT(mask, yes, no) ((VEC) (((UVEC) (mask) & (UVEC) (yes)) | (~(UVEC) (mask) & (UVEC) (no))))

/* MIN: a < b ? a : b, MAX: a > b ? a : b; so b where one is NaN. One instruction, which vector types cannot say. */
#if VECTOR_BYTES == 64 && !defined(FL_EMULATE_AVX512)
#define PACKED(op, type) _mm512_##op##_##type
#elif VECTOR_BYTES == 32
#define PACKED(op, type) _mm256_##op##_##type
#elif VECTOR_BYTES == 16 && defined(__x86_64__)
#define PACKED(op, type) _mm_##op##_##type
#endif
#if !defined(PACKED)
#define MIN(a, b) SELECT((a) < (b), a, b)
#define MAX(a, b) SELECT((a) > (b), a, b)
#elif IS_FLOAT
#define MIN(a, b) ((VEC) PACKED(min, ps)(a, b))
#define MAX(a, b) ((VEC) PACKED(max, ps)(a, b))
#else
#define MIN(a, b) ((VEC) PACKED(min, pd)(a, b))
#define MAX(a, b) ((VEC) PACKED(max, pd)(a, b))
#endif

INLINE VEC NAME(load)(const REAL *p) { return *(const NAME(vec_any) *) p; }
INLINE void NAME(store)(REAL *p, VEC v) { *(NAME(vec_any) *) p = v; }

/* Vectors of which only the first lanes exist, from 1 on: instructions that touch no others, which vector types cannot say. */
#if VECTOR_BYTES == 64 && !defined(FL_EMULATE_AVX512)
#define MASK(lanes) ((1u << (lanes)) - 1)
#if IS_FLOAT
#define MASKED_LOAD(p, lanes) __builtin_ia32_loadups512_mask(p, (VEC) {0}, (unsigned short) MASK(lanes))
#define MASKED_STORE(p, v, lanes) __builtin_ia32_storeups512_mask(p, v, (unsigned short) MASK(lanes))
#else
#define MASKED_LOAD(p, lanes) __builtin_ia32_loadupd512_mask(p, (VEC) {0}, (unsigned char) MASK(lanes))
#define MASKED_STORE(p, v, lanes) __builtin_ia32_storeupd512_mask(p, v, (unsigned char) MASK(lanes))
#endif
#elif VECTOR_BYTES == 32
#if IS_FLOAT
typedef int NAME(mask) __attribute__((vector_size(VECTOR_BYTES)));
#define MASK(lanes) ((NAME(mask)) {0, 1, 2, 3, 4, 5, 6, 7} < (int) (lanes))
#define MASKED_LOAD(p, lanes) __builtin_ia32_maskloadps256((const VEC *) (p), MASK(lanes))
#define MASKED_STORE(p, v, lanes) __builtin_ia32_maskstoreps256((VEC *) (p), MASK(lanes), v)
#else
typedef long long NAME(mask) __attribute__((vector_size(VECTOR_BYTES)));
#define MASK(lanes) ((NAME(mask)) {0, 1, 2, 3} < (long long) (lanes))
#define MASKED_LOAD(p, lanes) __builtin_ia32_maskloadpd256((const VEC *) (p), MASK(lanes))
#define MASKED_STORE(p, v, lanes) __builtin_ia32_maskstorepd256((VEC *) (p), MASK(lanes), v)
#endif
#else
INLINE VEC NAME(masked_load)(const REAL *p, int lanes)
{
    VEC v = {0};
    UNROLL for (int l = 0; l < LANES; l++) if (l < lanes) v[l] = p[l];
    return v;
}

INLINE void NAME(masked_store)(REAL *p, VEC v, int lanes)
{
    UNROLL for (int l = 0; l < LANES; l++) if (l < lanes) p[l] = v[l];
}
#define MASKED_LOAD(p, lanes) NAME(masked_load)(p, lanes)
#define MASKED_STORE(p, v, lanes) NAME(masked_store)(p, v, lanes)
#endif

/* The first `lanes` elements; the rest is zero. */
INLINE VEC NAME(load_part)(const REAL *p, int lanes)
{
    return lanes == LANES ? NAME(load)(p) : MASKED_LOAD(p, lanes);
}

INLINE void NAME(store_part)(REAL *p, VEC v, int lanes)
{
    if (lanes == LANES)
        NAME(store)(p, v);
    else
        MASKED_STORE(p, v, lanes);
}

#if IS_FLOAT
#define MAGIC 0x1.8p23f          /* adding it rounds to an integer in the low mantissa bits */
#define MANTISSA_BITS 23
#define ONE_BITS 0x3f800000u
#define SIGN_BIT 0x80000000u
#define LN2_HI 0x1.63p-1f        /* n * LN2_HI is exact for |n| < 2^15 */
#define LN2_LO -0x1.bd0106p-13f
#define SIGMOID_LIMIT 87.33654f  /* 126 ln 2, rounded down: sigmoid(-a) is subnormal beyond */
#define SIGMOID_END 88.36f       /* below 127.5 ln 2: exp is finite */
#define TANH_LIMIT 10.0f         /* tanh rounds to 1 from 9.02 on */
#else
#define MAGIC 0x1.8p52
#define MANTISSA_BITS 52
#define ONE_BITS 0x3ff0000000000000u
#define SIGN_BIT 0x8000000000000000u
#define LN2_HI 0x1.62e42feep-1   /* n * LN2_HI is exact for |n| < 2^20 */
#define LN2_LO 0x1.a39ef35793c76p-33
#define SIGMOID_LIMIT 708.3964185322641
#define SIGMOID_END 709.4
#define TANH_LIMIT 20.0          /* tanh rounds to 1 from 19.07 on */
#endif

/* exp(t) = s (1 + p) with s = 2^n, n = round(t / ln 2), p = exp(r) - 1, r = t - n ln 2, |r| <= ln(2)/2.
 * p = r + r^2 q(r), q the weighted minimax polynomial: relative error of p 2^-26.2 (float), 2^-55.6 (double).
 * Valid where 2^n is a normal number; a NaN in t gives a NaN in p. */
INLINE void NAME(exp_parts)(VEC t, VEC *s, VEC *p)
{
    VEC z = t * SPLAT(1.44269504088896340736) + SPLAT(MAGIC);
    VEC n = z - SPLAT(MAGIC);
    VEC r = t - n * SPLAT(LN2_HI);
    r = r - n * SPLAT(LN2_LO);
#if IS_FLOAT
    VEC q = SPLAT(0x1.6beb94976ab99p-10);
    q = q * r + SPLAT(0x1.1227b637a5bd5p-7);
    q = q * r + SPLAT(0x1.5556748654c9fp-5);
    q = q * r + SPLAT(0x1.5554afdfb9fa9p-3);
    q = q * r + SPLAT(0x1.fffffec1afe11p-2);
#else
    VEC q = SPLAT(0x1.ae767feee61afp-26);
    q = q * r + SPLAT(0x1.28a22c4df4023p-22);
    q = q * r + SPLAT(0x1.71de816753aafp-19);
    q = q * r + SPLAT(0x1.a019a71d8934bp-16);
    q = q * r + SPLAT(0x1.a01a0177f0179p-13);
    q = q * r + SPLAT(0x1.6c16c17ef9b3bp-10);
    q = q * r + SPLAT(0x1.1111111118794p-7);
    q = q * r + SPLAT(0x1.555555555222cp-5);
    q = q * r + SPLAT(0x1.555555555553bp-3);
    q = q * r + SPLAT(0x1.0000000000005p-1);
#endif
    VEC rr = r * r;
    *p = rr * q + r;
    *s = (VEC) (((UVEC) z << MANTISSA_BITS) + ONE_BITS);
}

/* sigmoid(x) = 1 / (1 + exp(-x)) = 1 / ((1 + s p) + s): so 1 + exp(-x) is rounded once where s is large.
 * Error below 2 ulp; what would be subnormal is 0 in a call (control.h) and small without; NaN gives NaN. */
INLINE VEC NAME(sigmoid)(VEC x)
{
    VEC s, p;
    NAME(exp_parts)(-MAX(SPLAT(-SIGMOID_END), MIN(SPLAT(SIGMOID_LIMIT), x)), &s, &p);
    return SPLAT(1) / ((s * p + SPLAT(1)) + s);
}

/* tanh(|x|) = (1 - e) / (1 + e) with e = exp(-2|x|) = s + s p, then the sign of x; 1 - s and 1 + s are exact.
 * Error below 2 ulp, odd to the bit, |tanh| <= 1; NaN gives NaN. */
INLINE VEC NAME(tanh)(VEC x)
{
    UVEC sign = (UVEC) x & ((UVEC) {0} + SIGN_BIT);
    VEC a = (VEC) ((UVEC) x & ~((UVEC) {0} + SIGN_BIT));
    a = MIN(SPLAT(TANH_LIMIT), a);
    VEC s, p;
    NAME(exp_parts)(-(a + a), &s, &p);
    VEC y = ((SPLAT(1) - s) - s * p) / ((SPLAT(1) + s) + s * p);
    return (VEC) ((UVEC) y | sign);
}

/* exp(t), that of SIGMOID_LIMIT beyond it; what would be subnormal is 0, NaN gives NaN. */
INLINE VEC NAME(exp)(VEC t)
{
    VEC s, p;
    NAME(exp_parts)(MAX(SPLAT(-SIGMOID_LIMIT), MIN(SPLAT(SIGMOID_LIMIT), t)), &s, &p);
    return SELECT(t < SPLAT(-SIGMOID_LIMIT), SPLAT(0), s * p + s);
}

/* exp(t) - 1 for t <= 0: exact near 0, NaN gives NaN. */
INLINE VEC NAME(expm1)(VEC t)
{
    VEC s, p;
    NAME(exp_parts)(MAX(SPLAT(-SIGMOID_LIMIT), t), &s, &p);
    return (s - SPLAT(1)) + s * p;
}

/* ln(1 + e) for 0 <= e <= 1: 2 atanh(z) with z = e / (2 + e), atanh(z) / z = 1 + z^2 q(z^2), q the minimax polynomial on
 * [0, 1/9]: relative error 2^-25.9 (float), 2^-57.5 (double). NaN gives NaN. */
INLINE VEC NAME(log1p)(VEC e)
{
    VEC z = e / (SPLAT(2) + e), w = z * z;
#if IS_FLOAT
    VEC q = SPLAT(0x1.12f5974a448c8p-3);
    q = q * w + SPLAT(0x1.21249ac88928ap-3);
    q = q * w + SPLAT(0x1.99ad6b7681559p-3);
    q = q * w + SPLAT(0x1.55554c7f9b39fp-2);
#else
    VEC q = SPLAT(0x1.4b0a26c5f2aefp-4);
    q = q * w + SPLAT(0x1.687a6e7c95176p-5);
    q = q * w + SPLAT(0x1.eb905e8575054p-5);
    q = q * w + SPLAT(0x1.10ac75dc602b1p-4);
    q = q * w + SPLAT(0x1.3b18b294bebf9p-4);
    q = q * w + SPLAT(0x1.745cf0b0e03bdp-4);
    q = q * w + SPLAT(0x1.c71c727143318p-4);
    q = q * w + SPLAT(0x1.24924923d44c6p-3);
    q = q * w + SPLAT(0x1.999999999a3ddp-3);
    q = q * w + SPLAT(0x1.5555555555555p-2);
#endif
    z = z + z;
    return z * w * q + z;
}

/* ln sigmoid(x) = min(x, 0) - ln(1 + exp(-|x|)) */
INLINE VEC NAME(log_sigmoid)(VEC x)
{
    VEC a = (VEC) ((UVEC) x & ~((UVEC) {0} + SIGN_BIT));
    return MIN(SPLAT(0), x) - NAME(log1p)(NAME(exp)(-a));
}

INLINE VEC NAME(limit)(VEC v, double limit)
{
    if (limit < NO_LIMIT)
        return MIN(SPLAT(limit), MAX(SPLAT(-limit), v));
    return v;
}

/* Activations that few layers have, and their slopes, out of line: inlined into every update they would double the code. */
static NOINLINE TARGET void NAME(rare)(const fl_activation *act, REAL *vector)
{
    VEC x = NAME(load)(vector), y = x;
    VEC a = (VEC) ((UVEC) x & ~((UVEC) {0} + SIGN_BIT));
    switch (act->kind) {
    case FL_LINEAR_SIGMOID: /* min(max(alpha x + beta, 0), 1) */
        y = x * SPLAT(act->alpha) + SPLAT(act->beta);
        y = MIN(SPLAT(1), MAX(SPLAT(0), y));
        break;
    case FL_ELU: /* x > 0: x, else alpha (exp(x) - 1) */
        y = SELECT(x > SPLAT(0), x, SPLAT(act->alpha) * NAME(expm1)(x));
        break;
    case FL_LEAKY_RELU: /* x > 0: x, else alpha x */
        y = SELECT(x > SPLAT(0), x, x * SPLAT(act->alpha));
        break;
    case FL_SOFTPLUS: /* ln(1 + exp(x)) = max(x, 0) + ln(1 + exp(-|x|)) */
        y = MAX(SPLAT(0), x) + NAME(log1p)(NAME(exp)(-a));
        break;
    case FL_SCALED_TANH: /* alpha tanh(beta x) */
        y = SPLAT(act->alpha) * NAME(tanh)(x * SPLAT(act->beta));
        break;
    }
    NAME(store)(vector, y);
}

static NOINLINE TARGET void NAME(rare_slope)(const fl_activation *act, REAL *vector)
{
    VEC y = NAME(load)(vector), d = SPLAT(1);
    switch (act->kind) {
    case FL_LINEAR_SIGMOID:
        d = SELECT((UVEC) (y > SPLAT(0)) & (UVEC) (y < SPLAT(1)), SPLAT(act->alpha), SPLAT(0));
        break;
    case FL_ELU: /* alpha exp(x) = y + alpha below 0 */
        d = SELECT(y > SPLAT(0), SPLAT(1), y + SPLAT(act->alpha));
        break;
    case FL_LEAKY_RELU:
        d = SELECT(y > SPLAT(0), SPLAT(1), SPLAT(act->alpha));
        break;
    case FL_SOFTPLUS: /* sigmoid(x) = 1 - exp(-y) */
        d = -NAME(expm1)(-y);
        break;
    case FL_SCALED_TANH: /* beta (alpha - y^2 / alpha) */
        d = y / SPLAT(act->alpha);
        d = SPLAT(act->alpha * act->beta) * (SPLAT(1) - d * d);
        break;
    }
    NAME(store)(vector, d);
}

/* The activations: exact up to the roundings written here. Infinities saturate, NaN gives NaN. */
INLINE VEC NAME(activate)(const fl_activation *act, VEC x)
{
    x = NAME(limit)(x, act->clip);
    VEC a = (VEC) ((UVEC) x & ~((UVEC) {0} + SIGN_BIT));
    REAL vector[LANES];
    switch (act->kind) {
    case FL_TANH:
        return NAME(tanh)(x);
    case FL_SIGMOID:
        return NAME(sigmoid)(x);
    case FL_RELU:
        return MAX(SPLAT(0), x);
    case FL_SOFTSIGN: { /* x / (1 + |x|) */
        a = MIN(SPLAT(1e30), a);
        return (VEC) ((UVEC) (a / (SPLAT(1) + a)) | ((UVEC) x & ((UVEC) {0} + SIGN_BIT)));
    }
    case FL_HARD_TANH: /* min(max(x, -1), 1) */
        return NAME(limit)(x, 1);
    case FL_HARD_SIGMOID: { /* min(max(x + 3, 0), 6) / 6 */
        VEC t = x + SPLAT(3);
        return MIN(SPLAT(6), MAX(SPLAT(0), t)) / SPLAT(6);
    }
    case FL_IDENTITY:
        return x;
    default:
        NAME(store)(vector, x);
        NAME(rare)(act, vector);
        return NAME(load)(vector);
    }
}

/* d activation(x) / dx from y = activation(x). */
INLINE VEC NAME(slope_inside)(const fl_activation *act, VEC y)
{
    VEC a = (VEC) ((UVEC) y & ~((UVEC) {0} + SIGN_BIT));
    REAL vector[LANES];
    switch (act->kind) {
    case FL_TANH: /* 1 - y^2 */
        return SPLAT(1) - y * y;
    case FL_SIGMOID: /* y (1 - y) */
        return y * (SPLAT(1) - y);
    case FL_RELU:
        return SELECT(y > SPLAT(0), SPLAT(1), SPLAT(0));
    case FL_SOFTSIGN: /* (1 - |y|)^2 */
        return (SPLAT(1) - a) * (SPLAT(1) - a);
    case FL_HARD_TANH:
        return SELECT(a < SPLAT(1), SPLAT(1), SPLAT(0));
    case FL_HARD_SIGMOID:
        return SELECT((UVEC) (y > SPLAT(0)) & (UVEC) (y < SPLAT(1)), SPLAT(1) / SPLAT(6), SPLAT(0));
    case FL_IDENTITY:
        return SPLAT(1);
    default:
        NAME(store)(vector, y);
        NAME(rare_slope)(act, vector);
        return NAME(load)(vector);
    }
}

INLINE VEC NAME(slope)(const fl_activation *act, VEC y)
{
    if (act->clip < NO_LIMIT)
        return SELECT((UVEC) (y >= SPLAT(act->high)) | (UVEC) (y <= SPLAT(act->low)), SPLAT(0), NAME(slope_inside)(act, y));
    return NAME(slope_inside)(act, y);
}
