/* Between the calls (api.c) and the variants of the engine (engine.c, compiled once for each instruction set). */
#ifndef ANYBIT_ENGINE_H
#define ANYBIT_ENGINE_H

#include "anybit_native.h"

#include <stdatomic.h>

/* A run of pairs (x row, y row) that use one expert; a plain product is one run. */
typedef struct {
    int64_t expert, first, count;
} anybit_run;

/* What all threads of one call share. Work is handed out in items (a run and a range of rows) by an atomic counter:
 * on a busy machine threads do not finish equal shares at the same time. */
typedef struct {
    const anybit_weight *w;
    const float *x; /* float32 rows */
    int64_t ldx;
    const int32_t *tokens; /* x row of a pair; NULL: the pair's own number */
    void *y;
    int64_t ldy;
    const void *bias;
    int32_t y_format, bias_format;
    const anybit_run *runs;
    const int64_t *row_indices; /* decode */
    int64_t row_start;
    int64_t rows, rows_per_item, items_per_run, items;
    atomic_llong next;
} anybit_job;

typedef struct {
    const char *name;
    int32_t (*check)(const anybit_weight *w);
    void (*linear)(void *job);
    void (*decode)(void *job);
    void (*to_float)(int32_t format, const void *from, int64_t count, float *to); /* `to` has room for 15 more */
} anybit_engine;

extern const anybit_engine anybit_engine_generic;
#if defined(ANYBIT_X86)
extern const anybit_engine anybit_engine_avx2, anybit_engine_avx512;
#endif

#endif
