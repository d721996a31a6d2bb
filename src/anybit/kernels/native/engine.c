/* The engine: unpack, scale and multiply. Compiled once for each instruction set (ANYBIT_ENGINE names it); what differs
 * between them is in vector_*.h. Read upwards from `linear` and `decode` at the end.
 *
 * Four rows of W go together: each x is loaded once for four products, and choices are made once for four rows. Rows
 * are taken in pieces of a few thousand columns. First the piece's scales and offsets become float32, one for each unit
 * of 16 or 32 columns (a whole vector an instruction); then an instance made for (code, offset, unit) walks the blocks
 * of 32 codes. For up to four rows of x a block is decoded once, in registers.
 */
#include "engine.h"
#include "floats.h"

#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define ROWS 4         /* rows of W at once */
#define TOKENS 8       /* rows of x at once */
#define PIECE 4096     /* columns at once for one token */
#define MANY_PIECE 2048 /* ... for several: their x stays in the first-level cache */
#define BLOCK 32
#define AHEAD 8192 /* bytes that are asked for beforehand, at least: some rows */
#define UNITS (PIECE / 16 + 16) /* scales of a row's piece at most, and room for a vector */

#if defined(ANYBIT_ENGINE_AVX512_VBMI)
#include "vector_avx512.h"
#define ENGINE anybit_engine_avx512_vbmi
#define ENGINE_NAME "avx512_vbmi"
#elif defined(ANYBIT_ENGINE_AVX512)
#include "vector_avx512.h"
#define ENGINE anybit_engine_avx512
#define ENGINE_NAME "avx512"
#elif defined(ANYBIT_ENGINE_AVX2)
#include "vector_avx2.h"
#define ENGINE anybit_engine_avx2
#define ENGINE_NAME "avx2"
#else
#include "vector_generic.h"
#define ENGINE anybit_engine_generic
#define ENGINE_NAME "generic"
#endif

/* ---- stored numbers to float32 ------------------------------------------------------------------------------- */

static const int32_t format_bytes[ANYBIT_FORMATS] = {4, 2, 2, 1, 1, 1, 1, 1};

/* `count` numbers of an array that may be read 64 bytes further; `to` has room for 15 more. A byte's fields are moved
 * to where a float32 has them, which misses the exponent's bias only: a power of two. */
INLINE void convert(const int32_t format, const uint8_t *from, int64_t count, float *to) {
    const uint16_t *wide = (const uint16_t *)(const void *)from;
#define EACH(value) \
    for (int64_t i = 0; i < count; i += WIDTH) store(to + i, value)
    switch (format) {
    case ANYBIT_F32:
        EACH(load((const float *)(const void *)from + i));
        return;
    case ANYBIT_F16:
        EACH(load_half(wide + i));
        return;
    case ANYBIT_BF16:
        EACH(load_bfloat(wide + i));
        return;
    case ANYBIT_E8M0: /* code 0 is 2^-127, 255 is NaN */
        EACH(nan_from(maximum(load_fields(from + i, 23, 0, 0x7f800000), splat(0x1p-127f)), (float)INFINITY));
        return;
    case ANYBIT_E4M3: /* 480 is what the code of NaN would be */
        EACH(nan_from(mul(load_fields(from + i, 24, 4, 0x87f00000), splat(0x1p120f)), 480.0f));
        return;
    case ANYBIT_UE5M3:
        EACH(nan_from(mul(load_fields(from + i, 20, 0, 0x0ff00000), splat(0x1p112f)), 122880.0f));
        return;
    case ANYBIT_U8:
        EACH(load_unsigned(from + i));
        return;
    default:
        EACH(load_signed(from + i));
        return;
    }
#undef EACH
}

/* The same for several rows, so that the choice of the format is made once. */
static void convert_rows(int32_t format, const uint8_t *const *from, int rows, int64_t count, float (*to)[UNITS]) {
    switch (format) {
#define CASE(constant) \
    case constant: \
        for (int r = 0; r < rows; r++) convert(constant, from[r], count, to[r]); \
        return;
        CASE(ANYBIT_F32)
        CASE(ANYBIT_F16)
        CASE(ANYBIT_BF16)
        CASE(ANYBIT_E8M0)
        CASE(ANYBIT_E4M3)
        CASE(ANYBIT_UE5M3)
        CASE(ANYBIT_U8)
        CASE(ANYBIT_I8)
#undef CASE
    }
}

static float one_number(int32_t format, const uint8_t *from) {
    uint16_t wide;
    uint8_t bytes[16];
    float value[16];
    switch (format) {
    case ANYBIT_F32:
        memcpy(value, from, 4);
        return value[0];
    case ANYBIT_F16:
        memcpy(&wide, from, 2);
        return half_to_float(wide);
    case ANYBIT_BF16:
        memcpy(&wide, from, 2);
        return bfloat_to_float(wide);
    default:
        memset(bytes, *from, sizeof bytes);
        convert(format, bytes, 1, value);
        return value[0];
    }
}

/* `count` numbers of an array that ends there. */
static void to_float(int32_t format, const void *from, int64_t count, float *to) {
    const uint8_t *bytes = from;
    uint8_t rest[64] = {0};
    const int64_t whole = count & ~(int64_t)15, size = format_bytes[format];
    convert(format, bytes, whole, to);
    if (count == whole) return;
    memcpy(rest, bytes + whole * size, (size_t)((count - whole) * size));
    convert(format, rest, 16, to + whole);
}

/* One number rounded to the format of y. */
INLINE void put(void *y, int32_t format, int64_t at, float value) {
    if (format == ANYBIT_F32)
        ((float *)y)[at] = value;
    else
        ((uint16_t *)y)[at] = format == ANYBIT_F16 ? float_to_half(value) : float_to_bfloat(value);
}

static int64_t arranged_size(const anybit_weight *w);
static int reads_by_units(const anybit_weight *w);
#include "scale_parts.h"

/* ---- instances ------------------------------------------------------------------------------------------------ */

/* A minimum where code times scale is exact: one fused operation then rounds as the sum alone does. */
#define EXACT_MINIMUM 5

INLINE int adds_offset(const int offset_kind) {
    return offset_kind == ANYBIT_ZERO_POINT || offset_kind == ANYBIT_MINIMUM || offset_kind == EXACT_MINIMUM;
}

/* value -> weight: the order of evaluation, written once. */
INLINE vec apply(const int offset_kind, vec v, vec s, vec o) {
    if (offset_kind == EXACT_MINIMUM) return fused(v, s, o);
    if (offset_kind == ANYBIT_ZERO_POINT) v = sub(v, o);
    v = mul(v, s);
    if (offset_kind == ANYBIT_MINIMUM) v = add(v, o);
    if (offset_kind == ANYBIT_ROUND_F16) v = through_half(v);
    if (offset_kind == ANYBIT_ROUND_BF16) v = through_bfloat(v);
    return v;
}

/* The 32 weights of block b. A table is scaled before it is looked up: 16 products serve 32 weights. */
INLINE void block(const anybit_weight *w, const pieces *p, int r, int64_t b, const int kind, const int bits,
                  const int is_signed, const int offset_kind, const int unit, const table *values,
                  const lookup *all, vec out[VECTORS]) {
    const int has_offset = adds_offset(offset_kind);
    const int64_t u = unit == 16 ? 2 * b : b;
    if (kind == ANYBIT_FLOAT) {
        for (int i = 0; i < VECTORS; i++) {
            const int64_t at = BLOCK * b + WIDTH * i;
            const void *weights = p->plane[r][0];
            out[i] = bits == 32   ? load((const float *)weights + at)
                     : bits == 16 ? load_half((const uint16_t *)weights + at)
                                  : load_bfloat((const uint16_t *)weights + at);
        }
        return;
    }
    const vec s = splat(p->scale[r][u]), o = has_offset ? splat(p->offset[r][u]) : zero();
    const vec s2 = unit == 16 ? splat(p->scale[r][u + 1]) : s;
    const vec o2 = unit == 16 && has_offset ? splat(p->offset[r][u + 1]) : o;
    if (kind == ANYBIT_TABLE) {
        table low = *values, high;
        TABLE_MAP(low, apply(offset_kind, v, s, o));
        if (unit == 16) {
            high = *values;
            TABLE_MAP(high, apply(offset_kind, v, s2, o2));
        } else {
            high = low;
        }
        table_block(bits, p->plane[r], b, low, high, out);
        return;
    }
    if (kind == ANYBIT_INTEGER)
        integer_block(bits, is_signed, p->plane[r], b, w->bias, all, out);
    else
        minifloat_block(bits, p->plane[r], b, &w->minifloat, all, out);
    for (int i = 0; i < VECTORS; i++)
        out[i] = i < VECTORS / 2 ? apply(offset_kind, out[i], s, o) : apply(offset_kind, out[i], s2, o2);
}

/* Bits of the first plane of codes of `bits` bits. */
INLINE int plane_width(const int bits) { return bits >= 8 ? bits : bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }

/* Asks for the codes of later rows, a share with each block: many requests at once would hold up the loads between
 * them. A row's block of `bytes` brings ROWS * bytes / 64 lines a block; what is asked for twice costs little. */
INLINE void ask_ahead(const pieces *p, int64_t b, const int plane, const int bytes) {
    const int lines = ROWS * bytes / 64 > 0 ? ROWS * bytes / 64 : 1;
    for (int i = 0; i < lines; i++) {
        const int64_t r = (b * lines + i) % ROWS;
        __builtin_prefetch(p->plane[r][plane] + p->ahead[plane] + b * bytes);
    }
}

#if defined(HAS_LANES)
#include "wide_parts.h"
#else
static int64_t arranged_size(const anybit_weight *w) { return (void)w, 0; }
static int reads_by_units(const anybit_weight *w) { return (void)w, 0; }
static void arrange(const anybit_weight *w, const float *x, int64_t columns, float *to) {
    (void)w, (void)x, (void)columns, (void)to;
}
#endif

/* Adds the products of four rows with `tokens` rows of x, from column `from`, over `blocks` blocks to sums. x is arranged
 * where the weight's order says so. */
INLINE void dot_body(const anybit_weight *w, const pieces *p, int64_t blocks, const float *const *x, int64_t from,
                     float (*sums)[ROWS], const int tokens, const int kind, const int bits, const int is_signed,
                     const int offset_kind, const int unit) {
#if defined(HAS_LANES)
    const int order = order_of(kind, bits, offset_kind);
    const float *arranged[MOST_TOKENS];
    for (int t = 0; t < tokens; t++) arranged[t] = x[t] + from;
    if (order == BY_UNITS) {
        dot_units(w, p, blocks, arranged, sums, tokens, bits, offset_kind, unit);
        return;
    }
    if (order != AS_IT_IS) {
        dot_halves(w, p, blocks, arranged, sums, tokens, kind, bits, offset_kind, unit);
        return;
    }
#endif
    /* independent sums for each row and token, as additions take time; with short vectors the four rows suffice */
    const int chains = tokens == 1 && WIDTH == 16 ? 2 : 1;
    const int stored_bits = kind != ANYBIT_FLOAT ? bits : bits == 32 ? 32 : 16;
    const table values = table_of(w->table);
    vec sum[ROWS][MOST_TOKENS + 1];
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < tokens * chains; i++) sum[r][i] = zero();
    int64_t b = 0;
    for (; b < blocks; b++) {
        vec in[MOST_TOKENS][VECTORS];
        for (int i = 0, left = stored_bits; left > 0; i++) {
            const int width = plane_width(left);
            ask_ahead(p, b, i, 4 * width);
            left -= width;
        }
        for (int t = 0; t < tokens; t++)
            for (int i = 0; i < VECTORS; i++) in[t][i] = load(x[t] + from + BLOCK * b + WIDTH * i);
        for (int r = 0; r < ROWS; r++) {
            vec weights[VECTORS];
            block(w, p, r, b, kind, bits, is_signed, offset_kind, unit, &values, p->all, weights);
            for (int t = 0; t < tokens; t++)
                for (int i = 0; i < VECTORS; i++) {
                    vec *to = &sum[r][t * chains + i % chains];
                    *to = fused(weights[i], in[t][i], *to);
                }
        }
    }
    if (chains == 2)
        for (int r = 0; r < ROWS; r++) sum[r][0] = add(sum[r][0], sum[r][1]);
    for (int t = 0; t < tokens; t++) add_totals(sum[0][t], sum[1][t], sum[2][t], sum[3][t], sums[t]);
}

/* Writes the weights of blocks [first, first + blocks) of a piece. */
INLINE void expand_body(const anybit_weight *w, const pieces *p, int r, int64_t first, int64_t blocks, float *out,
                        const int kind, const int bits, const int is_signed, const int offset_kind, const int unit) {
    const table values = table_of(w->table);
    for (int64_t b = 0; b < blocks; b++) {
        vec weights[VECTORS];
        block(w, p, r, first + b, kind, bits, is_signed, offset_kind, unit, &values, p->all, weights);
        for (int i = 0; i < VECTORS; i++) store(out + BLOCK * b + WIDTH * i, weights[i]);
    }
}

typedef void dot_function(const anybit_weight *w, const pieces *p, int64_t blocks, const float *const *x, int64_t from,
                          float (*sums)[ROWS]);

typedef struct {
    int unit;
    dot_function *dot[3]; /* for 1, 2 and 4 tokens */
    void (*expand)(const anybit_weight *, const pieces *, int, int64_t, int64_t, float *);
    lookup all;
} instance;

/* Every combination that is compiled: X(kind, bits, signed, offset, unit). */
#define OFFSETS(X, kind, bits, is_signed, unit) \
    X(kind, bits, is_signed, 0, unit) X(kind, bits, is_signed, 1, unit) X(kind, bits, is_signed, 2, unit)
#define FULL(X, kind, bits, is_signed) \
    OFFSETS(X, kind, bits, is_signed, 16) OFFSETS(X, kind, bits, is_signed, 32)
#define INSTANCES(X) \
    FULL(X, 0, 1, 0) FULL(X, 0, 2, 0) FULL(X, 0, 3, 0) FULL(X, 0, 4, 0) \
    X(0, 2, 0, 5, 16) X(0, 4, 0, 5, 32) X(1, 5, 0, 5, 32) \
    X(0, 4, 0, 3, 16) X(0, 4, 0, 3, 32) X(0, 4, 0, 4, 16) X(0, 4, 0, 4, 32) \
    FULL(X, 1, 5, 0) FULL(X, 1, 6, 0) FULL(X, 1, 7, 0) FULL(X, 1, 8, 0) FULL(X, 1, 8, 1) \
    X(2, 6, 0, 0, 16) X(2, 6, 0, 0, 32) X(2, 8, 0, 0, 16) X(2, 8, 0, 0, 32) \
    X(3, 32, 0, 0, 32) X(3, 16, 0, 0, 32) X(3, 17, 0, 0, 32)

#define NAME(what, kind, bits, is_signed, offset, unit) what##_##kind##_##bits##_##is_signed##_##offset##_##unit
#define DEFINE_DOT(tokens, kind, bits, is_signed, offset, unit) \
    static void NAME(dot##tokens, kind, bits, is_signed, offset, unit)(const anybit_weight *w, const pieces *p, \
                                                                       int64_t blocks, const float *const *x, \
                                                                       int64_t from, float (*sums)[ROWS]) { \
        dot_body(w, p, blocks, x, from, sums, tokens, kind, bits, is_signed, offset, unit); \
    }
#define DEFINE_EXPAND(kind, bits, is_signed, offset, unit) \
    static void NAME(expand, kind, bits, is_signed, offset, unit)(const anybit_weight *w, const pieces *p, int r, \
                                                                  int64_t first, int64_t blocks, float *out) { \
        expand_body(w, p, r, first, blocks, out, kind, bits, is_signed, offset, unit); \
    }
#if MOST_TOKENS == 4
#define DOT4(...) NAME(dot4, __VA_ARGS__)
#define DEFINE_DOT4(...) DEFINE_DOT(4, __VA_ARGS__)
#else /* too few registers: two at a time */
#define DOT4(...) 0
#define DEFINE_DOT4(...)
#endif
#define DEFINE(...) \
    DEFINE_DOT(1, __VA_ARGS__) DEFINE_DOT(2, __VA_ARGS__) DEFINE_DOT4(__VA_ARGS__) DEFINE_EXPAND(__VA_ARGS__)
INSTANCES(DEFINE)

#define KEY(kind, bits, is_signed, offset, unit) \
    ((kind) << 12 | (bits) << 6 | (is_signed) << 5 | (offset) << 1 | ((unit) == 16))
#define CASE(...) \
    case KEY(__VA_ARGS__): \
        f->unit = UNIT_OF(__VA_ARGS__); \
        f->dot[0] = NAME(dot1, __VA_ARGS__), f->dot[1] = NAME(dot2, __VA_ARGS__), f->dot[2] = DOT4(__VA_ARGS__); \
        f->expand = NAME(expand, __VA_ARGS__); \
        return 1;
#define UNIT_OF(kind, bits, is_signed, offset, unit) unit

static int fills_blocks(const anybit_array *a, int64_t cols) {
    return !a->data || a->group % BLOCK == 0 || a->group >= cols;
}

/* Integers of at most 5 bits times a float16 (11 bits), or times that and an integer of 8, fit into 24 bits; a float16
 * keeps them far from overflow and underflow too. */
static int scales_exactly(const anybit_weight *w) {
    const int one_level = !w->scale2.data && w->scale.format == ANYBIT_F16;
    const int is_fine = w->scale.format == ANYBIT_U8 || w->scale.format == ANYBIT_I8;
    const int two_levels = w->scale2.data && w->scale2.format == ANYBIT_F16 && is_fine && !w->divide;
    if (!w->scale.data || w->bits > 5 || !(one_level || two_levels)) return 0;
    for (int i = 0; w->kind == ANYBIT_TABLE && i < 16; i++)
        if (w->table[i] != (float)(int)w->table[i] || w->table[i] > 16.0f || w->table[i] < -16.0f) return 0;
    return w->kind == ANYBIT_TABLE || w->kind == ANYBIT_INTEGER;
}

static int offset_kind_of(const anybit_weight *w, int is_whole) {
    const int has_instance = is_whole ? w->bits >= 4 : w->bits == 2;
    return w->offset_kind == ANYBIT_MINIMUM && has_instance && scales_exactly(w) ? EXACT_MINIMUM : w->offset_kind;
}

/* 0 if there is none. */
static int find_instance(const anybit_weight *w, instance *f) {
    const int whole = fills_blocks(&w->scale, w->cols) && fills_blocks(&w->scale2, w->cols) &&
                      fills_blocks(&w->offset, w->cols) && fills_blocks(&w->offset2, w->cols);
    switch (KEY(w->kind, w->bits, w->is_signed, offset_kind_of(w, whole), whole ? 32 : 16)) {
        INSTANCES(CASE)
    default:
        return 0;
    }
}

static int32_t check(const anybit_weight *w) {
    instance f;
    return find_instance(w, &f) ? ANYBIT_OK : ANYBIT_BAD_WEIGHT;
}

static void make_ready(const anybit_weight *w, instance *f) {
    find_instance(w, f);
    fill_lookup(w, &f->all);
}

/* ---- rows ------------------------------------------------------------------------------------------------------ */

/* The last, partial block of a row: its weights, then zeros, so that what the file pads with reaches no result. */
static void expand_tail(const anybit_weight *w, const instance *f, const pieces *p, int r, int64_t b,
                        int64_t columns, float *out) {
    if (w->kind == ANYBIT_FLOAT) { /* rows of plain floats are not padded */
        const int32_t format = w->bits == 32 ? ANYBIT_F32 : w->bits == 16 ? ANYBIT_F16 : ANYBIT_BF16;
        float exact[BLOCK + 16];
        to_float(format, p->plane[r][0] + b * BLOCK * format_bytes[format], columns, exact);
        memcpy(out, exact, (size_t)columns * sizeof(float));
    } else {
        f->expand(w, p, r, b, 1, out);
    }
    for (int64_t i = columns; i < BLOCK; i++) out[i] = 0.0f;
}

/* Products of four rows with `tokens` rows of x (arranged where `f` wants it); `tails` holds the x of the partial block,
 * padded. */
static void products(const anybit_weight *w, const instance *f, const int64_t *rows, const float *const *x,
                     const float (*tails)[BLOCK], int64_t tokens, float (*sums)[ROWS]) {
    const int64_t whole = w->cols & ~(int64_t)(BLOCK - 1), rest = w->cols - whole;
    const int64_t most = tokens == 1 ? PIECE : MANY_PIECE;
    pieces p;
    p.all = &f->all;
    memset(sums, 0, (size_t)tokens * sizeof *sums);
    for (int64_t from = 0; from < whole; from += most) {
        const int64_t columns = whole - from < most ? whole - from : most;
        fetch(w, rows, ROWS, from, columns, f->unit, 1, &p);
        for (int64_t t = 0, step; t < tokens; t += step) {
            step = tokens - t < 2 ? 1 : tokens - t < MOST_TOKENS ? 2 : MOST_TOKENS;
            f->dot[step / 2](w, &p, columns / BLOCK, x + t, from, sums + t);
        }
    }
    if (!rest) return;
    fetch(w, rows, ROWS, whole, rest, f->unit, 0, &p);
    for (int r = 0; r < ROWS; r++) {
        float weights[BLOCK];
        expand_tail(w, f, &p, r, 0, rest, weights);
        for (int64_t t = 0; t < tokens; t++) {
            vec sum = zero();
            for (int i = 0; i < BLOCK; i += WIDTH) sum = fused(load(weights + i), load(tails[t] + i), sum);
            sums[t][r] += total(sum);
        }
    }
}

/* ---- what a thread does --------------------------------------------------------------------------------------- */

static float row_factor(const anybit_weight *w, int64_t row) {
    const anybit_array *a = &w->factor;
    return one_number(a->format, (const uint8_t *)a->data + row / a->row_block * a->row_stride);
}

/* The factor of a row, its bias, and the store. */
INLINE void finish(const anybit_job *job, const anybit_run *run, int64_t row, int64_t pair, float sum) {
    const anybit_weight *w = run->w;
    if (w->factor.data) sum *= row_factor(w, row);
    if (run->bias)
        sum += one_number(job->bias_format, (const uint8_t *)run->bias + row * format_bytes[job->bias_format]);
    put(job->y, job->y_format, pair * job->ldy + row, sum);
}

static void linear(void *shared) {
    anybit_job *job = shared;
    const anybit_weight *w = NULL;
    instance f;
    const int64_t cols = job->w->cols, whole = cols & ~(int64_t)(BLOCK - 1), rest = cols - whole;
    for (int64_t item; (item = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed)) < job->items;) {
        const anybit_run *run = job->runs + item / job->items_per_run;
        if (run->w != w) make_ready(w = run->w, &f);
        const int64_t from = item % job->items_per_run * job->rows_per_item;
        const int64_t to = from + job->rows_per_item < job->rows ? from + job->rows_per_item : job->rows;
        for (int64_t done = 0; done < run->count; done += TOKENS) {
            const int64_t tokens = run->count - done < TOKENS ? run->count - done : TOKENS, first = run->first + done;
            const float *x[TOKENS];
            float tails[TOKENS][BLOCK];
            for (int64_t t = 0; t < tokens; t++) {
                const int64_t row = job->tokens ? job->tokens[first + t] : first + t;
                const float *natural = job->x + row * job->ldx;
                x[t] = job->arranged ? job->arranged + row * job->ldarranged : natural;
                if (!rest) continue;
                memset(tails[t], 0, sizeof tails[t]);
                memcpy(tails[t], natural + whole, (size_t)rest * sizeof(float));
            }
            for (int64_t row = from; row < to; row += ROWS) {
                float sums[TOKENS][ROWS];
                int64_t rows[ROWS]; /* beyond the last row: that row again, not used */
                for (int r = 0; r < ROWS; r++) rows[r] = row + r < to ? row + r : to - 1;
                products(w, &f, rows, x, (const float(*)[BLOCK])tails, tokens, sums);
                for (int64_t r = 0; r < ROWS && row + r < to; r++)
                    for (int64_t t = 0; t < tokens; t++) finish(job, run, row + r, first + t, sums[t][r]);
            }
        }
    }
}

/* x [rows, cols] of a job in its weight's order. */
static void arrange_rows(const anybit_job *job, int64_t rows, float *to) {
    const int64_t whole = job->w->cols & ~(int64_t)(BLOCK - 1);
    for (int64_t r = 0; r < rows; r++) arrange(job->w, job->x + r * job->ldx, whole, to + r * job->ldarranged);
}

static void decode_row(const anybit_job *job, const instance *f, int64_t index, int64_t at) {
    const anybit_weight *w = job->w;
    const float factor = w->factor.data ? row_factor(w, index) : 1.0f;
    float buffer[PIECE];
    pieces p;
    p.all = &f->all;
    for (int64_t from = 0; from < w->cols; from += PIECE) {
        const int64_t columns = w->cols - from < PIECE ? w->cols - from : PIECE, blocks = columns / BLOCK;
        const int64_t rest = columns % BLOCK;
        fetch(w, &index, 1, from, columns, f->unit, 0, &p);
        f->expand(w, &p, 0, 0, blocks, buffer);
        if (rest) expand_tail(w, f, &p, 0, blocks, rest, buffer + blocks * BLOCK);
        if (w->factor.data)
            for (int64_t k = 0; k < columns; k++) buffer[k] *= factor;
        if (job->y_format == ANYBIT_F32) {
            memcpy((float *)job->y + at * job->ldy + from, buffer, (size_t)columns * sizeof(float));
            continue;
        }
        uint16_t *out = (uint16_t *)job->y + at * job->ldy + from;
        int64_t k = 0;
        if (job->y_format == ANYBIT_F16)
            for (; k + WIDTH <= columns; k += WIDTH) store_half(out + k, load(buffer + k));
        for (; k < columns; k++) put(out, job->y_format, k, buffer[k]);
    }
}

static void decode(void *shared) {
    anybit_job *job = shared;
    instance f;
    make_ready(job->w, &f);
    for (int64_t item; (item = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed)) < job->items;) {
        const int64_t from = item * job->rows_per_item;
        const int64_t to = from + job->rows_per_item < job->rows ? from + job->rows_per_item : job->rows;
        for (int64_t i = from; i < to; i++)
            decode_row(job, &f, job->row_indices ? job->row_indices[i] : job->row_start + i, i);
    }
}

#include "block_parts.h"
#include "gemm_parts.h"
#include "prefill_parts.h"

const anybit_engine ENGINE = {
    ENGINE_NAME, check, linear, decode, arranged_size, arrange_rows, to_float, GEMM_ROWS, GEMM_TILES, LANES_X, pack, gemm,
    rms_norm, rotate, attend, silu_gate, pack_keys, attend_many,
};
