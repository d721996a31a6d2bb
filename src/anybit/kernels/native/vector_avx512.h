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
INLINE vec maximum(vec a, vec b) { return _mm512_max_ps(a, b); }
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
    } else {
        c0 = _mm512_srlv_epi32(splat32(plane[0] + 8 * b), counting(2));
        c1 = _mm512_srlv_epi32(splat32(plane[0] + 8 * b + 4), counting(2));
    }
    if (bits == 3) {
        const __m512i three = _mm512_set1_epi32(3), four = _mm512_set1_epi32(4);
        c0 = _mm512_and_si512(c0, three);
        c1 = _mm512_and_si512(c1, three);
        c0 = _mm512_mask_or_epi32(c0, mask16(plane[1] + 4 * b), c0, four);
        c1 = _mm512_mask_or_epi32(c1, mask16(plane[1] + 4 * b + 2), c1, four);
    }
    out[0] = _mm512_permutexvar_ps(c0, low.values);
    out[1] = _mm512_permutexvar_ps(c1, high.values);
}

/* Codes of 5-8 bits as integers. */
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
    if (bits >= 6) /* code i's two bits rotate from 2 i to 4 */
        for (int i = 0; i < 2; i++) {
            __m512i turn = _mm512_sub_epi32(counting(2), _mm512_set1_epi32(4));
            __m512i two = _mm512_rorv_epi32(splat32(plane[1] + 8 * b + 4 * i), turn);
            c[i] = _mm512_ternarylogic_epi32(c[i], two, _mm512_set1_epi32(0x30), 0xf8); /* c | (two & 0x30) */
        }
    if (bits & 1) {
        const uint8_t *one = (bits == 5 ? plane[1] : plane[2]) + 4 * b;
        const __m512i top = _mm512_set1_epi32(bits == 5 ? 16 : 64);
        c[0] = _mm512_mask_or_epi32(c[0], mask16(one), c[0], top);
        c[1] = _mm512_mask_or_epi32(c[1], mask16(one + 2), c[1], top);
    }
}

INLINE void integer_block(const int bits, const int is_signed, const uint8_t *const plane[3], int64_t b, int32_t bias,
                          vec out[2]) {
    __m512i c[2];
    integers(bits, is_signed, plane, b, c);
    for (int i = 0; i < 2; i++)
        out[i] = _mm512_cvtepi32_ps(bits == 8 ? c[i] : _mm512_sub_epi32(c[i], _mm512_set1_epi32(bias)));
}

INLINE void minifloat_block(const int bits, const uint8_t *const plane[3], int64_t b, const anybit_minifloat *f,
                            vec out[2]) {
    __m512i words;
    if (bits == 8) {
        words = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(plane[0] + 32 * b)));
    } else {
        __m512i c[2];
        integers(6, 0, plane, b, c);
        words = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(c[0])), _mm512_cvtepi32_epi16(c[1]), 1);
    }
    __m512i moved = _mm512_sra_epi16(_mm512_sll_epi16(words, _mm_cvtsi32_si128(f->left)), _mm_cvtsi32_si128(f->right));
    __m512i half = _mm512_and_si512(moved, _mm512_set1_epi16((short)f->mask));
    __mmask32 nan = _mm512_cmpeq_epi16_mask(_mm512_and_si512(words, _mm512_set1_epi16((short)f->nan_and)),
                                            _mm512_set1_epi16((short)f->nan_is));
    half = _mm512_mask_mov_epi16(half, nan, _mm512_set1_epi16(0x7e00));
    out[0] = mul(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), splat(f->power));
    out[1] = mul(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), splat(f->power));
}
