/* Causal attention of many tokens, in float32: tiles of GEMM_ROWS queries against panels of LANES_X keys with the product's
 * own inner loop, the softmax carried from one stretch of keys to the next. Included by engine.c after gemm_parts.h. */

#define STRETCH 512 /* keys whose scores are held at once */
#define MOST_DIM 256
#define SCORES_APART (STRETCH + WIDTH) /* as GEMM_APART */
#define QUERIES_APART (MOST_DIM + WIDTH)

/* keys [tokens, dim] of each kv head -> panels [kv head][panel][dim][LANES_X]; keys that are missing are zero. */
static void pack_keys(void *shared) {
    anybit_prefill *job = shared;
    const int64_t panels = (job->position + job->tokens + LANES_X - 1) / LANES_X, items = job->kv_heads * panels;
    for (int64_t item; (item = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed)) < items;) {
        const int64_t first = item % panels * LANES_X, left = job->position + job->tokens - first;
        const float *keys = job->keys + item / panels * job->stride + first * job->dim;
        float *to = job->key_panels + item * job->dim * LANES_X;
        for (int64_t t = 0; t < LANES_X; t++)
            for (int64_t d = 0; d < job->dim; d++) to[d * LANES_X + t] = t < left ? keys[t * job->dim + d] : 0.0f;
    }
}

/* What a tile of queries carries along: the largest score so far, the sum of the powers, the weighted values. */
typedef struct {
    float most[GEMM_ROWS], sum[GEMM_ROWS];
    float scores[GEMM_ROWS][SCORES_APART];
    float values[MOST_DIM / LANES_X][GEMM_ROWS][LANES_X];
} carried;

/* Scores of row r become powers of e: `visible` of `count`, zero beyond; what was summed before shrinks to the new
 * maximum. */
static void soften(carried *c, int r, int64_t visible, int64_t count, int64_t dim) {
    float *row = c->scores[r], most = c->most[r], sum = 0.0f;
    for (int64_t t = 0; t < visible; t++) most = row[t] > most ? row[t] : most;
    for (int64_t t = 0; t < visible; t += LANES) {
        float powers[LANES];
        for (int i = 0; i < LANES; i++) powers[i] = row[t + i] - most;
        exponentials(powers, row + t);
        for (int64_t i = visible - t; i < LANES; i++) row[t + i] = 0.0f;
        for (int i = 0; i < LANES; i++) powers[i] = row[t + i];
        for (int width = LANES / 2; width; width /= 2)
            for (int i = 0; i < width; i++) powers[i] += powers[i + width];
        sum += powers[0];
    }
    for (int64_t t = (visible + LANES - 1) & ~(int64_t)(LANES - 1); t < count; t++) row[t] = 0.0f;
    if (most > c->most[r]) {
        const float smaller = expf(c->most[r] - most);
        c->sum[r] *= smaller;
        for (int64_t d = 0; d < dim; d++) c->values[d / LANES_X][r][d % LANES_X] *= smaller;
        c->most[r] = most;
    }
    c->sum[r] += sum;
}

static void attend_tile(const anybit_prefill *job, int64_t head, int64_t first, int64_t rows, carried *c) {
    const int64_t dim = job->dim, group = head / (job->heads / job->kv_heads), before = job->position + first;
    const int64_t panels = (job->position + job->tokens + LANES_X - 1) / LANES_X;
    const float *keys = job->key_panels + group * panels * dim * LANES_X, *values = job->values + group * job->stride;
    float q[GEMM_ROWS][QUERIES_APART];
    memset(c->values, 0, sizeof c->values);
    for (int64_t r = 0; r < GEMM_ROWS; r++) {
        const float *from = job->q + (first + (r < rows ? r : rows - 1)) * job->ldq + head * dim;
        for (int64_t d = 0; d < dim; d++) q[r][d] = from[d] * job->scaling;
        c->most[r] = -INFINITY;
        c->sum[r] = 0.0f;
    }
    for (int64_t from = 0; from < before + rows; from += STRETCH) {
        const int64_t count = before + rows - from < STRETCH ? before + rows - from : STRETCH;
        for (int64_t t = 0; t < count; t += LANES_X) {
            _Alignas(64) float sums[GEMM_ROWS][LANES_X];
            memset(sums, 0, sizeof sums);
            tile(q[0], QUERIES_APART, keys + (from + t) * dim, LANES_X, dim, sums);
            for (int r = 0; r < GEMM_ROWS; r++) memcpy(c->scores[r] + t, sums[r], sizeof sums[r]);
        }
        for (int r = 0; r < GEMM_ROWS; r++) {
            const int64_t last = r < rows ? r : rows - 1, seen = before + last + 1 - from;
            soften(c, r, seen < 0 ? 0 : seen < count ? seen : count, count, dim);
        }
        for (int64_t d = 0; d < dim; d += LANES_X)
            tile(c->scores[0], SCORES_APART, values + from * dim + d, dim, count, c->values[d / LANES_X]);
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < dim; d++)
            job->out[(first + r) * job->ldo + head * dim + d] = c->values[d / LANES_X][r][d % LANES_X] / c->sum[r];
}

static void attend_many(void *shared) {
    anybit_prefill *job = shared;
    const int64_t tiles = (job->tokens + GEMM_ROWS - 1) / GEMM_ROWS, items = job->heads * tiles;
    _Alignas(64) carried c;
    for (int64_t item; (item = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed)) < items;) {
        const int64_t first = (tiles - 1 - item % tiles) * GEMM_ROWS; /* the long ones first */
        const int64_t rows = job->tokens - first < GEMM_ROWS ? job->tokens - first : GEMM_ROWS;
        attend_tile(job, item / tiles, first, rows, &c);
    }
}
