/* Products of few tokens in lanes: a vector holds columns that lie apart, so that codes come out of whole registers with a
 * shift or a look-up each, and a scale meets a sum of several columns instead of every weight. x is brought to the same
 * order once a call (`arrange`). Included by engine.c for processors with AVX-512.
 *
 * A run is 256 columns of codes of 1 to 3 bits, lane i holding column 16 i + v in vector v; or 128 columns of wider
 * codes, in two halves h of four vectors k, lane 4 q + d. Where no minimum is added the scale is applied after the sum
 * of a unit: one rounding for several columns where the weight itself would have one each.
 */

/* Orders of x; the column of lane 4 q + d in vector k of half h of a run: */
enum {
    AS_IT_IS,
    BY_UNITS,   /* 256 columns: 16 (4 q + d) + v */
    BY_NIBBLES, /* 32 q + 16 h + 4 d + k */
    BY_HALVES,  /* 32 q + 16 h + 8 (k / 2) + 2 d + k % 2 */
    BY_BYTES    /* 64 h + 16 q + 8 (k / 2) + 2 d + k % 2 */
};

/* True where a scale can meet a sum instead of each weight. */
INLINE int is_late(const int offset_kind) {
    return offset_kind == ANYBIT_NO_OFFSET || offset_kind == ANYBIT_ZERO_POINT;
}

INLINE int order_of(const int kind, const int bits, const int offset_kind) {
    if (kind == ANYBIT_TABLE && (bits == 1 || bits == 2)) return BY_UNITS;
    /* with an offset it takes less to make a table of 16 for each unit than to treat each weight */
    if (kind == ANYBIT_TABLE && bits == 4) return offset_kind == ANYBIT_NO_OFFSET ? BY_NIBBLES : AS_IT_IS;
#if defined(HAS_BYTE_LOOKUP)
    if (kind == ANYBIT_TABLE && bits == 3) return BY_UNITS;
    if (kind == ANYBIT_INTEGER && bits < 8) return BY_HALVES;
    if (kind == ANYBIT_MINIFLOAT) return bits == 6 ? BY_HALVES : BY_BYTES;
#endif
    return AS_IT_IS;
}

INLINE int64_t run_of(const int order) { return order == BY_UNITS ? 256 : 128; }

/* out[v] lane i = x[16 i + v] */
INLINE void transposed(const float *x, float *out) {
    vec a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = load(x + 16 * i);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) { /* pairs of rows, then fours of rows */
        const int other = i ^ 1;
        b[i] = i % 2 ? _mm512_unpackhi_ps(a[other], a[i]) : _mm512_unpacklo_ps(a[i], a[other]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) { /* a[4 g + c]: column 4 l + c of rows 4 g .. + 3 in each 128-bit lane l */
        const int g = i & 12, c = i & 3;
        const __m512d even = _mm512_castps_pd(b[g + c / 2]), odd = _mm512_castps_pd(b[g + 2 + c / 2]);
        a[i] = _mm512_castpd_ps(c % 2 ? _mm512_unpackhi_pd(even, odd) : _mm512_unpacklo_pd(even, odd));
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) { /* 128-bit lane l of a[4 g + c] to lane g of column 4 l + c */
        const vec ab = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x44), cd = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x44);
        const vec ef = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xee), gh = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xee);
        store(out + 16 * c, _mm512_shuffle_f32x4(ab, cd, 0x88));
        store(out + 16 * (4 + c), _mm512_shuffle_f32x4(ab, cd, 0xdd));
        store(out + 16 * (8 + c), _mm512_shuffle_f32x4(ef, gh, 0x88));
        store(out + 16 * (12 + c), _mm512_shuffle_f32x4(ef, gh, 0xdd));
    }
}

/* 128 columns in one of the other orders. */
INLINE void shuffled(const float *x, float *out, const int order) {
    const __m512i lane = counting(1), d = _mm512_and_si512(lane, _mm512_set1_epi32(3));
    const __m512i second = _mm512_slli_epi32(_mm512_and_si512(lane, _mm512_set1_epi32(4)), 2); /* 16 in lanes 4-7, 12-15 */
    for (int h = 0; h < 2; h++)
        for (int k = 0; k < 4; k++) {
            const __m512i element = order == BY_NIBBLES
                                        ? _mm512_add_epi32(_mm512_slli_epi32(d, 2), _mm512_set1_epi32(k))
                                        : _mm512_add_epi32(_mm512_slli_epi32(d, 1), _mm512_set1_epi32(k / 2 * 8 + k % 2));
            const __m512i index = _mm512_or_si512(element, second);
            const float *from = x + (order == BY_BYTES ? 64 * h : 16 * h);
            const int apart = order == BY_BYTES ? 16 : 32;
            const vec low = _mm512_permutex2var_ps(load(from), index, load(from + apart));
            const vec high = _mm512_permutex2var_ps(load(from + 2 * apart), index, load(from + 3 * apart));
            store(out + 16 * (4 * h + k), _mm512_mask_blend_ps(0xff00, low, high));
        }
}

/* `columns` numbers, a multiple of 32, in the weight's order, the last run filled with zeros. */
static void arrange(const anybit_weight *w, const float *x, int64_t columns, float *to) {
    const int order = order_of(w->kind, w->bits, w->offset_kind);
    const int64_t run = run_of(order);
    for (int64_t from = 0; from < columns; from += run) {
        float last[256];
        const float *in = x + from;
        if (columns - from < run) {
            memset(last, 0, sizeof last);
            in = memcpy(last, in, (size_t)(columns - from) * sizeof(float));
        }
        if (order == BY_UNITS)
            transposed(in, to + from);
        else if (order == BY_NIBBLES)
            shuffled(in, to + from, BY_NIBBLES);
        else if (order == BY_HALVES)
            shuffled(in, to + from, BY_HALVES);
        else
            shuffled(in, to + from, BY_BYTES);
    }
}

/* Floats of an arranged row; 0 where x stays as it is. */
static int64_t arranged_size(const anybit_weight *w) {
    const int order = order_of(w->kind, w->bits, w->offset_kind);
    return order == AS_IT_IS ? 0 : (w->cols + run_of(order) - 1) & ~(run_of(order) - 1);
}

static int reads_by_units(const anybit_weight *w) { return order_of(w->kind, w->bits, w->offset_kind) == BY_UNITS; }

/* Scales or offsets of a run that begins with block b, 1 << shift columns each, a lane each; lanes without columns are
 * zero. Groups of more columns than a run are multiples of it. */
INLINE vec lanes_of(const float *entries, const int shift, int64_t b, const int order, const int h, const int is_whole,
                    __mmask16 lanes) {
    const __m512i lane = counting(1), q = _mm512_srli_epi32(lane, 2);
    const __m512i column = order == BY_UNITS   ? _mm512_slli_epi32(lane, 4)
                           : order == BY_BYTES ? _mm512_add_epi32(_mm512_slli_epi32(q, 4), _mm512_set1_epi32(64 * h))
                                               : _mm512_add_epi32(_mm512_slli_epi32(q, 5), _mm512_set1_epi32(16 * h));
    const __m512i index = _mm512_srl_epi32(column, _mm_cvtsi32_si128(shift));
    const vec some = load(entries + (BLOCK * b >> shift));
    return is_whole ? _mm512_permutexvar_ps(index, some) : _mm512_maskz_permutexvar_ps(lanes, index, some);
}

INLINE __mmask16 first_lanes(int64_t count) {
    return (__mmask16)(count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0);
}

/* Words of 32 bits; of a row's last run only the first `count` are there. Masked loads of whole runs would hold up what
 * follows them. */
INLINE __m512i load_words(const uint8_t *from, const int is_whole, int64_t count) {
    return is_whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi32(first_lanes(count), from);
}
INLINE __m256i load_half_words(const uint8_t *from, const int is_whole, int64_t count) {
    return is_whole ? _mm256_loadu_si256((const __m256i *)from)
                    : _mm256_maskz_loadu_epi32((__mmask8)first_lanes(count), from);
}
INLINE __m128i load_quarter_words(const uint8_t *from, const int is_whole, int64_t count) {
    return is_whole ? _mm_loadu_si128((const __m128i *)from)
                    : _mm_maskz_loadu_epi32((__mmask8)(first_lanes(count) & 15), from);
}

/* Asks for the codes of later rows, `bytes` of each from `at`: a request for each line that begins there. */
INLINE void ask_for(const pieces *p, const int plane, int64_t at, const int bytes) {
    if (bytes < 64 && at % 64) return;
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p->plane[r][plane] + p->ahead[plane] + at + i);
}

/* v - zero point, or the finished weight where the scale cannot wait. */
INLINE vec offset_or_weight(const int offset_kind, vec v, vec s, vec o) {
    if (offset_kind == ANYBIT_NO_OFFSET) return v;
    if (offset_kind == ANYBIT_ZERO_POINT) return sub(v, o);
    return apply(offset_kind, v, s, o);
}

#if defined(HAS_BYTE_LOOKUP)
/* ---- bytes of codes ---------------------------------------------------------------------------------------------- */

/* `of` for each byte, 16 of them in every 128-bit lane. */
#define BYTES_OF(of) \
    _mm512_broadcast_i32x4(_mm_setr_epi8(of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7), of(8), of(9), of(10), \
                                         of(11), of(12), of(13), of(14), of(15)))
/* Byte j gets the eight bits from here on of a 64-bit word that is the same in both halves of a lane (the instruction reads
 * places modulo 64): its code's bits then stand where the other planes leave them room. */
#define PAIR_OF_LOW(j) (char)(2 * (j) - 4)
#define PAIR_OF_HIGH(j) (char)(32 + 2 * (j) - 4)
#define BIT_5_OF_LOW(j) (char)((j) - 4)
#define BIT_5_OF_HIGH(j) (char)(16 + (j) - 4)
#define BIT_7_OF_LOW(j) (char)((j) - 6)
#define BIT_7_OF_HIGH(j) (char)(16 + (j) - 6)
#define FOUR_BITS_OF(j) (char)(16 * ((j) % 8 / 4) + 4 * ((j) % 4))

/* Codes of half h of a run, a byte each with anything above the code's bits: byte p of lane q is column 32 q + 16 h + p. */
INLINE __m512i half_codes(const uint8_t *const plane[3], int64_t b, const int bits, const int h, const int is_whole,
                          int64_t left) {
    const __m512i lane = counting(1), q = _mm512_srli_epi32(lane, 2);
    __m512i c = load_words(plane[0] + 16 * b, is_whole, 4 * left);
    if (h) c = _mm512_srli_epi16(c, 4);
    if (bits & 2) {
        const __m256i run = load_half_words(plane[1] + 8 * b, is_whole, 2 * left);
        const __m512i words = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3), _mm512_castsi256_si512(run));
        const __m512i pairs = _mm512_multishift_epi64_epi8(h ? BYTES_OF(PAIR_OF_HIGH) : BYTES_OF(PAIR_OF_LOW), words);
        c = _mm512_ternarylogic_epi32(c, pairs, _mm512_set1_epi8(15), CHOOSE);
    }
    if (bits & 1) {
        const uint8_t *bits_at = plane[bits == 5 ? 1 : 2] + 4 * b;
        const __m128i run = load_quarter_words(bits_at, is_whole, left);
        const __m512i words = _mm512_permutexvar_epi32(q, _mm512_castsi128_si512(run));
        const __m512i places = bits == 5 ? (h ? BYTES_OF(BIT_5_OF_HIGH) : BYTES_OF(BIT_5_OF_LOW))
                                         : (h ? BYTES_OF(BIT_7_OF_HIGH) : BYTES_OF(BIT_7_OF_LOW));
        const __m512i ones = _mm512_multishift_epi64_epi8(places, words);
        c = _mm512_ternarylogic_epi32(c, ones, _mm512_set1_epi8(bits == 5 ? 15 : 63), CHOOSE);
    }
    return c;
}

/* The values of half h of a run: both bytes of a bfloat16 are looked up by 64 codes at once and put side by side. */
INLINE void byte_values(const anybit_weight *w, const pieces *p, int r, int64_t b, const int kind, const int bits,
                        const int h, const int is_whole, int64_t left, vec out[4]) {
    const uint8_t(*bytes)[128] = p->all->bytes;
    __m512i c, lower = _mm512_load_si512(bytes[0]), upper = _mm512_load_si512(bytes[1]);
    if (kind == ANYBIT_MINIFLOAT && bits == 8)
        c = load_words(p->plane[r][0] + 32 * b + 64 * h, is_whole, 8 * left - 16 * h);
    else
        c = half_codes(p->plane[r], b, bits, h, is_whole, left);
    if (bits < 7) {
        lower = _mm512_permutexvar_epi8(c, lower);
        upper = _mm512_permutexvar_epi8(c, upper);
    } else {
        lower = _mm512_permutex2var_epi8(lower, c, _mm512_load_si512(bytes[0] + 64));
        upper = _mm512_permutex2var_epi8(upper, c, _mm512_load_si512(bytes[1] + 64));
    }
    if (bits == 8) {
        upper = _mm512_ternarylogic_epi32(upper, c, _mm512_set1_epi8(127), CHOOSE); /* the code's sign */
        if (w->minifloat.nan_and == 0xff) {                                        /* a code of NaN beside -x */
            const __mmask64 nan = _mm512_cmpeq_epi8_mask(c, _mm512_set1_epi8((char)w->minifloat.nan_is));
            upper = _mm512_mask_mov_epi8(upper, nan, _mm512_set1_epi8(127));
            lower = _mm512_mask_mov_epi8(lower, nan, _mm512_set1_epi8(-1));
        }
    }
    const __m512i first = _mm512_unpacklo_epi8(lower, upper), second = _mm512_unpackhi_epi8(lower, upper);
    const __m512i top = _mm512_set1_epi32((int)0xffff0000);
    out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(first, 16));
    out[1] = _mm512_castsi512_ps(_mm512_and_si512(first, top));
    out[2] = _mm512_castsi512_ps(_mm512_slli_epi32(second, 16));
    out[3] = _mm512_castsi512_ps(_mm512_and_si512(second, top));
}
#else
INLINE void byte_values(const anybit_weight *w, const pieces *p, int r, int64_t b, const int kind, const int bits,
                        const int h, const int is_whole, int64_t left, vec out[4]) {
    (void)w, (void)p, (void)r, (void)b, (void)kind, (void)bits, (void)h, (void)is_whole, (void)left, (void)out;
}
#endif

/* ---- codes of 1 to 3 bits ---------------------------------------------------------------------------------------- */

/* Two look-up tables read four bits of a lane: 3 bits of one code, or codes of 2 bits in turn, or 1 bit of four. */
typedef struct {
    __m512i codes[2];
} unit_codes;

#if defined(HAS_BYTE_LOOKUP)
/* Codes of 3 bits in fours of bits, codes[v % 2] holding v at bit 4 (v / 2): two bits, one of no meaning, the third. */
INLINE unit_codes three_bits(__m512i pairs, __m256i ones) {
    /* each byte gets the third bits of its four codes; the matrices move bits 0 and 2, or 1 and 3, to 3 and 7 */
    const __m512i four = _mm512_multishift_epi64_epi8(BYTES_OF(FOUR_BITS_OF), _mm512_cvtepu32_epi64(ones));
    const __m512i even = _mm512_gf2p8affine_epi64_epi8(four, _mm512_set1_epi64(0x0000000100000004), 0);
    const __m512i odd = _mm512_gf2p8affine_epi64_epi8(four, _mm512_set1_epi64(0x0000000200000008), 0);
    const __m512i mask = _mm512_set1_epi8(0x33);
    return (unit_codes){{_mm512_ternarylogic_epi32(pairs, even, mask, CHOOSE),
                         _mm512_ternarylogic_epi32(_mm512_srli_epi32(pairs, 2), odd, mask, CHOOSE)}};
}
#endif

INLINE unit_codes unit_codes_of(const pieces *p, int r, int64_t b, const int bits, const int is_whole, int64_t left) {
    unit_codes c;
    if (bits == 1) {
        c.codes[0] = _mm512_cvtepu16_epi32(load_half_words(p->plane[r][0] + 4 * b, is_whole, left));
        return c;
    }
    c.codes[0] = load_words(p->plane[r][0] + 8 * b, is_whole, 2 * left);
#if defined(HAS_BYTE_LOOKUP)
    if (bits == 3) c = three_bits(c.codes[0], load_half_words(p->plane[r][1] + 4 * b, is_whole, left));
#endif
    return c;
}

INLINE vec unit_values(const unit_codes *c, const vec tables[4], const int bits, const int v) {
    if (bits == 1) return _mm512_permutexvar_ps(_mm512_srli_epi32(c->codes[0], v / 4 * 4), tables[v % 4]);
    if (bits == 2) return _mm512_permutexvar_ps(_mm512_srli_epi32(c->codes[0], v / 2 * 4), tables[v % 2]);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(c->codes[v % 2], v / 2 * 4), tables[0]);
}

INLINE void unit_tables(const float *values, const int bits, vec tables[4]) {
    const __m512i lane = counting(1);
    for (int i = 0; i < 4; i++) {
        __m512i code = _mm512_and_si512(_mm512_srli_epi32(lane, bits < 3 ? i * bits : 0), _mm512_set1_epi32(bits < 2 ? 1 : 3));
        if (bits == 3) /* bits 0 and 1, then one of no meaning, then bit 2 */
            code = _mm512_or_si512(code, _mm512_and_si512(_mm512_srli_epi32(lane, 1), _mm512_set1_epi32(4)));
        tables[i] = _mm512_permutexvar_ps(code, load(values));
    }
}

INLINE vec fine_lanes(const two_levels *p, int r, int64_t b, const int is_whole, __mmask16 lanes) {
    const uint8_t *from = p->fine[r] + 2 * b;
    const __m128i bytes = is_whole ? _mm_loadu_si128((const __m128i *)from) : _mm_maskz_loadu_epi8(lanes, from);
    const __m512i words = p->is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
    if (b % 32 == 0) __builtin_prefetch(from + AHEAD);
    return mul(_mm512_cvtepi32_ps(words), splat(p->coarse[r][b / 8]));
}

/* Adds a run of 256 columns, or its first `left` blocks, to sum[row][token]. */
INLINE void add_units(const pieces *p, int64_t b, const int is_whole, int64_t left, const float *const *x,
                      const vec tables[4], vec (*sum)[MOST_TOKENS], const int tokens, const int bits,
                      const int offset_kind, const int unit) {
    const int chains = tokens == 1 ? 2 : 1, has_offset = adds_offset(offset_kind);
    const __mmask16 lanes = is_whole ? 0xffff : first_lanes(2 * left);
    unit_codes codes[ROWS];
    vec acc[ROWS][MOST_TOKENS + 1], scale[ROWS], offset[ROWS];
    ask_for(p, 0, b * (bits == 1 ? 4 : 8), bits == 1 ? 32 : 64);
    if (bits == 3) ask_for(p, 1, 4 * b, 32);
    for (int r = 0; r < ROWS; r++) {
        codes[r] = unit_codes_of(p, r, b, bits, is_whole, left);
        scale[r] = p->scales.fine[0] ? fine_lanes(&p->scales, r, b, is_whole, lanes)
                                     : lanes_of(p->scale[r], p->scale_shift, b, BY_UNITS, 0, is_whole, lanes);
        offset[r] = !has_offset            ? zero()
                    : p->offsets.fine[0] ? fine_lanes(&p->offsets, r, b, is_whole, lanes)
                                         : lanes_of(p->offset[r], unit == 16 ? 4 : 5, b, BY_UNITS, 0, is_whole, lanes);
    }
#pragma GCC unroll 16
    for (int v = 0; v < 16; v++) {
        vec in[MOST_TOKENS];
        for (int t = 0; t < tokens; t++) in[t] = load(x[t] + BLOCK * b + 16 * v);
        for (int r = 0; r < ROWS; r++) {
            const vec value = unit_values(&codes[r], tables, bits, v);
            const vec weight = offset_or_weight(offset_kind, value, scale[r], offset[r]);
            for (int t = 0; t < tokens; t++) {
                vec *to = &acc[r][t * chains + v % chains];
                *to = v < chains ? mul(weight, in[t]) : fused(weight, in[t], *to);
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < tokens; t++) {
            const vec all = chains == 2 ? add(acc[r][0], acc[r][1]) : acc[r][t];
            sum[r][t] = is_late(offset_kind) ? fused(all, scale[r], sum[r][t]) : add(all, sum[r][t]);
        }
}

INLINE void dot_units(const anybit_weight *w, const pieces *p, int64_t blocks, const float *const *x,
                      float (*sums)[ROWS], const int tokens, const int bits, const int offset_kind, const int unit) {
    vec tables[4], sum[ROWS][MOST_TOKENS];
    unit_tables(w->table, bits, tables);
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < tokens; t++) sum[r][t] = zero();
    int64_t b = 0;
    for (; b + 8 <= blocks; b += 8) add_units(p, b, 1, 8, x, tables, sum, tokens, bits, offset_kind, unit);
    if (b < blocks) add_units(p, b, 0, blocks - b, x, tables, sum, tokens, bits, offset_kind, unit);
    for (int t = 0; t < tokens; t++) add_totals(sum[0][t], sum[1][t], sum[2][t], sum[3][t], sums[t]);
}

/* ---- wider codes -------------------------------------------------------------------------------------------------- */

INLINE void nibble_values(__m512i codes, const int h, vec values, vec out[4]) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) out[k] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 8 * k + 4 * h), values);
}

/* Adds a run of 128 columns, or its first `left` blocks, to sum[row][token]. */
INLINE void add_halves(const anybit_weight *w, const pieces *p, int64_t b, const int is_whole, int64_t left,
                       const float *const *x, vec (*sum)[MOST_TOKENS], const int tokens, const int kind, const int bits,
                       const int offset_kind, const int unit) {
    const int order = order_of(kind, bits, offset_kind), has_offset = adds_offset(offset_kind);
    const int is_shared = order != BY_BYTES && unit == 32; /* both halves have the same units */
    const vec values = load(w->table);
    vec acc[ROWS][MOST_TOKENS];
    ask_for(p, 0, b * (bits == 8 ? 32 : 16), bits == 8 ? 128 : 64);
    if (bits & 2) ask_for(p, 1, b * 8, 32);
    if (bits & 1) ask_for(p, bits == 7 ? 2 : 1, b * 4, 16);
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        const __mmask16 lanes = is_whole ? 0xffff : first_lanes(order == BY_BYTES ? 8 * left - 16 * h : 4 * left);
        for (int r = 0; r < ROWS; r++) {
            const vec s = lanes_of(p->scale[r], p->scale_shift, b, order, h, is_whole, lanes);
            const vec o = has_offset ? lanes_of(p->offset[r], unit == 16 ? 4 : 5, b, order, h, is_whole, lanes) : zero();
            vec weights[4];
            if (order == BY_NIBBLES)
                nibble_values(load_words(p->plane[r][0] + 16 * b, is_whole, 4 * left), h, values, weights);
            else
                byte_values(w, p, r, b, kind, bits, h, is_whole, left, weights);
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) weights[k] = offset_or_weight(offset_kind, weights[k], s, o);
            for (int t = 0; t < tokens; t++) {
                const float *in = x[t] + BLOCK * b + 64 * h;
                vec here = mul(weights[0], load(in));
#pragma GCC unroll 3
                for (int k = 1; k < 4; k++) here = fused(weights[k], load(in + 16 * k), here);
                acc[r][t] = is_shared && h ? add(acc[r][t], here) : here;
                if (is_shared && !h) continue;
                sum[r][t] = is_late(offset_kind) ? fused(acc[r][t], s, sum[r][t]) : add(acc[r][t], sum[r][t]);
            }
        }
    }
}

INLINE void dot_halves(const anybit_weight *w, const pieces *p, int64_t blocks, const float *const *x,
                       float (*sums)[ROWS], const int tokens, const int kind, const int bits, const int offset_kind,
                       const int unit) {
    vec sum[ROWS][MOST_TOKENS];
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < tokens; t++) sum[r][t] = zero();
    int64_t b = 0;
    for (; b + 4 <= blocks; b += 4) add_halves(w, p, b, 1, 4, x, sum, tokens, kind, bits, offset_kind, unit);
    if (b < blocks) add_halves(w, p, b, 0, blocks - b, x, sum, tokens, kind, bits, offset_kind, unit);
    for (int t = 0; t < tokens; t++) add_totals(sum[0][t], sum[1][t], sum[2][t], sum[3][t], sums[t]);
}
