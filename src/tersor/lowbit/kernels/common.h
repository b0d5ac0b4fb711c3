/* What the C kernels share: vectors as wide as this processor's registers, and reading stored numbers. GCC vector
 * extensions keep it portable: wider vectors than the processor has are taken apart into single numbers. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16 /* 32-bit numbers in a vector */
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
enum { BYTES = 4 * LANES, F32 = 0, F16 = 1, BF16 = 2 }; /* types of numbers: FLOAT_TYPES in _build.py */

typedef float vf __attribute__((vector_size(BYTES)));
typedef int32_t vi __attribute__((vector_size(BYTES)));
typedef uint32_t vu __attribute__((vector_size(BYTES)));
typedef float vf_at __attribute__((vector_size(BYTES), aligned(4), may_alias)); /* in memory, anywhere */

#define INLINE static inline __attribute__((always_inline))

INLINE float number(const void *base, int64_t index, int type) {
    if (type == F32) return ((const float *)base)[index];
    if (type == F16) return (float)((const _Float16 *)base)[index];
    uint32_t bits = (uint32_t)((const uint16_t *)base)[index] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
