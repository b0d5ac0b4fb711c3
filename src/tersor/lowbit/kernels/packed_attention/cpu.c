/* Attention of a few query rows over packed token groups and raw tokens, for one CPU.
 *
 * The algebra is that of reference.py: steps go into the query and into the weights, so both products are "small
 * integer times float". What this file adds is where the numbers lie:
 *
 *   - a unit of work is one KV head of one sample, or a range of its tokens; threads take units;
 *   - tokens pass in tiles that stay in the first-level cache, with a running (maximum, sum, output);
 *   - scores: the words of LANES tokens are transposed, so a register holds the same channels of LANES tokens. Each
 *     shift of it yields one channel of these tokens, which goes into the scores of every query row at once;
 *   - values: LANES bytes of one token are widened; each shift yields LANES neighbouring channels (half-split packing),
 *     which go into the outputs of every query row at once.
 *
 * So a code is unpacked once for all query heads of its group. GCC vector extensions keep it portable: a vector is one
 * register of the processor that this is built for (wider ones the compiler takes apart into single numbers).
 */
#include "../common.h"

enum { TILE = 128, MAX_ROWS = 8, MAX_DIM = 512 };
/* Numbers of one row, padded: a plane may end within a word (scores) or within LANES bytes (values). */
enum { KEY_PAD = MAX_DIM + 64, VALUE_PAD = MAX_DIM + 8 * LANES };

typedef uint32_t vu_at __attribute__((vector_size(BYTES), aligned(1), may_alias));

/* A run of tokens, as Part and Window in __init__.py; every tensor is contiguous. cpu.py has the same structures. */
typedef struct {
    int64_t tokens, slots;                             /* `slots` a head are stored, the first `tokens` are read */
    int64_t key_width, value_width;                    /* bytes a row; numbers a row where raw */
    int64_t value_param_heads, key_factor_heads, value_factor_heads, position_heads, valid_heads; /* 1 or kv_heads */
    const uint8_t *keys, *values;                      /* [batch, kv_heads, slots, width] */
    const void *key_min, *key_step;                    /* [batch, kv_heads, 1, key_dim] */
    const void *value_min, *value_step;                /* [batch, 1 or kv_heads, tokens, 1] */
    const void *scale;                                 /* [batch, kv_heads, 1, value_dim] */
    const void *key_factor, *value_factor;             /* [batch, 1 or kv_heads, tokens], or NULL */
    const int32_t *positions;                          /* [batch, 1 or kv_heads, tokens], or NULL */
    const uint8_t *valid;                              /* bool [batch, 1 or kv_heads, slots], or NULL */
    int32_t key_bits, value_bits;                      /* 2, 3, 4 or 8; 0: raw numbers of `raw_type` */
    int32_t raw_type, key_min_type, key_step_type, value_min_type, value_step_type, scale_type, key_factor_type,
        value_factor_type;
} Part;

typedef struct {
    int64_t batch, kv_heads, group, queries, key_dim, value_dim, parts, splits, threads;
    int64_t sequence, mask_stride[3], bias_width;      /* columns of the mask; bytes a sample, query, column; of the bias */
    const float *query;                                /* [batch, kv_heads, group * queries, key_dim], scaled */
    const Part *part;                                  /* `parts` of them */
    const Part *window;                                /* the newest tokens, or NULL */
    const uint8_t *mask;                               /* bool [batch, queries, sequence], or NULL */
    const float *score_bias;                           /* [batch, kv_heads, group * queries, bias_width], or NULL */
    float *workspace;                                  /* [batch, kv_heads, splits, group * queries, value_dim + 2] */
    float *output;                                     /* [batch, kv_heads, group * queries, value_dim] */
    float *lse;                                        /* [batch, kv_heads, group * queries] */
} Call;

/* A row of 3-bit codes is a 2-bit plane and a 1-bit plane that counts four times; other widths are one plane. */
typedef struct {
    int bits, width;
    int64_t offset;
    float weight;
} Plane;

static int planes_of(int bits, int64_t width, int64_t dim, Plane plane[2]) {
    if (bits != 3) {
        plane[0] = (Plane){bits, (int)width, 0, 1.0f};
        return 1;
    }
    int low = (int)((dim + 3) / 4);
    plane[0] = (Plane){2, low, 0, 1.0f};
    plane[1] = (Plane){1, (int)width - low, low, 4.0f};
    return 2;
}

/* ---- numbers -------------------------------------------------------------------------------------------------- */

/* LANES bytes as words. Where no one instruction is named, a plain loop: GCC 12 takes __builtin_convertvector apart. */
INLINE vu widen_bytes(const uint8_t *source) {
#if LANES == 16
    return (vu)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)source));
#elif LANES == 8
    return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)source));
#else
    vu x;
    for (int i = 0; i < LANES; i++) x[i] = source[i];
    return x;
#endif
}

/* The lowest `bits` bits of each lane as a float. */
INLINE vf code_floats(vu x, int bits) {
#if LANES == 16
    if (bits < 8) { /* a permutation reads only four bits of its index, so one table both masks and converts */
        const vf four = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const vf two = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
        const vf one = {0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1};
        return (vf)_mm512_permutexvar_ps((__m512i)x, (__m512)(bits == 4 ? four : bits == 2 ? two : one));
    }
#endif
    return __builtin_convertvector((vi)(x & (uint32_t)((1 << bits) - 1)), vf);
}

/* ---- scores of LANES tokens ------------------------------------------------------------------------------------ */

#define SWAP(d, count)                                             \
    for (int i = 0; i < count; i++)                                \
        if (!(i & d)) {                                            \
            vu a = word[i], b = word[i + d];                       \
            word[i] = __builtin_shufflevector(a, b, LOW_##d);      \
            word[i + d] = __builtin_shufflevector(a, b, HIGH_##d); \
        }
#if LANES == 16
#define LOW_8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH_8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define LOW_4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define HIGH_4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define LOW_2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH_2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define LOW_1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define HIGH_1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#elif LANES == 8
#define LOW_4 0, 1, 2, 3, 8, 9, 10, 11
#define HIGH_4 4, 5, 6, 7, 12, 13, 14, 15
#define LOW_2 0, 1, 8, 9, 4, 5, 12, 13
#define HIGH_2 2, 3, 10, 11, 6, 7, 14, 15
#define LOW_1 0, 8, 2, 10, 4, 12, 6, 14
#define HIGH_1 1, 9, 3, 11, 5, 13, 7, 15
#else
#define LOW_2 0, 1, 4, 5
#define HIGH_2 2, 3, 6, 7
#define LOW_1 0, 4, 2, 6
#define HIGH_1 1, 5, 3, 7
#endif

/* Up to BYTES bytes of LANES rows as words: word[j] lane t is the j-th word of row t. Exchanging off-diagonal quarters
 * of ever smaller blocks transposes. */
INLINE void load_words(vu word[LANES], const uint8_t *const *row, int64_t offset, int bytes) {
#if LANES == 16
    if (bytes == 32) { /* two bits at 128 channels: row t and row t + 8 share a register */
        typedef uint32_t half __attribute__((vector_size(32), aligned(1), may_alias));
#pragma GCC unroll 8
        for (int t = 0; t < 8; t++)
            word[t] = __builtin_shufflevector(*(const half *)(row[t] + offset), *(const half *)(row[t + 8] + offset), 0, 1,
                                              2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 8
        SWAP(4, 8)
#pragma GCC unroll 8
        SWAP(2, 8)
#pragma GCC unroll 8
        SWAP(1, 8)
        return;
    }
#endif
    if (bytes == BYTES) {
#pragma GCC unroll 16
        for (int t = 0; t < LANES; t++) word[t] = *(const vu_at *)(row[t] + offset);
    } else {
        for (int t = 0; t < LANES; t++) {
            word[t] = (vu){};
            memcpy(word + t, row[t] + offset, (size_t)bytes);
        }
    }
#if LANES == 16
#pragma GCC unroll 16
    SWAP(8, LANES)
#endif
#if LANES >= 8
#pragma GCC unroll 16
    SWAP(4, LANES)
#endif
#pragma GCC unroll 16
    SWAP(2, LANES)
#pragma GCC unroll 16
    SWAP(1, LANES)
}

/* Add this plane's products to the scores of LANES tokens; `query` from spread_query. */
INLINE void score_plane(vf *score, const uint8_t *const *row, const Plane *plane, const float *query, int bits, int rows) {
    vf sum[MAX_ROWS];
    for (int r = 0; r < rows; r++) sum[r] = score[r];
    for (int at = 0; at < plane->width; at += BYTES) {
        int bytes = plane->width - at < BYTES ? plane->width - at : BYTES;
        vu word[LANES];
        load_words(word, row, plane->offset + at, bytes);
        for (int j = 0; j < (bytes + 3) / 4; j++) {
            vu x = word[j];
#pragma GCC unroll 32
            for (int k = 0; k < 32 / bits; k++) {
                vf code = code_floats(x, bits);
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) sum[r] += code * query[r];
                query += rows;
                x >>= bits;
            }
        }
    }
    for (int r = 0; r < rows; r++) score[r] = sum[r];
}

/* Query rows times key steps, in the order in which score_plane meets the channels: word, then shift. */
static void spread_query(float *out, const float *stepped, int64_t dim, const Plane *plane, int rows) {
    int per_byte = 8 / plane->bits;
    for (int word = 0; word < plane->width; word += 4)
        for (int i = 0; i < 4; i++)
            for (int slot = 0; slot < per_byte; slot++)
                for (int r = 0; r < rows; r++) {
                    int byte = word + i, channel = byte + slot * plane->width;
                    *out++ = byte < plane->width && channel < dim ? stepped[r * dim + channel] * plane->weight : 0.0f;
                }
}

/* ---- values of a tile ----------------------------------------------------------------------------------------- */

/* LANES bytes as words; bytes at or behind `end` are zeros. */
INLINE vu widen(const uint8_t *byte, const uint8_t *end) {
    if (__builtin_expect(end - byte >= LANES, 1)) return widen_bytes(byte);
    uint8_t last[LANES] = {0};
    memcpy(last, byte, (size_t)(end - byte));
    return widen_bytes(last);
}

INLINE int padded(int width) { return (width + LANES - 1) / LANES * LANES; }

/* Add weight[r][t] * code to out[slot][r][byte] over `count` tokens. */
INLINE void value_plane(float *out, const uint8_t *row, int64_t stride, const uint8_t *end, int count, const Plane *plane,
                        const float *weight, int bits, int rows) {
    const int slots = 8 / bits, together = slots > 1 ? 2 : 1, width = padded(plane->width);
    for (int at = 0; at < plane->width; at += LANES)
        for (int slot = 0; slot < slots; slot += together) { /* two slots of eight rows fill the registers */
            vf sum[2 * MAX_ROWS];
            float *place = out + (int64_t)slot * rows * width + at;
#pragma GCC unroll 16
            for (int i = 0; i < together * rows; i++) sum[i] = *(vf_at *)(place + i * width);
            for (int t = 0; t < count; t++) {
                vu x = widen(row + t * stride + plane->offset + at, end) >> (bits * slot);
#pragma GCC unroll 2
                for (int s = 0; s < together; s++) {
                    vf code = code_floats(x, bits);
#pragma GCC unroll 8
                    for (int r = 0; r < rows; r++) sum[s * rows + r] += code * weight[r * TILE + t];
                    x >>= bits;
                }
            }
#pragma GCC unroll 16
            for (int i = 0; i < together * rows; i++) *(vf_at *)(place + i * width) = sum[i];
        }
}

/* ---- one function for each width and number of rows ------------------------------------------------------------ */

typedef void Score(vf *, const uint8_t *const *, const Plane *, const float *);
typedef void Value(float *, const uint8_t *, int64_t, const uint8_t *, int, const Plane *, const float *);

#define SPECIAL(bits, rows)                                                                                        \
    static void score_##bits##_##rows(vf *s, const uint8_t *const *row, const Plane *p, const float *q) {          \
        score_plane(s, row, p, q, bits, rows);                                                                     \
    }                                                                                                              \
    static void value_##bits##_##rows(float *o, const uint8_t *row, int64_t stride, const uint8_t *end, int count, \
                                      const Plane *p, const float *w) {                                            \
        value_plane(o, row, stride, end, count, p, w, bits, rows);                                                 \
    }
#define EVERY_ROWS(X, bits) X(bits, 1) X(bits, 2) X(bits, 3) X(bits, 4) X(bits, 5) X(bits, 6) X(bits, 7) X(bits, 8)
EVERY_ROWS(SPECIAL, 1) EVERY_ROWS(SPECIAL, 2) EVERY_ROWS(SPECIAL, 4) EVERY_ROWS(SPECIAL, 8)
#define SCORE_ROW(bits, rows) score_##bits##_##rows,
#define VALUE_ROW(bits, rows) value_##bits##_##rows,
static Score *const SCORE[9][MAX_ROWS] = {[1] = {EVERY_ROWS(SCORE_ROW, 1)}, [2] = {EVERY_ROWS(SCORE_ROW, 2)},
                                          [4] = {EVERY_ROWS(SCORE_ROW, 4)}, [8] = {EVERY_ROWS(SCORE_ROW, 8)}};
static Value *const VALUE[9][MAX_ROWS] = {[1] = {EVERY_ROWS(VALUE_ROW, 1)}, [2] = {EVERY_ROWS(VALUE_ROW, 2)},
                                          [4] = {EVERY_ROWS(VALUE_ROW, 4)}, [8] = {EVERY_ROWS(VALUE_ROW, 8)}};

/* ---- the running state of a unit's rows ------------------------------------------------------------------------ */

typedef struct {
    const Call *call;
    int64_t sample, head, first_row;
    int rows;
    const float *query;      /* [rows, key_dim] */
    float *peak, *total;     /* [rows] */
    float *output;           /* rows of value_dim, `stride` apart, relative to exp(peak) */
    int64_t stride;
} Unit;

/* Turn the scores of a tile into weights exp(score - peak); earlier sums decay where the peak rises.
 * score, weight: [rows][TILE]. decay[r] is what else is relative to the old peak must be multiplied by. */
static void soften(Unit *u, float *score, int count, float *decay) {
    for (int r = 0; r < u->rows; r++) {
        float *row = score + r * TILE, peak = u->peak[r];
        for (int t = 0; t < count; t++) peak = row[t] > peak ? row[t] : peak;
        for (int t = count; t < padded(count); t++) row[t] = -INFINITY;
        /* A row that has seen no open token yet keeps -inf; shift by 0 there, so that exp gives 0, not NaN. */
        float shift = peak == -INFINITY ? 0.0f : peak;
        decay[r] = u->peak[r] == peak ? 1.0f : expf(u->peak[r] - shift);
        vf sum = {};
        for (int t = 0; t < count; t += LANES) {
            vf weight = exp_vector(*(vf_at *)(row + t) - shift);
            *(vf_at *)(row + t) = weight;
            sum += weight;
        }
        float total = 0.0f;
        for (int i = 0; i < LANES; i++) total += sum[i];
        u->total[r] = u->total[r] * decay[r] + total;
        u->peak[r] = peak;
        if (decay[r] != 1.0f)
            for (int64_t c = 0; c < u->call->value_dim; c++) u->output[r * u->stride + c] *= decay[r];
    }
}

/* Factors per token, added scores, closed tokens: score[r][t] for tokens first .. first + count. */
static void adjust(const Unit *u, const Part *p, float *score, int64_t first, int count) {
    const Call *call = u->call;
    if (p->key_factor) {
        float factor[TILE];
        int64_t heads = p->key_factor_heads, head = heads == 1 ? 0 : u->head;
        numbers(factor, p->key_factor, (u->sample * heads + head) * p->tokens + first, count, p->key_factor_type);
        for (int r = 0; r < u->rows; r++)
            for (int t = 0; t < count; t++) score[r * TILE + t] *= factor[t];
    }
    const int64_t heads = p->position_heads, place = u->sample * heads + (heads == 1 ? 0 : u->head);
    const int32_t *position = p->positions ? p->positions + place * p->tokens + first : NULL;
    if (call->score_bias && position)
        for (int r = 0; r < u->rows; r++) {
            const int64_t head = u->sample * call->kv_heads + u->head;
            const float *add =
                call->score_bias + (head * call->group * call->queries + u->first_row + r) * call->bias_width;
            for (int t = 0; t < count; t++) score[r * TILE + t] += add[position[t]];
        }
    if (p->valid) {
        const int64_t own = u->sample * p->valid_heads + (p->valid_heads == 1 ? 0 : u->head);
        const uint8_t *valid = p->valid + own * p->slots + first;
        for (int t = 0; t < count; t++)
            if (!valid[t])
                for (int r = 0; r < u->rows; r++) score[r * TILE + t] = -INFINITY;
    }
    if (p != call->window && !(call->mask && position)) return;
    const int64_t end = call->sequence - p->tokens + first; /* the column of a window's token `first` */
    for (int r = 0; r < u->rows; r++) {
        const int64_t query = (u->first_row + r) % call->queries;
        if (!call->mask) { /* a query sees no later token */
            for (int64_t t = p->tokens - call->queries + query + 1 - first; t < count; t++)
                if (t >= 0) score[r * TILE + t] = -INFINITY;
            continue;
        }
        const uint8_t *open = call->mask + u->sample * call->mask_stride[0] + query * call->mask_stride[1];
        for (int t = 0; t < count; t++)
            if (!open[(position ? position[t] : end + t) * call->mask_stride[2]]) score[r * TILE + t] = -INFINITY;
    }
}

static void weigh_factor(const Unit *u, const Part *p, float *weight, int64_t first, int count) {
    if (!p->value_factor) return;
    float factor[TILE];
    int64_t heads = p->value_factor_heads, head = heads == 1 ? 0 : u->head;
    numbers(factor, p->value_factor, (u->sample * heads + head) * p->tokens + first, count, p->value_factor_type);
    for (int r = 0; r < u->rows; r++)
        for (int t = 0; t < count; t++) weight[r * TILE + t] *= factor[t];
}

/* ---- the two kinds of parts ------------------------------------------------------------------------------------ */

static void attend_packed(Unit *u, const Part *p, int64_t first, int64_t last) {
    const Call *call = u->call;
    const int64_t dim = call->key_dim, out_dim = call->value_dim, head = u->sample * call->kv_heads + u->head;
    const int rows = u->rows;
    Plane key_plane[2], value_plane[2];
    int key_planes = planes_of(p->key_bits, p->key_width, dim, key_plane);
    int value_planes = planes_of(p->value_bits, p->value_width, out_dim, value_plane);

    float number_row[MAX_DIM], stepped[MAX_ROWS * MAX_DIM], bias[MAX_ROWS] = {0};
    numbers(number_row, p->key_min, head * dim, dim, p->key_min_type);
    for (int r = 0; r < rows; r++)
        for (int64_t c = 0; c < dim; c++) bias[r] += u->query[r * dim + c] * number_row[c];
    numbers(number_row, p->key_step, head * dim, dim, p->key_step_type);
    for (int r = 0; r < rows; r++)
        for (int64_t c = 0; c < dim; c++) stepped[r * dim + c] = u->query[r * dim + c] * number_row[c];
    float spread[2][MAX_ROWS * KEY_PAD];
    for (int i = 0; i < key_planes; i++) spread_query(spread[i], stepped, dim, key_plane + i, rows);

    float sum[2][MAX_ROWS * VALUE_PAD], minima[MAX_ROWS] = {0};
    int64_t held[2];
    for (int i = 0; i < value_planes; i++) {
        held[i] = (int64_t)(8 / value_plane[i].bits) * rows * padded(value_plane[i].width);
        memset(sum[i], 0, (size_t)held[i] * sizeof(float));
    }
    const uint8_t *keys = p->keys + head * p->tokens * p->key_width;
    const uint8_t *values = p->values + head * p->tokens * p->value_width;
    const uint8_t *end = p->values + call->batch * call->kv_heads * p->tokens * p->value_width;
    const int64_t param_head = p->value_param_heads == 1 ? u->sample : head;

    float tile[MAX_ROWS * TILE], step[TILE], minimum[TILE], decay[MAX_ROWS];
    for (int64_t at = first; at < last; at += TILE) {
        int count = (int)(last - at < TILE ? last - at : TILE);
        for (int t = 0; t < count; t += LANES) {
            const uint8_t *row[LANES];
            for (int i = 0; i < LANES; i++) { /* behind the end the last token stands in; its scores are not used */
                int64_t token = at + t + i < last ? at + t + i : last - 1;
                row[i] = keys + token * p->key_width;
            }
            vf score[MAX_ROWS];
            for (int r = 0; r < rows; r++) score[r] = (vf){} + bias[r];
            for (int i = 0; i < key_planes; i++)
                SCORE[key_plane[i].bits][rows - 1](score, row, key_plane + i, spread[i]);
            for (int r = 0; r < rows; r++) *(vf_at *)(tile + r * TILE + t) = score[r];
        }
        adjust(u, p, tile, at, count);
        soften(u, tile, count, decay);
        weigh_factor(u, p, tile, at, count);
        numbers(step, p->value_step, param_head * p->tokens + at, count, p->value_step_type);
        numbers(minimum, p->value_min, param_head * p->tokens + at, count, p->value_min_type);
        for (int r = 0; r < rows; r++) {
            float *weight = tile + r * TILE, extra = 0.0f;
            for (int t = 0; t < count; t++) extra += weight[t] * minimum[t];
            for (int t = 0; t < count; t++) weight[t] *= step[t];
            minima[r] = minima[r] * decay[r] + extra;
        }
        for (int i = 0; i < value_planes; i++) {
            int slots = 8 / value_plane[i].bits, width = padded(value_plane[i].width);
            for (int r = 0; r < rows; r++)
                if (decay[r] != 1.0f)
                    for (int s = 0; s < slots; s++)
                        for (int c = 0; c < width; c++) sum[i][(s * rows + r) * width + c] *= decay[r];
            VALUE[value_plane[i].bits][rows - 1](sum[i], values + at * p->value_width, p->value_width, end, count,
                                                 value_plane + i, tile);
        }
    }

    numbers(number_row, p->scale, head * out_dim, out_dim, p->scale_type);
    for (int r = 0; r < rows; r++)
        for (int64_t c = 0; c < out_dim; c++) {
            float code = 0.0f;
            for (int i = 0; i < value_planes; i++) {
                int64_t slot = c / value_plane[i].width, byte = c % value_plane[i].width;
                code += value_plane[i].weight * sum[i][(slot * rows + r) * padded(value_plane[i].width) + byte];
            }
            u->output[r * u->stride + c] += number_row[c] * (code + minima[r]);
        }
}

static void attend_raw(Unit *u, const Part *p, int64_t first, int64_t last) {
    const Call *call = u->call;
    const int64_t dim = call->key_dim, out_dim = call->value_dim, head = u->sample * call->kv_heads + u->head;
    float number_row[MAX_DIM], tile[MAX_ROWS * TILE], decay[MAX_ROWS];
    for (int64_t at = first; at < last; at += TILE) {
        int count = (int)(last - at < TILE ? last - at : TILE);
        for (int t = 0; t < count; t++) {
            numbers(number_row, p->keys, (head * p->slots + at + t) * dim, dim, p->raw_type);
            for (int r = 0; r < u->rows; r++) {
                tile[r * TILE + t] = dot(u->query + r * dim, number_row, dim);
            }
        }
        adjust(u, p, tile, at, count);
        soften(u, tile, count, decay); /* decays the output too, which is all that there is here */
        weigh_factor(u, p, tile, at, count);
        for (int t = 0; t < count; t++) {
            numbers(number_row, p->values, (head * p->slots + at + t) * out_dim, out_dim, p->raw_type);
            for (int r = 0; r < u->rows; r++) {
                float weight = tile[r * TILE + t], *output = u->output + r * u->stride;
                for (int64_t c = 0; c < out_dim; c++) output[c] += weight * number_row[c];
            }
        }
    }
}

/* ---- all of it -------------------------------------------------------------------------------------------------- */

/* Where split `index` of `splits` begins among `tokens`; on a whole vector, so that blocks stay whole. */
INLINE int64_t split_begin(int64_t tokens, int64_t index, int64_t splits) {
    if (index == splits) return tokens;
    return tokens * index / splits / LANES * LANES;
}

static void attend_unit(const Call *call, int64_t index) {
    const int64_t all_rows = call->group * call->queries, width = call->value_dim + 2;
    const int64_t split = index % call->splits, head = index / call->splits;
    float *state = call->workspace + index * all_rows * width;
    int64_t tokens = call->window ? call->window->tokens : 0;
    for (int64_t i = 0; i < call->parts; i++) tokens += call->part[i].tokens;
    const int64_t begin = split_begin(tokens, split, call->splits), end = split_begin(tokens, split + 1, call->splits);

    for (int64_t row = 0; row < all_rows; row += MAX_ROWS) {
        float peak[MAX_ROWS], total[MAX_ROWS] = {0};
        Unit u = {.call = call, .sample = head / call->kv_heads, .head = head % call->kv_heads, .first_row = row,
                  .rows = (int)(all_rows - row < MAX_ROWS ? all_rows - row : MAX_ROWS),
                  .query = call->query + (head * all_rows + row) * call->key_dim,
                  .peak = peak, .total = total, .output = state + row * width + 2, .stride = width};
        for (int r = 0; r < u.rows; r++) {
            peak[r] = -INFINITY;
            memset(u.output + r * width, 0, (size_t)call->value_dim * sizeof(float));
        }
        int64_t before = 0;
        for (int64_t i = 0; i < call->parts + (call->window != NULL); i++) {
            const Part *p = i < call->parts ? call->part + i : call->window;
            int64_t first = begin > before ? begin - before : 0, last = end - before < p->tokens ? end - before : p->tokens;
            if (first < last) (p->key_bits ? attend_packed : attend_raw)(&u, p, first, last);
            before += p->tokens;
        }
        for (int r = 0; r < u.rows; r++) {
            state[(row + r) * width] = peak[r];
            state[(row + r) * width + 1] = total[r];
        }
    }
}

/* Merge the splits of one KV head by log-sum-exp. */
static void merge_splits(const Call *call, int64_t head) {
    const int64_t all_rows = call->group * call->queries, width = call->value_dim + 2, stride = all_rows * width;
    for (int64_t row = 0; row < all_rows; row++) {
        const float *state = call->workspace + head * call->splits * stride + row * width;
        float peak = -INFINITY, total = 0.0f;
        for (int64_t s = 0; s < call->splits; s++) peak = state[s * stride] > peak ? state[s * stride] : peak;
        float *output = call->output + (head * all_rows + row) * call->value_dim;
        memset(output, 0, (size_t)call->value_dim * sizeof(float));
        for (int64_t s = 0; s < call->splits; s++) {
            const float *part = state + s * stride;
            if (part[0] == -INFINITY) continue;
            float share = expf(part[0] - peak);
            total += share * part[1];
            for (int64_t c = 0; c < call->value_dim; c++) output[c] += share * part[2 + c];
        }
        for (int64_t c = 0; c < call->value_dim; c++) output[c] = total > 0.0f ? output[c] / total : 0.0f;
        call->lse[head * all_rows + row] = total > 0.0f ? peak + logf(total) : -INFINITY;
    }
}

void packed_attention(const Call *call) {
    const int64_t heads = call->batch * call->kv_heads;
#pragma omp parallel for schedule(dynamic) num_threads((int)call->threads)
    for (int64_t index = 0; index < heads * call->splits; index++) attend_unit(call, index);
    for (int64_t head = 0; head < heads; head++) merge_splits(call, head);
}
