/* Between the calls (api.c) and the variants of the engine (engine.c, compiled once for each instruction set). */
#ifndef ANYBIT_ENGINE_H
#define ANYBIT_ENGINE_H

#include "anybit_native.h"

#include <stdatomic.h>

/* A run of pairs (x row, y row) that use one weight; a plain product is one run. */
typedef struct {
    const anybit_weight *w;
    const void *bias;
    int64_t first, count;
} anybit_run;

/* What all threads of one call share. Work is handed out in items (a run and a range of rows) by an atomic counter:
 * on a busy machine threads do not finish equal shares at the same time. */
typedef struct {
    const anybit_weight *w; /* of a decode, or like those of all runs */
    const float *x;         /* float32 rows */
    int64_t ldx, ldarranged;
    const float *arranged; /* the same rows in the order that the weight is read in; NULL: as they are */
    const int32_t *tokens; /* x row of a pair; NULL: the pair's own number */
    void *y;
    int64_t ldy;
    int32_t y_format, bias_format;
    const anybit_run *runs;
    const int64_t *row_indices; /* decode */
    int64_t row_start;
    int64_t rows, rows_per_item, items_per_run, items;
    _Alignas(64) atomic_llong next; /* a line of its own: all else is only read */
} anybit_job;

/* A product of many tokens: y [tokens, rows] of the rows [row_start, row_start + rows) of w. */
typedef struct {
    const anybit_weight *w;
    const void *x, *bias;
    void *y;
    int64_t tokens, ldx, ldy, row_start, rows, items, panel_count, tiles;
    int32_t x_format, y_format, bias_format;
    const float *norm, *plus; /* [cols]: x is normed; [tokens, rows]: added to y; or NULL */
    int64_t ldplus;
    float eps;
    int32_t is_gated;     /* x [tokens, 2 cols] is silu(first half) * second half */
    float *panels, *sums; /* x packed; sums of a thread where rows take several pieces */
    atomic_llong next, shares;
} anybit_gemm;

/* One token's attention over the cache; heads are handed out by the counter. */
typedef struct {
    const float *q, *keys, *values; /* q [heads, dim]; keys and values: a kv head every `stride` numbers */
    float *scores, *out;            /* [heads, tokens], [heads, dim] */
    int64_t heads, kv_heads, dim, tokens, stride;
    float scaling;
    atomic_llong next;
} anybit_attention;

/* Many tokens' causal attention: q [tokens, heads * dim], the tokens' own keys and values already in the cache. */
typedef struct {
    const float *q, *keys, *values;
    float *key_panels, *out;
    int64_t ldq, ldo, heads, kv_heads, dim, tokens, position, stride;
    float scaling;
    atomic_llong next;
} anybit_prefill;

typedef struct {
    const char *name;
    int32_t (*check)(const anybit_weight *w);
    void (*linear)(void *job);
    void (*decode)(void *job);
    int64_t (*arranged_size)(const anybit_weight *w); /* floats of a row of x in the weight's order; 0: as it is */
    void (*arrange)(const anybit_job *job, int64_t rows, float *to);
    void (*to_float)(int32_t format, const void *from, int64_t count, float *to); /* `to` has room for 15 more */
    int32_t gemm_rows, gemm_tiles, gemm_tokens; /* rows of a tile, tiles of an item at most, tokens of a panel */
    void (*pack)(void *gemm);
    void (*gemm)(void *gemm);
    void (*rms_norm)(const float *x, const float *w, float eps, int64_t n, float *y);
    void (*rotate)(float *x, const float *cosine, const float *sine, int64_t rotated);
    void (*attend)(void *attention);
    void (*silu_gate)(const float *gate, const float *up, int64_t n, float *out);
    void (*pack_keys)(void *prefill);
    void (*attend_many)(void *prefill);
} anybit_engine;

extern const anybit_engine anybit_engine_generic;
#if defined(ANYBIT_X86)
extern const anybit_engine anybit_engine_avx2, anybit_engine_avx512, anybit_engine_avx512_vbmi;
#endif

#endif
