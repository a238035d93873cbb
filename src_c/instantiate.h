/* The templates for one ISA: float, then double. */

#define REAL float
#define UINT uint32_t
#define IS_FLOAT 1
#define NAME(x) JOIN(x, f32, ISA)
#include "vmath_template.h"
#include "kernel_template.h"
#undef REAL
#undef UINT
#undef IS_FLOAT
#undef NAME
#undef MAGIC
#undef MANTISSA_BITS
#undef ONE_BITS
#undef SIGN_BIT
#undef LN2_HI
#undef LN2_LO
#undef SIGMOID_LIMIT
#undef TANH_LIMIT

#define REAL double
#define UINT uint64_t
#define IS_FLOAT 0
#define NAME(x) JOIN(x, f64, ISA)
#include "vmath_template.h"
#include "kernel_template.h"
#undef REAL
#undef UINT
#undef IS_FLOAT
#undef NAME
#undef MAGIC
#undef MANTISSA_BITS
#undef ONE_BITS
#undef SIGN_BIT
#undef LN2_HI
#undef LN2_LO
#undef SIGMOID_LIMIT
#undef TANH_LIMIT
