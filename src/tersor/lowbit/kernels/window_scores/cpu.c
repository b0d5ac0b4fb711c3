/* Attention of new tokens to the tokens of a window: see reference.py for the definition. One core: a window is short. */
#include "../common.h"

enum { MAX_DIM = 512 };

typedef struct {
    int64_t index, row, fold; /* the query, the row of `steps` to write, whether it holds an older step */
} Place;

typedef struct {
    int64_t batch, kv_heads, group, queries, dim, slots, tokens, rows, scopes, places, sequence;
    int64_t query_stride[3]; /* numbers a sample, head, query */
    int64_t mask_stride[3];  /* bytes a sample, query, column */
    const void *query;       /* [batch, kv_heads * group, queries, dim] */
    const void *keys;        /* [batch, kv_heads, slots, dim] */
    const float *lse;        /* [batch, kv_heads * group, queries] */
    float *steps;            /* [batch, rows, scopes + 1, slots] */
    const Place *place;
    const uint8_t *mask;     /* or NULL */
    double scaling;
    int32_t query_type, key_type;
} Call;

/* Add one KV head's share of one query's attention to `out`, over the window's first `seen` tokens. */
static void add_head(const Call *c, int64_t sample, int64_t head, int64_t index, int64_t seen, float *out) {
    float query[MAX_DIM], key[MAX_DIM];
    const float share = 1.0f / (float)(c->scopes == 1 ? c->group * c->kv_heads : c->group);
    for (int64_t g = 0; g < c->group; g++) {
        const int64_t own = head * c->group + g;
        numbers(query, c->query,
                sample * c->query_stride[0] + own * c->query_stride[1] + index * c->query_stride[2], c->dim,
                c->query_type);
        for (int64_t i = 0; i < c->dim; i++) query[i] *= (float)c->scaling;
        const float lse = c->lse[(sample * c->kv_heads * c->group + own) * c->queries + index];
        for (int64_t t = 0; t < seen; t++) {
            const int64_t at = ((sample * c->kv_heads + head) * c->slots + t) * c->dim;
            const float *row = (const float *)c->keys + at;
            if (c->key_type != F32) {
                numbers(key, c->keys, at, c->dim, c->key_type);
                row = key;
            }
            out[t] += share * expf(dot(query, row, c->dim) - lse);
        }
    }
}

void window_scores(const Call *c) {
    const int64_t width = (c->scopes + 1) * c->slots;
    for (int64_t sample = 0; sample < c->batch; sample++) {
        float *steps = c->steps + sample * c->rows * width;
        for (int64_t p = 0; p < c->places; p++) {
            const Place place = c->place[p];
            float *row = steps + place.row * width;
            const int64_t seen = c->tokens - c->queries + place.index + 1;
            if (place.fold)
                for (int64_t i = 0; i < width; i++) steps[i] += row[i];
            memset(row, 0, (size_t)width * sizeof(float));
            for (int64_t head = 0; head < c->kv_heads; head++)
                add_head(c, sample, head, place.index, seen, row + (c->scopes == 1 ? 0 : head * c->slots));
            for (int64_t t = 0; t < seen; t++) row[c->scopes * c->slots + t] = 1.0f;
            if (!c->mask) continue;
            const uint8_t *open = c->mask + sample * c->mask_stride[0] + place.index * c->mask_stride[1] +
                                  (c->sequence - c->tokens) * c->mask_stride[2];
            for (int64_t t = 0; t < seen; t++)
                if (!open[t * c->mask_stride[2]])
                    for (int64_t scope = 0; scope < c->scopes; scope++) row[scope * c->slots + t] = 0.0f;
        }
    }
}
