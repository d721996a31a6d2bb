/* The calls that Python makes: checks, choice of the engine, threads. */
#include "engine.h"
#include "pool.h"

#include <stdlib.h>
#include <string.h>

int32_t anybit_abi(void) { return ANYBIT_ABI; }

/* ---- instruction sets ------------------------------------------------------------------------------------------ */

static const anybit_engine *best(const char *name) {
    const int any = !name || !*name;
#if defined(ANYBIT_X86)
    __builtin_cpu_init();
    const int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("fma");
    if ((any || !strcmp(name, "avx512_vbmi")) && wide && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("gfni"))
        return &anybit_engine_avx512_vbmi;
    if ((any || !strcmp(name, "avx512")) && wide) return &anybit_engine_avx512;
    if ((any || !strcmp(name, "avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &anybit_engine_avx2; /* every processor with AVX2 has F16C */
#endif
    return any || !strcmp(name, "generic") ? &anybit_engine_generic : NULL;
}

static _Atomic(const anybit_engine *) chosen;

static const anybit_engine *engine(void) {
    const anybit_engine *e = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (!e) atomic_store(&chosen, e = best(NULL));
    return e;
}

const char *anybit_isa(void) { return engine()->name; }

int32_t anybit_set_isa(const char *name) {
    const anybit_engine *e = best(name);
    if (!e) return ANYBIT_BAD_ISA;
    atomic_store(&chosen, e);
    return ANYBIT_OK;
}

/* ---- threads --------------------------------------------------------------------------------------------------- */

/* Cuts the rows of each run into items and runs them. Small work stays on the calling thread: waking another one costs
 * microseconds. */
static void run(anybit_job *job, void (*work)(void *), int64_t runs, int64_t bytes, int32_t threads) {
    const int64_t small = 96 << 10, per_thread = 4; /* more of them start cold more often */
    if (threads < 1 || bytes < small) threads = 1;
    int64_t pieces = threads == 1 ? 1 : (threads * per_thread + runs - 1) / runs;
    int64_t rows = (job->rows + pieces - 1) / pieces;
    job->rows_per_item = rows < 4 ? 4 : (rows + 3) & ~(int64_t)3;
    job->items_per_run = (job->rows + job->rows_per_item - 1) / job->rows_per_item;
    job->items = runs * job->items_per_run;
    atomic_init(&job->next, 0);
    if (threads == 1 || job->items == 1)
        work(job);
    else
        pool_run(work, job, (unsigned)threads);
}

/* ---- calls ----------------------------------------------------------------------------------------------------- */

static int usable(const anybit_array *a) {
    const int format = a->format >= 0 && a->format < ANYBIT_FORMATS;
    return !a->data || (format && a->row_block > 0 && a->group >= 0 && a->group % 16 == 0);
}

int32_t anybit_check(const anybit_weight *w) {
    if (w->abi != ANYBIT_ABI || w->size != (int32_t)sizeof *w || w->rows < 0 || w->cols < 0)
        return ANYBIT_BAD_WEIGHT;
    if (!usable(&w->scale) || !usable(&w->scale2) || !usable(&w->offset) || !usable(&w->offset2) || !usable(&w->factor))
        return ANYBIT_BAD_WEIGHT;
    const int has_offset = w->offset_kind == ANYBIT_ZERO_POINT || w->offset_kind == ANYBIT_MINIMUM;
    if (has_offset != (w->offset.data != NULL)) return ANYBIT_BAD_WEIGHT;
    return engine()->check(w);
}

static int64_t row_bytes(const anybit_weight *w) {
    return w->plane_row_stride[0] + w->plane_row_stride[1] + w->plane_row_stride[2];
}

/* x in float32 and in the weight's order; copies (if there are any) in *owned, or in `small` of `small_size` floats. */
static int32_t float_rows(anybit_job *job, const void *x, int32_t format, int64_t ldx, int64_t rows, float *small,
                          int64_t small_size, float **owned) {
    const anybit_engine *e = engine();
    const int64_t cols = job->w->cols, arranged = e->arranged_size(job->w);
    const int64_t stride = format == ANYBIT_F32 ? 0 : (cols + 31) & ~(int64_t)15; /* a conversion may write 15 more */
    float *to = small;
    job->x = x;
    job->ldx = ldx;
    *owned = NULL;
    if (rows * (stride + arranged) > small_size) {
        to = *owned = malloc((size_t)(rows * (stride + arranged)) * sizeof(float));
        if (!to) return ANYBIT_NO_MEMORY;
    }
    if (stride) {
        for (int64_t r = 0; r < rows; r++) e->to_float(format, (const uint16_t *)x + r * ldx, cols, to + r * stride);
        job->x = to;
        job->ldx = stride;
        to += rows * stride;
    }
    if (arranged) {
        job->arranged = to;
        job->ldarranged = arranged;
        e->arrange(job, rows, to);
    }
    return ANYBIT_OK;
}

#define SMALL 16384 /* floats on the stack for copies of x */

int32_t anybit_linear(const anybit_weight *w, const void *x, int64_t ldx, void *y, int64_t ldy, const void *bias,
                      int64_t m, int32_t types, int32_t threads) {
    if (m <= 0 || w->rows == 0) return ANYBIT_OK;
    const anybit_run all = {w, bias, 0, m};
    anybit_job job = {.w = w, .y = y, .ldy = ldy, .runs = &all, .rows = w->rows};
    job.y_format = types >> 4 & 15;
    job.bias_format = types >> 8 & 15;
    float small[SMALL], *owned;
    const int32_t wrong = float_rows(&job, x, types & 15, ldx, m, small, SMALL, &owned);
    if (wrong) return wrong;
    run(&job, engine()->linear, 1, w->rows * row_bytes(w), threads);
    free(owned);
    return ANYBIT_OK;
}

/* Items of as many tiles as leave each thread several of them. */
static void cut(anybit_gemm *job, const anybit_engine *e, int32_t threads) {
    const int64_t tiles = (job->rows + e->gemm_rows - 1) / e->gemm_rows, fair = tiles / (4 * (int64_t)threads);
    job->tiles = fair < 1 ? 1 : fair < e->gemm_tiles ? fair : e->gemm_tiles;
    job->items = (tiles + job->tiles - 1) / job->tiles;
}

int32_t anybit_gemm_rows(const anybit_weight *w, const void *x, int64_t ldx, void *y, int64_t ldy, const void *bias,
                         int64_t m, int64_t row_start, int64_t rows, int32_t types, int32_t threads) {
    if (m <= 0 || rows <= 0) return ANYBIT_OK;
    if (row_start < 0 || row_start + rows > w->rows) return ANYBIT_BAD_INDEX;
    const anybit_engine *e = engine();
    anybit_gemm job = {.w = w, .x = x, .bias = bias, .y = y, .tokens = m, .ldx = ldx, .ldy = ldy,
                       .row_start = row_start, .rows = rows, .x_format = types & 15, .y_format = types >> 4 & 15,
                       .bias_format = types >> 8 & 15};
    if (threads < 1) threads = 1;
    cut(&job, e, threads);
    job.panel_count = (m + e->gemm_tokens - 1) / e->gemm_tokens;
    const int64_t packed = job.panel_count * e->gemm_tokens * (w->cols > 0 ? w->cols : 1);
    const int64_t sums = job.panel_count * e->gemm_tokens * e->gemm_rows * job.tiles * threads;
    job.panels = aligned_alloc(64, ((size_t)(packed + sums) * sizeof(float) + 63) & ~(size_t)63);
    if (!job.panels) return ANYBIT_NO_MEMORY;
    job.sums = job.panels + packed;
    atomic_init(&job.next, 0);
    atomic_init(&job.shares, 0);
    if (threads > 1 && packed > 1 << 14)
        pool_run(e->pack, &job, (unsigned)threads);
    else
        e->pack(&job);
    atomic_store(&job.next, 0);
    if (threads > 1 && job.items > 1)
        pool_run(e->gemm, &job, (unsigned)threads);
    else
        e->gemm(&job);
    free(job.panels);
    return ANYBIT_OK;
}

static int is_like(const anybit_weight *a, const anybit_weight *b) {
    return a->kind == b->kind && a->bits == b->bits && a->offset_kind == b->offset_kind && a->rows == b->rows &&
           a->cols == b->cols;
}

int32_t anybit_linear_each(const anybit_weight *const *w, const void *const *bias, const int64_t *first, int64_t runs,
                           const void *x, int64_t tokens, int64_t ldx, const int32_t *token_ids, void *y, int64_t ldy,
                           int32_t types, int32_t threads) {
    if (runs <= 0 || w[0]->rows == 0) return ANYBIT_OK;
    anybit_run some[64], *all = some;
    if (runs > 64 && !(all = malloc((size_t)runs * sizeof *all))) return ANYBIT_NO_MEMORY;
    int32_t wrong = ANYBIT_OK;
    for (int64_t r = 0; r < runs; r++) {
        all[r] = (anybit_run){w[r], bias ? bias[r] : NULL, first[r], first[r + 1] - first[r]};
        if (!is_like(w[r], w[0])) wrong = ANYBIT_BAD_WEIGHT;
        if (all[r].first < 0 || all[r].count < 0) wrong = ANYBIT_BAD_INDEX;
    }
    for (int64_t p = first[0]; !wrong && p < first[runs]; p++) {
        const int64_t token = token_ids ? token_ids[p] : p;
        if (token < 0 || token >= tokens) wrong = ANYBIT_BAD_INDEX;
    }
    anybit_job job = {.w = w[0], .tokens = token_ids, .y = y, .ldy = ldy, .runs = all, .rows = w[0]->rows};
    job.y_format = types >> 4 & 15;
    job.bias_format = types >> 8 & 15;
    float small[SMALL], *owned = NULL;
    if (!wrong) wrong = float_rows(&job, x, types & 15, ldx, tokens, small, SMALL, &owned);
    if (!wrong) run(&job, engine()->linear, runs, runs * w[0]->rows * row_bytes(w[0]), threads);
    free(owned);
    if (all != some) free(all);
    return wrong;
}

int32_t anybit_decode_rows(const anybit_weight *w, const int64_t *row_indices, int64_t start, int64_t count, void *out,
                           int64_t ldo, int32_t out_format, int32_t threads) {
    const int64_t rows = w->rows;
    if (count <= 0) return ANYBIT_OK;
    if (!row_indices && (start < 0 || start + count > rows)) return ANYBIT_BAD_INDEX;
    for (int64_t i = 0; row_indices && i < count; i++)
        if (row_indices[i] < 0 || row_indices[i] >= rows) return ANYBIT_BAD_INDEX;
    anybit_job job = {.w = w, .y = out, .ldy = ldo, .y_format = out_format, .rows = count};
    job.row_indices = row_indices;
    job.row_start = start;
    run(&job, engine()->decode, 1, count * row_bytes(w), threads);
    return ANYBIT_OK;
}

/* ---- a decoder block ------------------------------------------------------------------------------------------- */

static void multiply(const anybit_product *p, const float *x, float *y, int32_t threads) {
    for (int32_t i = 0; i < p->parts; i++) {
        anybit_linear(p->part[i], x, p->part[i]->cols, y, p->part[i]->rows, p->bias[i], 1, p->bias_format[i] << 8, threads);
        y += p->part[i]->rows;
    }
}

static int64_t rows_of(const anybit_product *p) {
    int64_t rows = 0;
    for (int32_t i = 0; i < p->parts; i++) rows += p->part[i]->rows;
    return rows;
}

/* norm, gated, attended, gate and up or q, k and v, scores */
static int64_t widest(const anybit_block *b) {
    const int64_t qkv = (b->heads + 2 * b->kv_heads) * b->dim, pair = 2 * b->inner;
    return qkv > pair ? qkv : pair;
}

int64_t anybit_block_scratch(const anybit_block *b, int64_t position) {
    const int64_t attended = b->heads * b->dim;
    return b->hidden + (attended > b->inner ? attended : b->inner) + widest(b) + b->heads * (position + 1);
}

static int32_t block_fits(const anybit_block *b) {
    const int64_t heads = b->heads + 2 * b->kv_heads;
    return b->abi == ANYBIT_ABI && b->size == (int32_t)sizeof *b && b->kv_heads > 0 && b->heads % b->kv_heads == 0 &&
           b->rotated <= b->dim && b->rotated % 2 == 0 && rows_of(&b->qkv) == heads * b->dim &&
           rows_of(&b->o) == b->hidden && rows_of(&b->gate_up) == 2 * b->inner && rows_of(&b->down) == b->hidden;
}

static void heads_ready(const anybit_block *b, float *q, const float *cosine, const float *sine) {
    const anybit_engine *e = engine();
    for (int64_t h = 0; h < b->heads + b->kv_heads; h++) {
        const float *norm = h < b->heads ? b->q_norm : b->k_norm;
        if (norm) e->rms_norm(q + h * b->dim, norm, b->eps, b->dim, q + h * b->dim);
        e->rotate(q + h * b->dim, cosine, sine, b->rotated);
    }
}

int32_t anybit_block_step(const anybit_block *b, const float *x, float *y, const float *cosine, const float *sine,
                          float *keys, float *values, int64_t stride, int64_t position, float *scratch,
                          int32_t threads) {
    if (!block_fits(b) || position < 0 || stride < (position + 1) * b->dim) return ANYBIT_BAD_WEIGHT;
    const anybit_engine *e = engine();
    const int64_t attended = b->heads * b->dim;
    float *normed = scratch, *narrow = normed + b->hidden;
    float *wide = narrow + (attended > b->inner ? attended : b->inner), *scores = wide + widest(b);
    e->rms_norm(x, b->norm1, b->eps, b->hidden, normed);
    multiply(&b->qkv, normed, wide, threads);
    heads_ready(b, wide, cosine, sine);
    const float *k = wide + attended, *v = k + b->kv_heads * b->dim;
    for (int64_t h = 0; h < b->kv_heads; h++) {
        memcpy(keys + h * stride + position * b->dim, k + h * b->dim, (size_t)b->dim * sizeof(float));
        memcpy(values + h * stride + position * b->dim, v + h * b->dim, (size_t)b->dim * sizeof(float));
    }
    anybit_attention job = {.q = wide, .keys = keys, .values = values, .scores = scores, .out = narrow,
                            .heads = b->heads, .kv_heads = b->kv_heads, .dim = b->dim, .tokens = position + 1,
                            .stride = stride, .scaling = b->scaling};
    atomic_init(&job.next, 0);
    if (threads > 1 && b->heads * (position + 1) * b->dim > 1 << 14)
        pool_run(e->attend, &job, (unsigned)threads);
    else
        e->attend(&job);
    multiply(&b->o, narrow, normed, threads);
    for (int64_t i = 0; i < b->hidden; i++) y[i] = x[i] + normed[i];
    e->rms_norm(y, b->norm2, b->eps, b->hidden, normed);
    multiply(&b->gate_up, normed, wide, threads);
    e->silu_gate(wide, wide + b->inner, b->inner, narrow);
    multiply(&b->down, narrow, normed, threads);
    for (int64_t i = 0; i < b->hidden; i++) y[i] += normed[i];
    return ANYBIT_OK;
}

int32_t anybit_blocks_step(const anybit_block *const *blocks, int64_t count, const float *x, float *y,
                           const float *cosine, const float *sine, float *const *keys, float *const *values,
                           const int64_t *strides, int64_t position, float *scratch, int32_t threads) {
    for (int64_t i = 0; i < count; i++) {
        if (blocks[i]->hidden != blocks[0]->hidden) return ANYBIT_BAD_WEIGHT;
        const int32_t wrong = anybit_block_step(blocks[i], i ? y : x, y, cosine, sine, keys[i], values[i], strides[i],
                                                position, scratch, threads);
        if (wrong) return wrong;
    }
    return ANYBIT_OK;
}

/* ---- a decoder block, many tokens ------------------------------------------------------------------------------ */

#define CHUNK 512 /* tokens at once: bounds the scratch */

static int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

static void share(void (*work)(void *), void *job, atomic_llong *next, int32_t threads) {
    atomic_store(next, 0);
    if (threads > 1)
        pool_run(work, job, (unsigned)threads);
    else
        work(job);
}

/* Sizes of the scratch's parts, in floats: packed inputs, sums that wait, wide rows, attended rows, packed keys. */
typedef struct {
    int64_t panels, sums, wide, attended, keys;
} many_sizes;

static many_sizes sizes_of(const anybit_block *b, int64_t position, int64_t tokens, int32_t threads) {
    const anybit_engine *e = engine();
    const int64_t some = at_most(tokens, CHUNK), rows = up_to(some, e->gemm_tokens), attended = b->heads * b->dim;
    int64_t cols = b->hidden > b->inner ? b->hidden : b->inner;
    cols = cols > attended ? cols : attended;
    return (many_sizes){
        .panels = rows * cols,
        .sums = rows * e->gemm_rows * e->gemm_tiles * (threads > 1 ? threads : 1),
        .wide = some * widest(b),
        .attended = up_to(some * attended, 16),
        .keys = up_to(position + tokens, e->gemm_tokens) * b->kv_heads * b->dim,
    };
}

int64_t anybit_block_many_scratch(const anybit_block *b, int64_t position, int64_t tokens, int32_t threads) {
    const many_sizes s = sizes_of(b, position, tokens, threads);
    return s.panels + s.sums + up_to(s.wide, 16) + s.attended + s.keys + 16;
}

/* The product's parts side by side in y, from inputs that are packed once; `like` says where x is and what happens to
 * it and to y. */
static void multiply_many(const anybit_product *p, anybit_gemm like, float *y, int32_t threads) {
    const anybit_engine *e = engine();
    const int64_t side_by_side = rows_of(p);
    like.ldy = side_by_side;
    like.panel_count = (like.tokens + e->gemm_tokens - 1) / e->gemm_tokens;
    for (int32_t i = 0; i < p->parts; i++) {
        anybit_gemm job = like;
        job.w = p->part[i];
        job.bias = p->bias[i];
        job.bias_format = p->bias_format[i];
        job.y = y;
        job.rows = job.w->rows;
        cut(&job, e, threads > 1 ? threads : 1);
        if (i == 0) share(e->pack, &job, &job.next, threads);
        atomic_store(&job.shares, 0);
        share(e->gemm, &job, &job.next, threads);
        y += job.rows;
    }
}

/* Heads of a few tokens: norm and rotation, then keys and values to the cache. */
typedef struct {
    const anybit_block *b;
    float *wide, *keys, *values;
    const float *cosine, *sine;
    int64_t stride, position, tokens;
    atomic_llong next;
} ready_job;

static void ready(void *shared) {
    ready_job *job = shared;
    const anybit_block *b = job->b;
    const int64_t dim = b->dim, row = (b->heads + 2 * b->kv_heads) * dim;
    for (int64_t t; (t = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed)) < job->tokens;) {
        float *q = job->wide + t * row, *k = q + b->heads * dim, *v = k + b->kv_heads * dim;
        heads_ready(b, q, job->cosine + t * b->rotated, job->sine + t * b->rotated);
        for (int64_t h = 0; h < b->kv_heads; h++) {
            const int64_t at = h * job->stride + (job->position + t) * dim;
            memcpy(job->keys + at, k + h * dim, (size_t)dim * sizeof(float));
            memcpy(job->values + at, v + h * dim, (size_t)dim * sizeof(float));
        }
    }
}

int32_t anybit_block_many(const anybit_block *b, const float *x, float *y, const float *cosine, const float *sine,
                          float *keys, float *values, int64_t stride, int64_t position, int64_t tokens,
                          float *scratch, int32_t threads) {
    if (!block_fits(b) || position < 0 || tokens < 0 || stride < (position + tokens) * b->dim || b->dim % 32 ||
        b->dim > 256 || b->rotated != b->dim)
        return ANYBIT_BAD_WEIGHT;
    const anybit_engine *e = engine();
    const many_sizes s = sizes_of(b, position, tokens, threads);
    const int64_t attended = b->heads * b->dim;
    float *panels = (float *)(((uintptr_t)scratch + 63) & ~(uintptr_t)63), *sums = panels + s.panels;
    float *wide = sums + s.sums, *narrow = wide + up_to(s.wide, 16), *key_panels = narrow + s.attended;
    for (int64_t done = 0; done < tokens; done += CHUNK) {
        const int64_t some = at_most(tokens - done, CHUNK), hidden = b->hidden, before = position + done;
        const float *in = x + done * hidden;
        float *out = y + done * hidden;
        anybit_gemm like = {.tokens = some, .panels = panels, .sums = sums, .eps = b->eps};
        like.x = in, like.ldx = hidden, like.norm = b->norm1;
        multiply_many(&b->qkv, like, wide, threads);
        ready_job heads = {b, wide, keys, values, cosine + done * b->rotated, sine + done * b->rotated, stride, before,
                           some, 0};
        share(ready, &heads, &heads.next, threads);
        anybit_prefill job = {.q = wide, .keys = keys, .values = values, .key_panels = key_panels, .out = narrow,
                              .ldq = (b->heads + 2 * b->kv_heads) * b->dim, .ldo = attended, .heads = b->heads,
                              .kv_heads = b->kv_heads, .dim = b->dim, .tokens = some, .position = before,
                              .stride = stride, .scaling = b->scaling};
        share(e->pack_keys, &job, &job.next, threads);
        share(e->attend_many, &job, &job.next, threads);
        like.x = narrow, like.ldx = attended, like.norm = NULL, like.plus = in, like.ldplus = hidden;
        multiply_many(&b->o, like, out, threads);
        like.x = out, like.ldx = hidden, like.norm = b->norm2, like.plus = NULL;
        multiply_many(&b->gate_up, like, wide, threads);
        like.x = wide, like.ldx = 2 * b->inner, like.norm = NULL, like.is_gated = 1, like.plus = out;
        multiply_many(&b->down, like, out, threads);
    }
    return ANYBIT_OK;
}
