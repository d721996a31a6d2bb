/* Products of many tokens: rows of W are decoded into a small buffer that stays in the second-level cache and meet x,
 * which is packed once so that a vector holds one input of WIDTH tokens. Included by engine.c once for each instruction
 * set. Every sum is a float32 sum over the inputs in order; the reference weight is formed as everywhere else. */

#if WIDTH == 16
#define GEMM_ROWS 14 /* 28 accumulators of 32 registers */
#else
#define GEMM_ROWS 6 /* 12 of 16 */
#endif
#define LANES_X (2 * WIDTH) /* tokens of a panel */
#define GEMM_PIECE 1024     /* columns at once: what is decoded stays near */
#define GEMM_TILES 4        /* times GEMM_ROWS rows an item has at most: x, which is larger, is read once for all */
#define GEMM_APART (GEMM_PIECE + WIDTH) /* from row to row: a power of two would put all rows in one set of the cache */

#define PACK_PIECE 128 /* columns whose place in a panel stays in the first-level cache */

/* `count` inputs of a token from column `from`, as the job wants them: as they are, normed, or gated. */
static const float *inputs(const anybit_gemm *job, int64_t token, float factor, int64_t from, int64_t count,
                           float *row) {
    const float *x = (const float *)job->x + token * job->ldx + from;
    if (job->x_format != ANYBIT_F32) {
        to_float(job->x_format, (const uint16_t *)job->x + token * job->ldx + from, count, row);
        return row;
    }
    if (job->norm) {
        for (int64_t k = 0; k < count; k++) row[k] = job->norm[from + k] * (x[k] * factor);
        return row;
    }
    if (!job->is_gated) return x;
    silu_gate(x, x + job->w->cols, count, row);
    return row;
}

/* x [tokens, cols] -> panels of LANES_X tokens, [panel][cols][LANES_X]; tokens that are missing are zero. */
static void pack_panel(const anybit_gemm *job, int64_t panel) {
    const int64_t first = panel * LANES_X, cols = job->w->cols;
    const int64_t tokens = job->tokens - first < LANES_X ? job->tokens - first : LANES_X;
    float *to = job->panels + panel * cols * LANES_X;
    if (tokens < LANES_X) memset(to, 0, (size_t)(cols * LANES_X) * sizeof(float));
    float row[PACK_PIECE + 16], factor[LANES_X] = {0};
    for (int64_t t = 0; job->norm && t < tokens; t++)
        factor[t] = norm_factor((const float *)job->x + (first + t) * job->ldx, job->eps, cols);
    for (int64_t from = 0; from < cols; from += PACK_PIECE) {
        const int64_t count = cols - from < PACK_PIECE ? cols - from : PACK_PIECE;
        for (int64_t t = 0; t < tokens; t++) {
            const float *x = inputs(job, first + t, factor[t], from, count, row);
            float *out = to + from * LANES_X + t;
            for (int64_t k = 0; k < count; k++) out[k * LANES_X] = x[k];
        }
    }
}

static void pack(void *shared) {
    anybit_gemm *job = shared;
    for (int64_t p; (p = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed)) < job->panel_count;)
        pack_panel(job, p);
}

/* sums[r][t] += w[r] x: `count` columns of GEMM_ROWS rows (`apart` numbers apart) against LANES_X numbers a column. */
INLINE void tile(const float *w, const int64_t apart, const float *panel, const int64_t stride, int64_t count,
                 float (*sums)[LANES_X]) {
    vec acc[GEMM_ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < GEMM_ROWS; r++) {
        acc[r][0] = load(sums[r]);
        acc[r][1] = load(sums[r] + WIDTH);
    }
    for (int64_t k = 0; k < count; k++) {
        const vec x0 = load(panel + k * stride), x1 = load(panel + k * stride + WIDTH);
#pragma GCC unroll 16
        for (int r = 0; r < GEMM_ROWS; r++) {
            const vec v = splat(w[r * apart + k]);
            acc[r][0] = fused(v, x0, acc[r][0]);
            acc[r][1] = fused(v, x1, acc[r][1]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < GEMM_ROWS; r++) {
        store(sums[r], acc[r][0]);
        store(sums[r] + WIDTH, acc[r][1]);
    }
}

/* Columns of some rows, at most GEMM_ROWS; the rest of the tile repeats the last. */
static void decode_piece(const anybit_weight *w, const instance *f, int64_t row, int64_t rows, int64_t from,
                         int64_t columns, float *buffer) {
    const int64_t blocks = columns / BLOCK, rest = columns % BLOCK;
    pieces p;
    p.all = &f->all;
    for (int64_t r = 0; r < GEMM_ROWS; r += ROWS) {
        int64_t some[ROWS];
        for (int i = 0; i < ROWS; i++) some[i] = row + (r + i < rows ? r + i : rows - 1);
        fetch(w, some, ROWS, from, columns, f->unit, 0, &p);
        for (int i = 0; i < ROWS && r + i < GEMM_ROWS; i++) {
            float *out = buffer + (r + i) * GEMM_APART;
            f->expand(w, &p, i, 0, blocks, out);
            if (rest) expand_tail(w, f, &p, i, blocks, rest, out + blocks * BLOCK);
        }
    }
}

static void put_tile(const anybit_gemm *job, int64_t row, int64_t rows, int64_t panel, float (*sums)[LANES_X]) {
    const int64_t first = panel * LANES_X, end = job->tokens - first < LANES_X ? job->tokens - first : LANES_X;
    float bias[GEMM_ROWS];
    for (int64_t r = 0; r < rows; r++) {
        if (job->w->factor.data) {
            const float factor = row_factor(job->w, row + r);
            for (int64_t t = 0; t < end; t++) sums[r][t] *= factor;
        }
        if (job->bias)
            bias[r] = one_number(job->bias_format,
                                 (const uint8_t *)job->bias + (row + r) * format_bytes[job->bias_format]);
    }
    for (int64_t t = 0; t < end; t++) {
        const int64_t at = (first + t) * job->ldy + row - job->row_start;
        const float *plus = job->plus ? job->plus + (first + t) * job->ldplus + row : NULL;
        for (int64_t r = 0; r < rows; r++) {
            float sum = sums[r][t];
            if (job->bias) sum += bias[r];
            if (plus) sum += plus[r];
            put(job->y, job->y_format, at + r, sum);
        }
    }
}

/* An item: some tiles of GEMM_ROWS rows of W against every panel. */
static void gemm(void *shared) {
    anybit_gemm *job = shared;
    const anybit_weight *w = job->w;
    instance f;
    make_ready(w, &f);
    _Alignas(64) float buffer[GEMM_TILES][GEMM_ROWS * GEMM_APART];
    const int64_t item_rows = job->tiles * GEMM_ROWS, end = job->row_start + job->rows;
    const int is_whole = w->cols <= GEMM_PIECE;
    /* sums of all panels while a row takes several pieces: one share a thread */
    const int64_t share = atomic_fetch_add_explicit(&job->shares, 1, memory_order_relaxed);
    const int64_t sums_count = job->panel_count * item_rows;
    float(*sums)[LANES_X] = (float(*)[LANES_X])(void *)(job->sums + share * sums_count * LANES_X);
    for (int64_t item; (item = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed)) < job->items;) {
        const int64_t row = job->row_start + item * item_rows;
        const int64_t rows = end - row < item_rows ? end - row : item_rows, tiles = (rows + GEMM_ROWS - 1) / GEMM_ROWS;
        if (!is_whole) memset(sums, 0, (size_t)(sums_count * LANES_X) * sizeof(float));
        for (int64_t from = 0; from < w->cols; from += GEMM_PIECE) {
            const int64_t columns = w->cols - from < GEMM_PIECE ? w->cols - from : GEMM_PIECE;
            for (int64_t i = 0; i < tiles; i++) {
                const int64_t first = i * GEMM_ROWS, left = rows - first;
                decode_piece(w, &f, row + first, left < GEMM_ROWS ? left : GEMM_ROWS, from, columns, buffer[i]);
            }
            for (int64_t p = 0; p < job->panel_count; p++)
                for (int64_t i = 0; i < tiles; i++) {
                    const int64_t first = i * GEMM_ROWS, left = rows - first;
                    _Alignas(64) float alone[GEMM_ROWS][LANES_X];
                    float(*here)[LANES_X] = is_whole ? alone : sums + (p * job->tiles + i) * GEMM_ROWS;
                    if (is_whole) memset(alone, 0, sizeof alone);
                    tile(buffer[i], GEMM_APART, job->panels + (p * w->cols + from) * LANES_X, LANES_X, columns, here);
                    if (from + columns == w->cols)
                        put_tile(job, row + first, left < GEMM_ROWS ? left : GEMM_ROWS, p, here);
                }
        }
    }
}
