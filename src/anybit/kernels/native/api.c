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
    if ((any || !strcmp(name, "avx512")) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
        return &anybit_engine_avx512;
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
    const int64_t small = 96 << 10, per_thread = 4;
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
    if (w->abi != ANYBIT_ABI || w->size != (int32_t)sizeof *w || w->rows < 0 || w->cols < 0 || w->experts < 1)
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

/* x in float32; `rows` rows of `cols`, the copy (if there is one) in *owned. */
static int32_t float_rows(anybit_job *job, const void *x, int32_t format, int64_t ldx, int64_t rows, int64_t cols,
                          float *small, int64_t small_size, float **owned) {
    job->x = x;
    job->ldx = ldx;
    *owned = NULL;
    if (format == ANYBIT_F32) return ANYBIT_OK;
    const int64_t stride = (cols + 31) & ~(int64_t)15; /* a conversion may write 15 more */
    float *to = small;
    if (rows * stride > small_size) {
        to = *owned = malloc((size_t)(rows * stride) * sizeof(float));
        if (!to) return ANYBIT_NO_MEMORY;
    }
    for (int64_t r = 0; r < rows; r++) engine()->to_float(format, (const uint16_t *)x + r * ldx, cols, to + r * stride);
    job->x = to;
    job->ldx = stride;
    return ANYBIT_OK;
}

#define SMALL 8192 /* floats on the stack for a converted x */

int32_t anybit_linear(const anybit_weight *w, const void *x, int64_t ldx, void *y, int64_t ldy, const void *bias,
                      int64_t m, int32_t types, int32_t threads) {
    if (m <= 0 || w->rows == 0) return ANYBIT_OK;
    const anybit_run all = {0, 0, m};
    anybit_job job = {.w = w, .y = y, .ldy = ldy, .bias = bias, .runs = &all, .rows = w->rows};
    job.y_format = types >> 4 & 15;
    job.bias_format = types >> 8 & 15;
    float small[SMALL], *owned;
    const int32_t wrong = float_rows(&job, x, types & 15, ldx, m, w->cols, small, SMALL, &owned);
    if (wrong) return wrong;
    run(&job, engine()->linear, 1, w->rows * row_bytes(w), threads);
    free(owned);
    return ANYBIT_OK;
}

int32_t anybit_linear_experts(const anybit_weight *w, const void *x, int64_t tokens, int64_t ldx,
                              const int32_t *expert_ids, const int32_t *token_ids, int64_t pairs, void *y, int64_t ldy,
                              const void *bias, int32_t types, int32_t threads) {
    if (pairs <= 0 || w->rows == 0) return ANYBIT_OK;
    for (int64_t p = 0; p < pairs; p++) {
        const int64_t token = token_ids ? token_ids[p] : p;
        if (expert_ids[p] < 0 || expert_ids[p] >= w->experts || token < 0 || token >= tokens) return ANYBIT_BAD_INDEX;
    }
    anybit_run some[64], *runs = some;
    if (pairs > 64 && !(runs = malloc((size_t)pairs * sizeof *runs))) return ANYBIT_NO_MEMORY;
    int64_t count = 0;
    for (int64_t p = 0; p < pairs; p++) {
        if (p && expert_ids[p] == expert_ids[p - 1])
            runs[count - 1].count++;
        else
            runs[count++] = (anybit_run){expert_ids[p], p, 1};
    }
    anybit_job job = {.w = w, .tokens = token_ids, .y = y, .ldy = ldy, .bias = bias, .runs = runs, .rows = w->rows};
    job.y_format = types >> 4 & 15;
    job.bias_format = types >> 8 & 15;
    float small[SMALL], *owned;
    const int32_t wrong = float_rows(&job, x, types & 15, ldx, tokens, w->cols, small, SMALL, &owned);
    if (!wrong) run(&job, engine()->linear, count, count * w->rows * row_bytes(w), threads);
    if (!wrong) free(owned);
    if (runs != some) free(runs);
    return wrong;
}

int32_t anybit_decode_rows(const anybit_weight *w, const int64_t *row_indices, int64_t start, int64_t count, void *out,
                           int64_t ldo, int32_t out_format, int32_t threads) {
    const int64_t rows = w->rows * w->experts;
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
