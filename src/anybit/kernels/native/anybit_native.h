/* anybit's small CPU kernel: products with, and rows of, weights that stay packed.
 *
 * One struct describes a weight [rows, cols]; the code knows containers (planes, tables, scale formats), not
 * checkpoint dialects. A weight is formed in float32 exactly as the canonical form defines it, one rounding a step:
 *
 *     v = value(code)                       exact
 *     s = scale1 (* or /) scale2            rounded
 *     v = v - zero point                    rounded (exact for integers)
 *     v = v * s                             rounded
 *     v = v + minimum                       rounded
 *     v = round_to(v)                       where the format itself rounds
 *     v = v * factor                        rounded; `linear` applies the factor to the sum instead
 *
 * and only then meets x. Called through ctypes: no Python, no torch, no OpenMP of our own.
 *
 * Planes. Codes of b bits lie in planes of 8, 4, 2 or 1 bits, low bits in the first plane (7 = 4 + 2 + 1). A run of
 * 32 consecutive codes of a row takes 4 bytes for each bit of the plane's width:
 *     8 bits   byte j = code j
 *     4 bits   byte j = code j (low nibble), code 16 + j (high nibble), j < 16: the order of GGUF's Q4_0
 *     2 bits   a little-endian 64-bit word, code j at bit 2 j
 *     1 bit    a little-endian 32-bit word, code j at bit j: GGUF's Q5_0
 * Rows are padded to whole runs; what lies beyond `cols` is read but never used.
 */
#ifndef ANYBIT_NATIVE_H
#define ANYBIT_NATIVE_H

#include <stdint.h>

#define ANYBIT_ABI 5

/* Stored number formats: of scales and offsets, and (the first three) of x, y, bias and unquantized weights. */
enum anybit_format {
    ANYBIT_F32 = 0,
    ANYBIT_F16 = 1,
    ANYBIT_BF16 = 2,
    ANYBIT_E8M0 = 3,
    ANYBIT_E4M3 = 4,
    ANYBIT_UE5M3 = 5,
    ANYBIT_U8 = 6,
    ANYBIT_I8 = 7,
    ANYBIT_FORMATS = 8
};

/* How a code becomes a float32 value. */
enum anybit_kind {
    ANYBIT_TABLE = 0,     /* 1-4 bits: table[code] */
    ANYBIT_INTEGER = 1,   /* 5-7 bits: code - bias; 8 bits: the byte, signed or not */
    ANYBIT_MINIFLOAT = 2, /* 6 or 8 bits: see struct anybit_minifloat */
    ANYBIT_FLOAT = 3,     /* unquantized: bits = 32 float32, 16 float16, 17 bfloat16; no scales */
};

enum anybit_offset {
    ANYBIT_NO_OFFSET = 0,
    ANYBIT_ZERO_POINT = 1, /* subtracted from the code's value before scaling */
    ANYBIT_MINIMUM = 2,    /* added after scaling */
    ANYBIT_ROUND_F16 = 3,  /* no offset, but the product is rounded to float16 / bfloat16 (TABLE only) */
    ANYBIT_ROUND_BF16 = 4,
};

/* A small float is moved into a float16, which holds every one of them exactly, and scaled by a power of two:
 * half = (int16)(code << left) >> right, & mask; codes with (code & nan_and) == nan_is are NaN. */
typedef struct {
    int32_t left, right, mask, nan_and, nan_is;
    float power;
} anybit_minifloat;

/* One array beside the codes. Entry of weight [n, k]: data + (n / row_block) * row_stride + (k / group) elements; group
 * 0 = one entry for the whole row. Strides are in bytes. data NULL = absent. Groups are multiples of 16 columns. 64 bytes
 * beyond the last entry must be readable: entries are converted 16 at a time. */
typedef struct {
    const void *data;
    int64_t row_stride, row_block, group;
    int32_t format;
    int32_t negate; /* the values are subtracted, not added (minima) */
} anybit_array;

typedef struct {
    int32_t abi, size; /* ANYBIT_ABI, sizeof(anybit_weight): both are checked */
    int64_t rows, cols;
    int32_t kind, bits, offset_kind, divide; /* divide: s = scale1 / scale2 */
    int32_t bias, is_signed;
    anybit_minifloat minifloat;
    float table[16]; /* repeated to 16 entries below 4 bits */
    const void *plane[3];
    int64_t plane_row_stride[3];
    anybit_array scale, scale2, offset, offset2, factor;
} anybit_weight;

/* A product whose parts may be stored apart: part i gives the next rows of y. */
typedef struct {
    const anybit_weight *part[3];
    const void *bias[3];
    int32_t bias_format[3];
    int32_t parts;
} anybit_product;

/* A decoder block, x + o(attention(norm1(x))) then + down(silu(gate) * up)(norm2), for one token in float32. */
typedef struct {
    int32_t abi, size;
    anybit_product qkv, o, gate_up, down; /* rows of q, k, v below each other; of gate, up too */
    const float *norm1, *norm2;           /* [hidden] */
    const float *q_norm, *k_norm;         /* [dim], or NULL: a norm of each head before the rotation */
    float eps, scaling;
    int64_t hidden, inner, heads, kv_heads, dim, rotated;
} anybit_block;

/* Return values: 0, or what was wrong with the call. */
enum anybit_error {
    ANYBIT_OK = 0,
    ANYBIT_BAD_WEIGHT = 1,
    ANYBIT_BAD_INDEX = 2,
    ANYBIT_NO_MEMORY = 3,
    ANYBIT_BAD_ISA = 4
};

#if defined(__GNUC__)
#define ANYBIT_API __attribute__((visibility("default")))
#else
#define ANYBIT_API
#endif

ANYBIT_API int32_t anybit_abi(void);

/* The instruction set in use: "generic", "avx2" or "avx512". set_isa("") goes back to the best one. */
ANYBIT_API const char *anybit_isa(void);
ANYBIT_API int32_t anybit_set_isa(const char *name);

/* 0 if this library can run the weight. */
ANYBIT_API int32_t anybit_check(const anybit_weight *w);

/* y[m, :] = W[0] x[m, :] + bias. ldx, ldy in elements. types = format of x | of y << 4 | of bias << 8. */
ANYBIT_API int32_t anybit_linear(const anybit_weight *w, const void *x, int64_t ldx, void *y, int64_t ldy,
                                 const void *bias, int64_t m, int32_t types, int32_t threads);

/* The same for many tokens and the rows [row_start, row_start + rows) of W: y [m, rows]. Rows of W are decoded once. */
ANYBIT_API int32_t anybit_gemm_rows(const anybit_weight *w, const void *x, int64_t ldx, void *y, int64_t ldy,
                                    const void *bias, int64_t m, int64_t row_start, int64_t rows, int32_t types,
                                    int32_t threads);

/* Products with several weights alike (kind, width, sizes, offsets), as experts are: y[p, :] = w[r] x[token_ids[p], :] +
 * bias[r] for the pairs first[r] <= p < first[r + 1] of weight r < runs; token_ids NULL: token p; bias NULL: none. */
ANYBIT_API int32_t anybit_linear_each(const anybit_weight *const *w, const void *const *bias, const int64_t *first,
                                      int64_t runs, const void *x, int64_t tokens, int64_t ldx,
                                      const int32_t *token_ids, void *y, int64_t ldy, int32_t types, int32_t threads);

/* out[i, :] = W[row i] (reference weight, rounded to the format of out).
 * Row i is row_indices[i], or start + i where row_indices is NULL. */
ANYBIT_API int32_t anybit_decode_rows(const anybit_weight *w, const int64_t *row_indices, int64_t start, int64_t count,
                                      void *out, int64_t ldo, int32_t out_format, int32_t threads);

/* One step: y = block(x), both [hidden]; keys and values of the token are written at `position` of the cache, a kv head
 * every `stride` numbers, tokens `dim` apart. cosine and sine [rotated]. scratch: anybit_block_scratch(b, position). */
ANYBIT_API int64_t anybit_block_scratch(const anybit_block *b, int64_t position);
ANYBIT_API int32_t anybit_block_step(const anybit_block *b, const float *x, float *y, const float *cosine,
                                     const float *sine, float *keys, float *values, int64_t stride, int64_t position,
                                     float *scratch, int32_t threads);

/* One step through `count` blocks of one hidden size, each feeding the next: y = block[count - 1](... block[0](x)), with
 * a cache and a stride each. scratch: the most that any block wants. */
ANYBIT_API int32_t anybit_blocks_step(const anybit_block *const *blocks, int64_t count, const float *x, float *y,
                                      const float *cosine, const float *sine, float *const *keys, float *const *values,
                                      const int64_t *strides, int64_t position, float *scratch, int32_t threads);

/* As anybit_block_step for many tokens, x and y [tokens, hidden], each attending to the cache and the tokens up to itself; cosine and
 * sine [tokens, rotated]. dim must be a multiple of 32, at most 256, and rotated must be dim. */
ANYBIT_API int64_t anybit_block_many_scratch(const anybit_block *b, int64_t position, int64_t tokens, int32_t threads);
ANYBIT_API int32_t anybit_block_many(const anybit_block *b, const float *x, float *y, const float *cosine,
                                     const float *sine, float *keys, float *values, int64_t stride, int64_t position,
                                     int64_t tokens, float *scratch, int32_t threads);

#endif
