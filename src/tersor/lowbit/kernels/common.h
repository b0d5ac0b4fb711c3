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

/* LANES half-precision numbers as floats; a plain loop where no one instruction is named. */
INLINE vf widen_halves(const uint16_t *source, int type) {
#if LANES == 16
    __m256i half = _mm256_loadu_si256((const __m256i *)source);
    return type == F16 ? (vf)_mm512_cvtph_ps(half) : (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#else
    vf x;
    for (int i = 0; i < LANES; i++) x[i] = number(source, i, type);
    return x;
#endif
}

/* `count` numbers of any type as float32. */
static inline void numbers(float *out, const void *base, int64_t index, int64_t count, int type) {
    if (type == F32) {
        memcpy(out, (const float *)base + index, (size_t)count * sizeof(float));
        return;
    }
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        *(vf_at *)(out + i) = widen_halves((const uint16_t *)base + index + i, type);
    for (; i < count; i++) out[i] = number(base, index + i, type);
}

INLINE float dot(const float *a, const float *b, int64_t count) {
    vf sum = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sum += *(const vf_at *)(a + i) * *(const vf_at *)(b + i);
    float total = 0.0f;
    for (int lane = 0; lane < LANES; lane++) total += sum[lane];
    for (; i < count; i++) total += a[i] * b[i];
    return total;
}

/* exp to about 1 ulp: 2^n * e^r with |r| <= ln 2 / 2. Anything below e^-87, -inf included, gives 0. */
INLINE vf exp_vector(vf x) {
    const vf low = (vf){} - 87.0f;
    vi alive = x > low;
    x = (vf)(((vi)x & alive) | ((vi)low & ~alive));
    vf n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f; /* rounds to a whole number */
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    vf power = (vf)((__builtin_convertvector(n, vi) + 127) << 23);
    return (vf)((vi)(y * power) & alive);
}
