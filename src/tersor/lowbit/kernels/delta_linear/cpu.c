/* Products with packed weight deltas, added to the outputs of the base's linear, for one CPU.
 *
 * A code is two bits where a base weight is sixteen, so what bounds this is unpacking, not memory. Therefore:
 *
 *   - a register of packed bytes is shifted, and after each shift one permutation of a small table turns the lowest bits
 *     of every lane into the number that they stand for, `u - zero`. Nothing is masked, widened or interleaved;
 *   - the inputs are laid out once in the order in which shifts meet them, for up to MAX_ROWS rows at a time, and zeros
 *     stand where a row of codes is padded;
 *   - several outputs share each input that is loaded, several rows share each code that is unpacked, and the codes of
 *     the next few outputs are asked for meanwhile, because short rows are no stream that a processor would foresee;
 *   - bfloat16 inputs go through the processor's bfloat16 products where it has them: codes are exact in bfloat16, sums
 *     are float32;
 *   - the step is applied once an output, salient channels are added, and the sum is rounded once.
 */
#include "../common.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define BF16_PRODUCTS 1
#else
#define BF16_PRODUCTS 0
#endif
enum { MAX_ROWS = 8, MAX_OUTS = 8, TILE = 64, TABLE = 32 };

/* PackedDelta in __init__.py; every tensor is contiguous. cpu.py has the same structures. */
typedef struct {
    const uint8_t *codes;   /* [out, width] */
    const void *step;       /* [out] */
    const int32_t *index;   /* [salient] */
    const void *weight;     /* [out, salient] */
    int64_t width, salient;
    float zero;
    int32_t bits, step_type, weight_type;
} Delta;

typedef struct {
    const Delta *delta;
    const int64_t *row;     /* [rows]: which rows of x and y; NULL: all of them, in order */
    int64_t rows, block;    /* number of rows; blocks of MAX_ROWS rows in the groups before this one */
} Group;

typedef struct {
    const void *x;          /* [*, in] */
    void *y;                /* [*, out], added to */
    const Group *group;
    float *spread;          /* [blocks, MAX_ROWS * stride]: inputs in the order of the shifts */
    float *picked;          /* [blocks, MAX_ROWS * most_salient]: inputs of the salient channels */
    int64_t in, out, groups, blocks, stride, most_salient, threads;
    int32_t x_type, y_type;
} Call;

/* A row of 3-bit codes is a 2-bit plane and a 1-bit plane that counts four times; other widths are one plane. */
typedef struct {
    int bits, width;
    int64_t offset;
    float weight, zero;     /* a plane's code u stands for weight * u - zero */
} Plane;

static int planes_of(const Delta *d, int64_t in, Plane plane[2]) {
    if (d->bits != 3) {
        plane[0] = (Plane){d->bits, (int)d->width, 0, 1.0f, d->zero};
        return 1;
    }
    int low = (int)((in + 3) / 4);
    plane[0] = (Plane){2, low, 0, 1.0f, d->zero};
    plane[1] = (Plane){1, (int)d->width - low, low, 4.0f, 0.0f};
    return 2;
}

/* ---- numbers -------------------------------------------------------------------------------------------------- */

INLINE uint16_t to_bf16(float value) { /* to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64); /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE void add_number(void *base, int64_t index, int type, float value) {
    value += number(base, index, type);
    if (type == F32) ((float *)base)[index] = value;
    else if (type == F16) ((_Float16 *)base)[index] = (_Float16)value;
    else ((uint16_t *)base)[index] = to_bf16(value);
}

/* ---- inputs in the order of the shifts ------------------------------------------------------------------------- */

/* Of LANES words of a plane starting at byte `at`, shift `s` shows byte (s * bits) / 8 of each, slot (s * bits) % 8 /
 * bits: with half-split packing that is channel slot * width + at + lane bytes + byte. `word`: bytes of a lane. */
INLINE int64_t spread(void *out, const Call *call, const int64_t *row, int64_t first, int rows, const Plane *plane,
                      const int word, const int lanes) {
    uint16_t *halves = out;
    float *floats = out;
    int64_t place = 0;
    for (int at = 0; at < plane->width; at += word * lanes)
        for (int shift = 0; shift < 8 * word; shift += plane->bits) {
            const int byte = shift / 8, slot = shift % 8 / plane->bits;
            const int64_t channel = (int64_t)slot * plane->width + at + byte;
            /* Channels `word` apart; those behind the plane's or the row's end are zeros. */
            const int64_t behind = plane->width - at - byte, beyond = call->in - channel;
            int64_t real = ((behind < beyond ? behind : beyond) + word - 1) / word;
            real = real < 0 ? 0 : real < lanes ? real : lanes;
            for (int r = 0; r < rows; r++, place += lanes) {
                const int64_t from = (row ? row[first + r] : first + r) * call->in + channel;
                for (int64_t lane = 0; lane < real; lane++)
                    if (word == 2) halves[place + lane] = ((const uint16_t *)call->x)[from + lane * word];
                    else floats[place + lane] = number(call->x, from + lane * word, call->x_type);
                for (int64_t lane = real; lane < lanes; lane++)
                    if (word == 2) halves[place + lane] = 0;
                    else floats[place + lane] = 0.0f;
            }
        }
    return place;
}

/* ---- sums over one plane for `outs` outputs and `rows` rows ------------------------------------------------------ */

INLINE vf code_values(vu x, const float *table, const Plane *plane, int bits) {
#if LANES == 16
    if (bits < 8) /* a permutation reads only four bits of its index */
        return (vf)_mm512_permutexvar_ps((__m512i)x, _mm512_loadu_ps(table));
#endif
    (void)table;
    return __builtin_convertvector((vi)(x & (uint32_t)((1 << bits) - 1)), vf) * plane->weight - plane->zero;
}

INLINE void dot_floats(float *sum, const uint8_t *codes, int64_t stride, const Plane *plane, const float *x,
                       const int bits, const int outs, const int rows) {
    vf total[MAX_OUTS * 2];
    for (int i = 0; i < outs * rows; i++) total[i] = (vf){};
    float table[16];
    for (int i = 0; i < 16; i++) table[i] = plane->weight * (float)(i & ((1 << bits) - 1)) - plane->zero;
    for (int at = 0; at < plane->width; at += BYTES) {
        const int left = plane->width - at < BYTES ? plane->width - at : BYTES;
        vu word[MAX_OUTS];
#pragma GCC unroll 8
        for (int o = 0; o < outs; o++) {
            const uint8_t *from = codes + o * stride + plane->offset + at;
            word[o] = (vu){};
            if (left == BYTES) memcpy(word + o, from, BYTES);
            else memcpy(word + o, from, (size_t)left);
            __builtin_prefetch(from + outs * stride);
        }
#pragma GCC unroll 32
        for (int shift = 0; shift < 32; shift += bits) {
#pragma GCC unroll 8
            for (int o = 0; o < outs; o++) {
                vf code = code_values(word[o], table, plane, bits);
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) total[o * rows + r] += code * *(const vf_at *)(x + r * LANES);
                word[o] >>= bits;
            }
            x += rows * LANES;
        }
    }
    for (int i = 0; i < outs * rows; i++)
        for (int lane = 0; lane < LANES; lane++) sum[i] += total[i][lane];
}

#if BF16_PRODUCTS
INLINE void dot_halves(float *sum, const uint8_t *codes, int64_t stride, const Plane *plane, const float *spread_x,
                       const int bits, const int outs, const int rows) {
    const uint16_t *x = (const uint16_t *)spread_x;
    __m512 total[MAX_OUTS * 2];
    for (int i = 0; i < outs * rows; i++) total[i] = _mm512_setzero_ps();
    uint16_t numbers[TABLE];
    for (int i = 0; i < TABLE; i++)
        numbers[i] = to_bf16(plane->weight * (float)(i & ((1 << bits) - 1)) - plane->zero);
    const __m512i table = _mm512_loadu_si512(numbers);
    for (int at = 0; at < plane->width; at += 64) {
        const int left = plane->width - at;
        const __mmask64 inside = left < 64 ? (1ull << left) - 1 : ~0ull;
        __m512i word[MAX_OUTS];
#pragma GCC unroll 8
        for (int o = 0; o < outs; o++) {
            const uint8_t *from = codes + o * stride + plane->offset + at;
            word[o] = _mm512_maskz_loadu_epi8(inside, from);
            __builtin_prefetch(from + outs * stride);
        }
#pragma GCC unroll 16
        for (int shift = 0; shift < 16; shift += bits) {
#pragma GCC unroll 8
            for (int o = 0; o < outs; o++) { /* the permutation reads the lowest five bits of each index */
                const __m512bh code = (__m512bh)_mm512_permutexvar_epi16(word[o], table);
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++)
                    total[o * rows + r] = _mm512_dpbf16_ps(total[o * rows + r], code,
                                                           (__m512bh)_mm512_loadu_si512(x + r * 32));
                word[o] = _mm512_srli_epi16(word[o], bits);
            }
            x += rows * 32;
        }
    }
    for (int i = 0; i < outs * rows; i++) sum[i] += _mm512_reduce_add_ps(total[i]);
}
#endif

/* ---- one function for each width, number of rows and number of outputs ------------------------------------------- */

typedef void Dot(float *, const uint8_t *, int64_t, const Plane *, const float *);

/* Outputs at a time by number of rows: their sums fill half of the registers. */
static const int OUTS[MAX_ROWS + 1] = {0, 8, 4, 4, 4, 2, 2, 2, 2};

#define SPECIAL(kind, bits, rows, outs)                                                                                \
    static void kind##_##bits##_##rows##_##outs(float *s, const uint8_t *c, int64_t n, const Plane *p, const float *x) { \
        dot_##kind(s, c, n, p, x, bits, outs, rows);                                                                   \
    }
#define EVERY_ROWS(X, kind, bits)                                                                                    \
    X(kind, bits, 1, 8) X(kind, bits, 2, 4) X(kind, bits, 3, 4) X(kind, bits, 4, 4) X(kind, bits, 5, 2)              \
    X(kind, bits, 6, 2) X(kind, bits, 7, 2) X(kind, bits, 8, 2)                                                      \
    X(kind, bits, 1, 1) X(kind, bits, 2, 1) X(kind, bits, 3, 1) X(kind, bits, 4, 1) X(kind, bits, 5, 1)              \
    X(kind, bits, 6, 1) X(kind, bits, 7, 1) X(kind, bits, 8, 1)
#define ENTRY(kind, bits, rows, outs) [rows][outs > 1] = kind##_##bits##_##rows##_##outs,

EVERY_ROWS(SPECIAL, floats, 1) EVERY_ROWS(SPECIAL, floats, 2) EVERY_ROWS(SPECIAL, floats, 4)
EVERY_ROWS(SPECIAL, floats, 8)
/* By bits, rows, and whether OUTS[rows] outputs are computed at once or the last few one by one. */
static Dot *const FLOATS[9][MAX_ROWS + 1][2] = {
    [1] = {EVERY_ROWS(ENTRY, floats, 1)}, [2] = {EVERY_ROWS(ENTRY, floats, 2)},
    [4] = {EVERY_ROWS(ENTRY, floats, 4)}, [8] = {EVERY_ROWS(ENTRY, floats, 8)}};
#if BF16_PRODUCTS
EVERY_ROWS(SPECIAL, halves, 1) EVERY_ROWS(SPECIAL, halves, 2) EVERY_ROWS(SPECIAL, halves, 4)
static Dot *const HALVES[9][MAX_ROWS + 1][2] = {
    [1] = {EVERY_ROWS(ENTRY, halves, 1)}, [2] = {EVERY_ROWS(ENTRY, halves, 2)}, [4] = {EVERY_ROWS(ENTRY, halves, 4)}};
#endif

/* Eight bits and a half have one bit too many for bfloat16. */
static int by_halves(const Call *call, const Delta *d) {
    return BF16_PRODUCTS && call->x_type == BF16 && d->bits < 8;
}

/* ---- blocks of rows and tiles of outputs ------------------------------------------------------------------------- */

static const Group *group_of(const Call *call, int64_t block) {
    const Group *group = call->group + call->groups - 1;
    while (group->block > block) group--;
    return group;
}

static int rows_of(const Group *group, int64_t first) {
    return (int)(group->rows - first < MAX_ROWS ? group->rows - first : MAX_ROWS);
}

static void lay_out(const Call *call, int64_t block) {
    const Group *group = group_of(call, block);
    const Delta *d = group->delta;
    const int64_t first = (block - group->block) * MAX_ROWS;
    const int rows = rows_of(group, first), halves = by_halves(call, d);
    float *out = call->spread + block * MAX_ROWS * call->stride;
    Plane plane[2];
    for (int i = 0, n = planes_of(d, call->in, plane); i < n; i++) {
        int64_t placed = halves ? spread(out, call, group->row, first, rows, plane + i, 2, 32)
                                : spread(out, call, group->row, first, rows, plane + i, 4, LANES);
        out += halves ? placed / 2 : placed;
    }
    float *picked = call->picked + block * MAX_ROWS * call->most_salient;
    for (int r = 0; r < rows; r++) {
        int64_t base = (group->row ? group->row[first + r] : first + r) * call->in;
        for (int64_t k = 0; k < d->salient; k++)
            picked[r * d->salient + k] = number(call->x, base + d->index[k], call->x_type);
    }
}

/* Numbers that the spread inputs of one plane take, for one row. */
INLINE int64_t plane_numbers(const Plane *plane, int halves) {
    int64_t chunks = halves ? (plane->width + 63) / 64 : (plane->width + BYTES - 1) / BYTES;
    return halves ? chunks * (16 / plane->bits) * 16 : chunks * (32 / plane->bits) * LANES;
}

static void add_tile(const Call *call, int64_t block, int64_t tile) {
    const Group *group = group_of(call, block);
    const Delta *d = group->delta;
    const int64_t first = (block - group->block) * MAX_ROWS, last = tile + TILE < call->out ? tile + TILE : call->out;
    const int rows = rows_of(group, first), halves = by_halves(call, d);
    const float *x = call->spread + block * MAX_ROWS * call->stride;
    const float *picked = call->picked + block * MAX_ROWS * call->most_salient;
    Plane plane[2];
    const int planes = planes_of(d, call->in, plane);
    for (int64_t at = tile; at < last;) {
        const int several = last - at >= OUTS[rows], outs = several ? OUTS[rows] : 1;
        float sum[MAX_OUTS * 2] = {0};
        const float *laid = x;
        for (int i = 0; i < planes; i++) {
            Dot *dot = FLOATS[plane[i].bits][rows][several];
#if BF16_PRODUCTS
            if (halves) dot = HALVES[plane[i].bits][rows][several];
#endif
            dot(sum, d->codes + at * d->width, d->width, plane + i, laid);
            laid += rows * plane_numbers(plane + i, halves);
        }
        for (int o = 0; o < outs; o++) {
            const float step = number(d->step, at + o, d->step_type);
            for (int r = 0; r < rows; r++) {
                float value = sum[o * rows + r] * step;
                for (int64_t k = 0; k < d->salient; k++)
                    value += picked[r * d->salient + k] * number(d->weight, (at + o) * d->salient + k, d->weight_type);
                add_number(call->y, (group->row ? group->row[first + r] : first + r) * call->out + at + o,
                           call->y_type, value);
            }
        }
        at += outs;
    }
}

/* Numbers of `Call.stride` for a delta: what one row of inputs takes when it is spread. */
int64_t delta_stride(const Delta *d, int64_t in) {
    Plane plane[2];
    int64_t most = 0;
    for (int halves = 0; halves < 2; halves++) {
        int64_t needed = 0;
        for (int i = 0, n = planes_of(d, in, plane); i < n; i++) needed += plane_numbers(plane + i, halves && d->bits < 8);
        most = needed > most ? needed : most;
    }
    return most;
}

void delta_linear(const Call *call) {
    const int64_t tiles = (call->out + TILE - 1) / TILE;
#pragma omp parallel num_threads((int)call->threads)
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < call->blocks; block++) lay_out(call, block);
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < call->blocks * tiles; unit++)
            add_tile(call, unit / tiles, unit % tiles * TILE);
    }
}
