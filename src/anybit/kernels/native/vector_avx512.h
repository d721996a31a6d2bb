/* AVX-512 (F, BW, VL, DQ): a block of 32 codes is two vectors of 16. */
#include <immintrin.h>

typedef __m512 vec;
#define WIDTH 16
#define VECTORS 2
#define MOST_TOKENS 4 /* rows of x that share decoded weights in registers */

INLINE vec load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void store(float *p, vec v) { _mm512_storeu_ps(p, v); }
INLINE vec zero(void) { return _mm512_setzero_ps(); }
INLINE vec splat(float f) { return _mm512_set1_ps(f); }
INLINE vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
INLINE vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE vec divide(vec a, vec b) { return _mm512_div_ps(a, b); }
INLINE vec fused(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float total(vec v) { return _mm512_reduce_add_ps(v); }
INLINE void add_totals(vec a, vec b, vec c, vec d, float *sums) { /* the sums over the lanes of four vectors at once */
    vec ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    vec cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    vec all = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), four));
}
INLINE vec load_half(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void store_half(uint16_t *p, vec v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, 0)); }
INLINE vec through_half(vec v) { return _mm512_cvtph_ps(_mm512_cvtps_ph(v, 0)); }

INLINE vec load_bfloat(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

INLINE __m512i sixteen_bytes(const uint8_t *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE vec load_unsigned(const uint8_t *p) { return _mm512_cvtepi32_ps(sixteen_bytes(p)); }
INLINE vec load_signed(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE vec load_fields(const uint8_t *p, const int left, const int right, const uint32_t mask) {
    __m512i moved = _mm512_srai_epi32(_mm512_slli_epi32(sixteen_bytes(p), left), right);
    return _mm512_castsi512_ps(_mm512_and_si512(moved, _mm512_set1_epi32((int)mask)));
}
INLINE vec repeated(const float *p, const int shift) { /* each number 2^shift times */
    __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(lane, shift), load(p));
}
INLINE vec maximum(vec a, vec b) { return _mm512_max_ps(a, b); } /* b where either is NaN; so does minimum */
INLINE vec minimum(vec a, vec b) { return _mm512_min_ps(a, b); }
INLINE vec times_power_of_two(vec v, vec whole) { return _mm512_scalef_ps(v, whole); }
INLINE vec nan_from(vec v, float limit) { /* NaN where |v| >= limit */
    return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(_mm512_abs_ps(v), splat(limit), _CMP_GE_OQ), splat(NAN));
}

INLINE vec through_bfloat(vec v) { /* not VCVTNEPS2BF16: that one flushes subnormals */
    __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __m512 rounded = _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32((int)0xffff0000)));
    return _mm512_mask_mov_ps(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), v);
}

/* Sixteen values, looked up by the low four bits of an index. */
typedef struct {
    vec values;
} table;

INLINE table table_of(const float *values) { return (table){load(values)}; }
#define TABLE_MAP(t, expression) /* expression in v */ \
    do { vec v = (t).values; (t).values = (expression); } while (0)

INLINE __m512i splat32(const uint8_t *p) {
    int32_t word;
    memcpy(&word, p, 4);
    return _mm512_set1_epi32(word);
}

INLINE __mmask16 mask16(const uint8_t *p) {
    uint16_t bits;
    memcpy(&bits, p, 2);
    return (__mmask16)bits;
}

INLINE __m512i counting(int step) {
    __m512i i = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return step == 1 ? i : _mm512_slli_epi32(i, 1);
}

INLINE __m512i splat64(const uint8_t *p) {
    int64_t word;
    memcpy(&word, p, 8);
    return _mm512_set1_epi64(word);
}

/* Codes in pairs of words, code j in word 2 j and code 16 + j in word 2 j + 1: first a byte shuffle that brings the byte
 * of each code to the lower or upper half of its word, then a shift for each word. The macros give lane j. */
#define EACH_LANE(lane) \
    _mm512_setr_epi32(lane(0), lane(1), lane(2), lane(3), lane(4), lane(5), lane(6), lane(7), lane(8), lane(9), \
                      lane(10), lane(11), lane(12), lane(13), lane(14), lane(15))
#define LOW_BYTES(first, second) (int)(0x80008000u | (first) | (unsigned)(second) << 16) /* 0x80 leaves zero */
#define HIGH_BYTES(first, second) (int)(0x00800080u | (first) << 8 | (unsigned)(second) << 24)
#define NIBBLE_LOW(j) LOW_BYTES(j, j)
#define PAIR_LOW(j) LOW_BYTES((j) / 4, 4 + (j) / 4)
#define PAIR_HIGH(j) HIGH_BYTES((j) / 4, 4 + (j) / 4)
#define BIT_HIGH(j) HIGH_BYTES((j) / 8, 2 + (j) / 8)
#define NIBBLE_TO_0(j) (4 << 16)
#define PAIR_TO_0(j) (2 * ((j) % 4) * 0x10001)
#define PAIR_TO_4(j) ((4 + 2 * ((j) % 4)) * 0x10001)
#define BIT_TO_2(j) ((6 + (j) % 8) * 0x10001)
#define BIT_TO_4(j) ((4 + (j) % 8) * 0x10001)
#define CHOOSE 0xe4 /* ternary logic: the bits of the third choose between the first and the second */

/* Looked-up values of block b; `low` serves codes 0-15, `high` 16-31. Bits above a code need no clearing where the
 * table repeats and the instruction reads four bits. */
INLINE void table_block(const int bits, const uint8_t *const plane[3], int64_t b, table low, table high, vec out[2]) {
    __m512i c0, c1;
    if (bits == 4) {
        c0 = sixteen_bytes(plane[0] + 16 * b);
        c1 = _mm512_srli_epi32(c0, 4);
    } else if (bits == 1) {
        __m512i word = splat32(plane[0] + 4 * b);
        c0 = _mm512_srlv_epi32(word, counting(1));
        c1 = _mm512_srlv_epi32(word, _mm512_add_epi32(counting(1), _mm512_set1_epi32(16)));
    } else if (bits == 2) {
        c0 = _mm512_srlv_epi32(splat32(plane[0] + 8 * b), counting(2));
        c1 = _mm512_srlv_epi32(splat32(plane[0] + 8 * b + 4), counting(2));
    } else { /* word 2 j is code j, word 2 j + 1 code 16 + j */
        __m512i two = _mm512_shuffle_epi8(splat64(plane[0] + 8 * b), EACH_LANE(PAIR_LOW));
        __m512i one = _mm512_shuffle_epi8(splat32(plane[1] + 4 * b), EACH_LANE(BIT_HIGH));
        two = _mm512_srlv_epi16(two, EACH_LANE(PAIR_TO_0));
        one = _mm512_srlv_epi16(one, EACH_LANE(BIT_TO_2));
        c0 = _mm512_ternarylogic_epi32(two, one, _mm512_set1_epi16(3), CHOOSE);
        c1 = _mm512_srli_epi32(c0, 16);
    }
    out[0] = _mm512_permutexvar_ps(c0, low.values);
    out[1] = _mm512_permutexvar_ps(c1, high.values);
}

/* Codes of 7 or 8 bits as integers. */
INLINE void integers(const int bits, const int is_signed, const uint8_t *const plane[3], int64_t b, __m512i c[2]) {
    if (bits == 8) {
        for (int i = 0; i < 2; i++) {
            __m128i bytes = _mm_loadu_si128((const __m128i *)(plane[0] + 32 * b + 16 * i));
            c[i] = is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
        }
        return;
    }
    __m512i bytes = sixteen_bytes(plane[0] + 16 * b);
    c[0] = _mm512_and_si512(bytes, _mm512_set1_epi32(15));
    c[1] = _mm512_srli_epi32(bytes, 4);
    for (int i = 0; i < 2; i++) { /* code i's two bits rotate from 2 i to 4 */
        __m512i turn = _mm512_sub_epi32(counting(2), _mm512_set1_epi32(4));
        __m512i two = _mm512_rorv_epi32(splat32(plane[1] + 8 * b + 4 * i), turn);
        c[i] = _mm512_ternarylogic_epi32(c[i], two, _mm512_set1_epi32(0x30), 0xf8); /* c | (two & 0x30) */
    }
    const uint8_t *one = plane[2] + 4 * b;
    const __m512i top = _mm512_set1_epi32(64);
    c[0] = _mm512_mask_or_epi32(c[0], mask16(one), c[0], top);
    c[1] = _mm512_mask_or_epi32(c[1], mask16(one + 2), c[1], top);
}

/* The values of codes of 5 to 8 bits as bfloat16, which holds every one of them exactly: of 5 and 6 bits all, repeated to
 * 64; of 7 bits and of 8-bit floats the first 128 (the sign is the top bit). */
typedef struct {
    _Alignas(64) uint16_t words[128];
    _Alignas(64) uint8_t bytes[2][128]; /* the same, lower and upper bytes apart */
} lookup;

INLINE vec minifloats(__m512i codes, const anybit_minifloat *f) { /* of sixteen codes, 32 bits each */
    __m512i words = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(codes));
    __m512i moved = _mm512_sra_epi16(_mm512_sll_epi16(words, _mm_cvtsi32_si128(f->left)), _mm_cvtsi32_si128(f->right));
    __m512i half = _mm512_and_si512(moved, _mm512_set1_epi16((short)f->mask));
    return mul(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), splat(f->power));
}

static void fill_lookup(const anybit_weight *w, lookup *made) {
    const int is_integer = w->kind == ANYBIT_INTEGER, is_float = w->kind == ANYBIT_MINIFLOAT;
    if (!(is_integer && w->bits >= 5 && w->bits < 8) && !is_float) return;
    for (int i = 0; i < 128; i += 16) {
        const __m512i codes = _mm512_add_epi32(counting(1), _mm512_set1_epi32(i % (1 << w->bits)));
        vec values = is_float ? minifloats(codes, &w->minifloat)
                              : _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(w->bias)));
        const __mmask16 nan = _mm512_cmpeq_epi32_mask(_mm512_and_si512(codes, _mm512_set1_epi32(w->minifloat.nan_and)),
                                                      _mm512_set1_epi32(w->minifloat.nan_is));
        if (is_float) values = _mm512_mask_mov_ps(values, nan, splat(NAN));
        const __m512i words = _mm512_srli_epi32(_mm512_castps_si512(values), 16);
        _mm256_store_si256((__m256i *)(made->words + i), _mm512_cvtepi32_epi16(words));
        _mm_store_si128((__m128i *)(made->bytes[0] + i), _mm512_cvtepi32_epi8(words));
        _mm_store_si128((__m128i *)(made->bytes[1] + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(words, 8)));
    }
}

/* Codes of 5 or 6 bits: word 2 j is code j, word 2 j + 1 code 16 + j, with other bits above them. */
INLINE __m512i code_words(const int bits, const uint8_t *const plane[3], int64_t b) {
    __m512i nibbles = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(plane[0] + 16 * b))), rest;
    nibbles = _mm512_srlv_epi16(_mm512_shuffle_epi8(nibbles, EACH_LANE(NIBBLE_LOW)), EACH_LANE(NIBBLE_TO_0));
    if (bits == 6) {
        rest = _mm512_shuffle_epi8(splat64(plane[1] + 8 * b), EACH_LANE(PAIR_HIGH));
        rest = _mm512_srlv_epi16(rest, EACH_LANE(PAIR_TO_4));
    } else {
        rest = _mm512_shuffle_epi8(splat32(plane[1] + 4 * b), EACH_LANE(BIT_HIGH));
        rest = _mm512_srlv_epi16(rest, EACH_LANE(BIT_TO_4));
    }
    return _mm512_ternarylogic_epi32(nibbles, rest, _mm512_set1_epi16(15), CHOOSE);
}

INLINE void looked_up(const int bits, const uint8_t *const plane[3], int64_t b, const lookup *t, vec out[2]) {
    __m512i codes = code_words(bits, plane, b);
    const __m512i first = _mm512_load_si512(t->words), second = _mm512_load_si512(t->words + 32);
    __m512i words = bits == 5 ? _mm512_permutexvar_epi16(codes, first) : _mm512_permutex2var_epi16(first, codes, second);
    out[0] = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
    out[1] = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32((int)0xffff0000)));
}

INLINE void integer_block(const int bits, const int is_signed, const uint8_t *const plane[3], int64_t b, int32_t bias,
                          const lookup *t, vec out[2]) {
    if (bits < 7) {
        looked_up(bits, plane, b, t, out);
        return;
    }
    __m512i c[2];
    integers(bits, is_signed, plane, b, c);
    for (int i = 0; i < 2; i++)
        out[i] = _mm512_cvtepi32_ps(bits == 8 ? c[i] : _mm512_sub_epi32(c[i], _mm512_set1_epi32(bias)));
}

INLINE void minifloat_block(const int bits, const uint8_t *const plane[3], int64_t b, const anybit_minifloat *f,
                            const lookup *t, vec out[2]) {
    if (bits == 6) {
        looked_up(6, plane, b, t, out);
        return;
    }
    /* with the sign in all upper bits, one move brings magnitude and sign to a float16's places */
    __m512i words = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(plane[0] + 32 * b)));
    __m512i moved = _mm512_sll_epi16(words, _mm_cvtsi32_si128(f->left - f->right));
    __mmask32 number = _mm512_cmpneq_epi16_mask(_mm512_and_si512(words, _mm512_set1_epi16((short)f->nan_and)),
                                                _mm512_set1_epi16((short)f->nan_is));
    __m512i half = _mm512_and_si512(moved, _mm512_set1_epi16((short)f->mask));
    half = _mm512_mask_mov_epi16(_mm512_set1_epi16(0x7e00), number, half);
    out[0] = mul(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), splat(f->power));
    out[1] = mul(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), splat(f->power));
}

#define HAS_LANES
#if defined(__AVX512VBMI__) && defined(__GFNI__)
#define HAS_BYTE_LOOKUP
#endif
