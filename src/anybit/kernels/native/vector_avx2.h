/* AVX2 with FMA and F16C: a block of 32 codes is four vectors of 8. */
#include <immintrin.h>

typedef __m256 vec;
#define WIDTH 8
#define VECTORS 4
#define MOST_TOKENS 2 /* rows of x that share decoded weights in registers */

INLINE vec load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void store(float *p, vec v) { _mm256_storeu_ps(p, v); }
INLINE vec zero(void) { return _mm256_setzero_ps(); }
INLINE vec splat(float f) { return _mm256_set1_ps(f); }
INLINE vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
INLINE vec sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
INLINE vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
INLINE vec divide(vec a, vec b) { return _mm256_div_ps(a, b); }
INLINE vec fused(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE float total(vec v) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE void add_totals(vec a, vec b, vec c, vec d, float *sums) { /* the sums over the lanes of four vectors at once */
    vec ab = add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    vec cd = add(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    vec all = add(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), four));
}
INLINE vec load_half(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE void store_half(uint16_t *p, vec v) { _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, 0)); }
INLINE vec through_half(vec v) { return _mm256_cvtph_ps(_mm256_cvtps_ph(v, 0)); }

INLINE vec load_bfloat(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}

INLINE __m256i eight_bytes(const uint8_t *p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
INLINE vec load_unsigned(const uint8_t *p) { return _mm256_cvtepi32_ps(eight_bytes(p)); }
INLINE vec load_signed(const uint8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE vec load_fields(const uint8_t *p, const int left, const int right, const uint32_t mask) {
    __m256i moved = _mm256_srai_epi32(_mm256_slli_epi32(eight_bytes(p), left), right);
    return _mm256_castsi256_ps(_mm256_and_si256(moved, _mm256_set1_epi32((int)mask)));
}
INLINE vec repeated(const float *p, const int shift) { /* each number 2^shift times */
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_permutevar8x32_ps(load(p), _mm256_srli_epi32(lane, shift));
}
INLINE vec maximum(vec a, vec b) { return _mm256_max_ps(a, b); } /* b where either is NaN; so does minimum */
INLINE vec minimum(vec a, vec b) { return _mm256_min_ps(a, b); }
INLINE vec times_power_of_two(vec v, vec whole) { /* -126 <= whole <= 127 */
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
    return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
INLINE vec nan_from(vec v, float limit) { /* NaN where |v| >= limit */
    vec magnitude = _mm256_andnot_ps(splat(-0.0f), v);
    return _mm256_blendv_ps(v, splat(NAN), _mm256_cmp_ps(magnitude, splat(limit), _CMP_GE_OQ));
}

INLINE vec through_bfloat(vec v) {
    __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256 rounded = _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32((int)0xffff0000)));
    return _mm256_blendv_ps(rounded, v, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}

/* Sixteen values in two vectors; the lookup reads three bits of an index, the fourth selects the vector. */
typedef struct {
    vec lower, upper;
} table;

INLINE table table_of(const float *values) { return (table){load(values), load(values + 8)}; }
#define TABLE_MAP(t, expression) /* expression in v */ \
    do { vec v = (t).lower; (t).lower = (expression); v = (t).upper; (t).upper = (expression); } while (0)

INLINE __m256i splat32(const uint8_t *p) {
    int32_t word;
    memcpy(&word, p, 4);
    return _mm256_set1_epi32(word);
}

INLINE __m256i counting(int step, int start) {
    __m256i i = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_add_epi32(step == 1 ? i : _mm256_slli_epi32(i, 1), _mm256_set1_epi32(start));
}

/* Two-bit codes 8 i .. 8 i + 7 of a run, other bits above them. */
INLINE __m256i two_bits(const uint8_t *run, int i) {
    return _mm256_srlv_epi32(splat32(run + 4 * (i / 2)), counting(2, 16 * (i % 2)));
}

/* Bit 8 i .. 8 i + 7 of a run moved to `place`. */
INLINE __m256i one_bit(const uint8_t *run, int i, int place) {
    __m256i bit = _mm256_and_si256(_mm256_srlv_epi32(splat32(run), counting(1, 8 * i)), _mm256_set1_epi32(1));
    return _mm256_slli_epi32(bit, place);
}

INLINE void table_block(const int bits, const uint8_t *const plane[3], int64_t b, table low, table high, vec out[4]) {
    for (int i = 0; i < 4; i++) {
        const table t = i < 2 ? low : high;
        if (bits == 4) {
            __m256i bytes = eight_bytes(plane[0] + 16 * b + 8 * (i % 2));
            __m256i c = i < 2 ? bytes : _mm256_srli_epi32(bytes, 4);
            vec fourth = _mm256_castsi256_ps(_mm256_slli_epi32(c, 28)); /* blendv reads the sign bit */
            vec lower = _mm256_permutevar8x32_ps(t.lower, c), upper = _mm256_permutevar8x32_ps(t.upper, c);
            out[i] = _mm256_blendv_ps(lower, upper, fourth);
            continue;
        }
        __m256i c;
        if (bits == 1)
            c = _mm256_srlv_epi32(splat32(plane[0] + 4 * b), counting(1, 8 * i));
        else
            c = two_bits(plane[0] + 8 * b, i);
        if (bits == 3) {
            c = _mm256_and_si256(c, _mm256_set1_epi32(3));
            c = _mm256_or_si256(c, one_bit(plane[1] + 4 * b, i, 2));
        }
        out[i] = _mm256_permutevar8x32_ps(t.lower, c);
    }
}

INLINE __m256i integers(const int bits, const int is_signed, const uint8_t *const plane[3], int64_t b, int i) {
    if (bits == 8) {
        __m128i bytes = _mm_loadl_epi64((const __m128i *)(plane[0] + 32 * b + 8 * i));
        return is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
    }
    __m256i c = eight_bytes(plane[0] + 16 * b + 8 * (i % 2));
    c = i < 2 ? _mm256_and_si256(c, _mm256_set1_epi32(15)) : _mm256_srli_epi32(c, 4);
    if (bits >= 6) {
        __m256i two = _mm256_and_si256(two_bits(plane[1] + 8 * b, i), _mm256_set1_epi32(3));
        c = _mm256_or_si256(c, _mm256_slli_epi32(two, 4));
    }
    if (bits & 1) c = _mm256_or_si256(c, one_bit((bits == 5 ? plane[1] : plane[2]) + 4 * b, i, bits - 1));
    return c;
}

/* A table of all codes of 5 or 6 bits, for processors that can look up so many at once: not this one. */
typedef struct {
    char none;
} lookup;

static void fill_lookup(const anybit_weight *w, lookup *none) { (void)w, (void)none; }

INLINE void integer_block(const int bits, const int is_signed, const uint8_t *const plane[3], int64_t b, int32_t bias,
                          const lookup *none, vec out[4]) {
    (void)none;
    for (int i = 0; i < 4; i++) {
        __m256i c = integers(bits, is_signed, plane, b, i);
        out[i] = _mm256_cvtepi32_ps(bits == 8 ? c : _mm256_sub_epi32(c, _mm256_set1_epi32(bias)));
    }
}

INLINE void minifloat_block(const int bits, const uint8_t *const plane[3], int64_t b, const anybit_minifloat *f,
                            const lookup *none, vec out[4]) {
    (void)none;
    for (int i = 0; i < 2; i++) {
        __m256i words;
        if (bits == 8) {
            words = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(plane[0] + 32 * b + 16 * i)));
        } else {
            __m256i c0 = integers(6, 0, plane, b, 2 * i), c1 = integers(6, 0, plane, b, 2 * i + 1);
            words = _mm256_permute4x64_epi64(_mm256_packus_epi32(c0, c1), 0xd8); /* the pack works in 128-bit halves */
        }
        __m256i moved = _mm256_sll_epi16(words, _mm_cvtsi32_si128(f->left));
        moved = _mm256_sra_epi16(moved, _mm_cvtsi32_si128(f->right));
        __m256i half = _mm256_and_si256(moved, _mm256_set1_epi16((short)f->mask));
        __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(words, _mm256_set1_epi16((short)f->nan_and)),
                                         _mm256_set1_epi16((short)f->nan_is));
        half = _mm256_blendv_epi8(half, _mm256_set1_epi16(0x7e00), nan);
        out[2 * i] = mul(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), splat(f->power));
        out[2 * i + 1] = mul(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), splat(f->power));
    }
}
