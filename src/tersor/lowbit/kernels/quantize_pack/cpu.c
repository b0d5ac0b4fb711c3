/* Quantize numbers whose parameters are known and pack the codes, half-split: reference.py is the definition, and every
 * byte equals its own. So each step is the same float32 operation in the same order, and the compiler must not contract
 * a multiplication and an addition into one rounding (-ffp-contract=off).
 */
#include "../common.h"

enum { MAX_DIM = 512 };

typedef struct {
    const void *base;
    int64_t stride[4]; /* in numbers; 0 where the axis is broadcast */
    int32_t type;
} Tensor;

typedef struct {
    int64_t batch, heads, tokens, dim, width, threads;
    Tensor x, minimum, step, scale; /* scale.base is NULL where nothing is divided */
    uint8_t *packed;                /* [batch, heads, tokens, width], contiguous */
    int32_t bits;
} Call;

/* One token's row as float32; a broadcast channel axis repeats its number. */
static void row_of(float *restrict out, const Tensor *t, int64_t sample, int64_t head, int64_t token, int64_t dim) {
    int64_t at = sample * t->stride[0] + head * t->stride[1] + token * t->stride[2], step = t->stride[3];
    if (step == 0) {
        float value = number(t->base, at, t->type);
        for (int64_t c = 0; c < dim; c++) out[c] = value;
    } else if (step == 1 && t->type == F32) {
        memcpy(out, (const float *)t->base + at, (size_t)dim * sizeof(float));
    } else if (t->type == BF16) {
        for (int64_t c = 0; c < dim; c++) out[c] = number(t->base, at + c * step, BF16);
    } else if (t->type == F16) {
        for (int64_t c = 0; c < dim; c++) out[c] = number(t->base, at + c * step, F16);
    } else {
        for (int64_t c = 0; c < dim; c++) out[c] = number(t->base, at + c * step, F32);
    }
}

/* Bits `place` .. `place + plane_bits` of the codes, several to a byte; returns the bytes written. */
static int64_t pack_plane(uint8_t *restrict out, const uint8_t *restrict code, int64_t dim, int plane_bits, int place) {
    const int per_byte = 8 / plane_bits, mask = (1 << plane_bits) - 1;
    const int64_t width = (dim + per_byte - 1) / per_byte;
    for (int64_t byte = 0; byte < width; byte++) out[byte] = code[byte] >> place & mask;
    for (int slot = 1; slot < per_byte; slot++)
        for (int64_t byte = 0; byte < width && slot * width + byte < dim; byte++)
            out[byte] |= (uint8_t)((code[slot * width + byte] >> place & mask) << (slot * plane_bits));
    return width;
}

static void pack_token(const Call *call, int64_t index) {
    const int64_t token = index % call->tokens, head = index / call->tokens % call->heads,
                  sample = index / call->tokens / call->heads, dim = call->dim;
    const float top = (float)((1 << call->bits) - 1);
    float x[MAX_DIM], minimum[MAX_DIM], step[MAX_DIM], scale[MAX_DIM];
    uint8_t code[MAX_DIM];
    row_of(x, &call->x, sample, head, token, dim);
    row_of(minimum, &call->minimum, sample, head, token, dim);
    row_of(step, &call->step, sample, head, token, dim);
    if (call->scale.base) {
        row_of(scale, &call->scale, sample, head, token, dim);
        for (int64_t c = 0; c < dim; c++) x[c] /= scale[c] == 0.0f ? 1.0f : scale[c];
    }
    for (int64_t c = 0; c < dim; c++) {
        float scaled = (x[c] - minimum[c]) / (step[c] == 0.0f ? 1.0f : step[c]);
        float rounded = rintf(scaled); /* half to even, in the default rounding mode */
        rounded = rounded < 0.0f ? 0.0f : rounded > top ? top : rounded;
        code[c] = step[c] == 0.0f ? 0 : (uint8_t)(int)rounded;
    }
    uint8_t *out = call->packed + index * call->width;
    if (call->bits == 3)
        pack_plane(out + pack_plane(out, code, dim, 2, 0), code, dim, 1, 2);
    else
        pack_plane(out, code, dim, call->bits, 0);
}

void quantize_pack(const Call *call) {
#pragma omp parallel for schedule(static) num_threads((int)call->threads)
    for (int64_t index = 0; index < call->batch * call->heads * call->tokens; index++) pack_token(call, index);
}
