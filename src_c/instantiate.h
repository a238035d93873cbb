/* Everything for one ISA: float, then double. */

#define REAL float
#define UINT uint32_t
#define IS_FLOAT 1
#define NAME(x) JOIN(x, f32, ISA)
#include "template.h"
#undef REAL
#undef UINT
#undef IS_FLOAT
#undef NAME

#define REAL double
#define UINT uint64_t
#define IS_FLOAT 0
#define NAME(x) JOIN(x, f64, ISA)
#include "template.h"
#undef REAL
#undef UINT
#undef IS_FLOAT
#undef NAME
