/* Column sums of some rows of attention: see reference.py for the definition.
 *
 * A unit of work is a range of one KV head's probe rows (of all its query heads). It brings the head's keys into panels
 * of COLUMNS tokens, channel by channel, once; then a block of rows at a time is multiplied with every panel that it
 * sees, as a matrix product does it: ROWS x COLUMNS scores stay in registers while the channels pass. The scores of a
 * block lie in a scratch of the thread, where each row becomes weights and is added to the sums.
 */
#include "../common.h"
#include <omp.h>

enum { ROWS = LANES == 16 ? 12 : LANES == 8 ? 6 : 4, COLUMNS = 2 * LANES, BLOCK = 4 * ROWS, MAX_DIM = 512 };

typedef struct {
    int64_t batch, kv_heads, group, added, dim, columns, rows, chunks, threads;
    int64_t query_stride[3], key_stride[3], lse_stride[3]; /* numbers a sample, head, token */
    int64_t mask_stride[3];                                /* bytes a sample, probe row, column */
    const void *query;                                     /* [batch, kv_heads * group, added, dim] */
    const void *keys;                                      /* [batch, kv_heads, columns, dim] */
    const int64_t *row;                                    /* [rows], ascending */
    const float *lse;                                      /* [batch, kv_heads * group, added], or NULL */
    const uint8_t *mask;                                   /* bool [batch or 1, rows, columns], or NULL */
    float *scratch;                                        /* [threads, dim + BLOCK, columns in whole panels] */
    float *sums;                                           /* [batch, kv_heads, chunks, columns], zero */
    double scaling;
    int32_t query_type, key_type;
} Call;

/* Keys of one head as panels [columns / COLUMNS, dim, COLUMNS]; tokens behind the last one are zero. */
static void pack_keys(const Call *c, int64_t sample, int64_t head, float *panel) {
    float key[MAX_DIM];
    for (int64_t t = 0; t < c->columns; t++) {
        numbers(key, c->keys, sample * c->key_stride[0] + head * c->key_stride[1] + t * c->key_stride[2], c->dim,
                c->key_type);
        float *out = panel + t / COLUMNS * COLUMNS * c->dim + t % COLUMNS;
        for (int64_t k = 0; k < c->dim; k++) out[k * COLUMNS] = key[k];
    }
    if (c->columns % COLUMNS)
        for (int64_t k = 0; k < c->dim; k++)
            for (int64_t t = c->columns % COLUMNS; t < COLUMNS; t++)
                panel[(c->columns / COLUMNS * c->dim + k) * COLUMNS + t] = 0.0f;
}

/* Scores of ROWS rows and one panel: query is [dim, ROWS], scores have `width` numbers a row. */
INLINE void multiply(const float *query, const float *panel, int64_t dim, float *scores, int64_t width) {
    vf sum[ROWS][2] = {};
    for (int64_t k = 0; k < dim; k++) {
        const vf a = *(const vf_at *)(panel + k * COLUMNS), b = *(const vf_at *)(panel + k * COLUMNS + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
            sum[r][0] += query[k * ROWS + r] * a;
            sum[r][1] += query[k * ROWS + r] * b;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; r++) {
        *(vf_at *)(scores + r * width) = sum[r][0];
        *(vf_at *)(scores + r * width + LANES) = sum[r][1];
    }
}

/* Turn the scores of one row into weights and add them to the sums; a row that holds NaN or infinity adds nothing. */
static void add_row(const Call *c, float *scores, int64_t seen, const uint8_t *open, const float *lse, float *sums) {
    if (open)
        for (int64_t t = 0; t < seen; t++)
            if (!open[t * c->mask_stride[2]]) scores[t] = -INFINITY;
    for (int64_t t = seen; t % LANES; t++) scores[t] = -INFINITY;
    vf top = (vf){} - INFINITY, total = {};
    vi strange = {};
    for (int64_t t = 0; t < seen; t += LANES) {
        const vf x = *(const vf_at *)(scores + t);
        const vi larger = x > top;
        top = (vf)(((vi)x & larger) | ((vi)top & ~larger));
        strange |= x != x;
    }
    float most = -INFINITY;
    int bad = 0;
    for (int lane = 0; lane < LANES; lane++) {
        most = top[lane] > most ? top[lane] : most;
        bad |= strange[lane] != 0;
    }
    if (bad || !(most < INFINITY) || most == -INFINITY) return;
    const float shift = lse ? *lse : most;
    for (int64_t t = 0; t < seen; t += LANES) {
        const vf e = exp_vector(*(const vf_at *)(scores + t) - shift);
        *(vf_at *)(scores + t) = e;
        total += e;
    }
    float whole = 0.0f;
    for (int lane = 0; lane < LANES; lane++) whole += total[lane];
    const float weight = 1.0f / ((float)c->group * (lse ? 1.0f : whole));
    int64_t t = 0;
    for (; t + LANES <= seen; t += LANES) *(vf_at *)(sums + t) += *(const vf_at *)(scores + t) * weight;
    for (; t < seen; t++) sums[t] += scores[t] * weight;
}

/* Rows first..last of the probe rows of one query head. */
static void add_rows(const Call *c, int64_t sample, int64_t head, int64_t first, int64_t last, const float *panel,
                     float *scores, float *sums) {
    float query[BLOCK * MAX_DIM], numbers_of_one[MAX_DIM];
    const int64_t width = (c->columns + COLUMNS - 1) / COLUMNS * COLUMNS, before = c->columns - c->added;
    for (int64_t start = first; start < last; start += BLOCK) {
        const int64_t count = last - start < BLOCK ? last - start : BLOCK;
        const int64_t parts = (count + ROWS - 1) / ROWS;
        memset(query, 0, (size_t)(parts * ROWS * c->dim) * sizeof(float));
        for (int64_t i = 0; i < count; i++) {
            numbers(numbers_of_one, c->query,
                    sample * c->query_stride[0] + head * c->query_stride[1] + c->row[start + i] * c->query_stride[2],
                    c->dim, c->query_type);
            float *out = query + i / ROWS * ROWS * c->dim + i % ROWS;
            for (int64_t k = 0; k < c->dim; k++) out[k * ROWS] = numbers_of_one[k] * (float)c->scaling;
        }
        /* rows ascend, so that none of the block sees more than its last one */
        const int64_t most = c->mask ? c->columns : before + c->row[start + count - 1] + 1;
        for (int64_t t = 0; t < most; t += COLUMNS)
            for (int64_t part = 0; part < parts; part++)
                multiply(query + part * ROWS * c->dim, panel + t * c->dim, c->dim, scores + part * ROWS * width + t,
                         width);
        for (int64_t i = 0; i < count; i++) {
            const int64_t row = c->row[start + i];
            const float *lse = c->lse ? c->lse + sample * c->lse_stride[0] + head * c->lse_stride[1] +
                                            row * c->lse_stride[2]
                                      : NULL;
            const uint8_t *open =
                c->mask ? c->mask + sample * c->mask_stride[0] + (start + i) * c->mask_stride[1] : NULL;
            add_row(c, scores + i * width, c->mask ? c->columns : before + row + 1, open, lse, sums);
        }
    }
}

void probe_sums(const Call *c) {
    const int64_t panels = (c->columns + COLUMNS - 1) / COLUMNS, width = panels * COLUMNS;
    const int64_t units = c->batch * c->kv_heads * c->chunks, all = c->group * c->rows;
#pragma omp parallel for schedule(dynamic) num_threads((int)c->threads)
    for (int64_t unit = 0; unit < units; unit++) {
        const int64_t chunk = unit % c->chunks, head = unit / c->chunks % c->kv_heads;
        const int64_t sample = unit / c->chunks / c->kv_heads;
        float *panel = c->scratch + omp_get_thread_num() * (c->dim + BLOCK) * width;
        const int64_t stop = (chunk + 1) * all / c->chunks;
        pack_keys(c, sample, head, panel);
        for (int64_t at = chunk * all / c->chunks; at < stop;) {
            const int64_t member = at / c->rows, first = at % c->rows;
            const int64_t last = stop - member * c->rows < c->rows ? stop - member * c->rows : c->rows;
            add_rows(c, sample, head * c->group + member, first, last, panel, panel + c->dim * width,
                     c->sums + unit * c->columns);
            at = member * c->rows + last;
        }
    }
}
