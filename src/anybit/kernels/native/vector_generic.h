/* Any processor: vectors by the compiler's extension (GCC and Clang), codes one by one. */

typedef float vec __attribute__((vector_size(32)));
#define WIDTH 8
#define VECTORS 4
#define MOST_TOKENS 2 /* rows of x that share decoded weights in registers */

INLINE vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store(float *p, vec v) { memcpy(p, &v, sizeof v); }
INLINE vec splat(float f) { return (vec){f, f, f, f, f, f, f, f}; }
INLINE vec zero(void) { return splat(0.0f); }
INLINE vec add(vec a, vec b) { return a + b; }
INLINE vec sub(vec a, vec b) { return a - b; }
INLINE vec mul(vec a, vec b) { return a * b; }
INLINE vec divide(vec a, vec b) { return a / b; }
INLINE vec fused(vec a, vec b, vec c) { return a * b + c; }
INLINE float total(vec v) { return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7])); }
INLINE void add_totals(vec a, vec b, vec c, vec d, float *sums) { /* the sums over the lanes of four vectors */
    sums[0] += total(a);
    sums[1] += total(b);
    sums[2] += total(c);
    sums[3] += total(d);
}

INLINE vec load_half(const uint16_t *p) {
    vec v;
    for (int i = 0; i < WIDTH; i++) v[i] = half_to_float(p[i]);
    return v;
}
INLINE void store_half(uint16_t *p, vec v) {
    for (int i = 0; i < WIDTH; i++) p[i] = float_to_half(v[i]);
}
INLINE vec through_half(vec v) {
    for (int i = 0; i < WIDTH; i++) v[i] = half_to_float(float_to_half(v[i]));
    return v;
}
INLINE vec load_bfloat(const uint16_t *p) {
    vec v;
    for (int i = 0; i < WIDTH; i++) v[i] = bfloat_to_float(p[i]);
    return v;
}
INLINE vec through_bfloat(vec v) {
    for (int i = 0; i < WIDTH; i++) v[i] = bfloat_to_float(float_to_bfloat(v[i]));
    return v;
}

INLINE vec load_unsigned(const uint8_t *p) {
    vec v;
    for (int i = 0; i < WIDTH; i++) v[i] = (float)p[i];
    return v;
}
INLINE vec load_signed(const uint8_t *p) {
    vec v;
    for (int i = 0; i < WIDTH; i++) v[i] = (float)(int8_t)p[i];
    return v;
}
INLINE vec load_fields(const uint8_t *p, const int left, const int right, const uint32_t mask) {
    vec v;
    for (int i = 0; i < WIDTH; i++) v[i] = float_of_bits((uint32_t)((int32_t)((uint32_t)p[i] << left) >> right) & mask);
    return v;
}
INLINE vec repeated(const float *p, const int shift) { /* each number 2^shift times */
    vec v;
    for (int i = 0; i < WIDTH; i++) v[i] = p[i >> shift];
    return v;
}
INLINE vec maximum(vec a, vec b) {
    for (int i = 0; i < WIDTH; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
}
INLINE vec minimum(vec a, vec b) {
    for (int i = 0; i < WIDTH; i++) a[i] = a[i] < b[i] ? a[i] : b[i];
    return a;
}
INLINE vec times_power_of_two(vec v, vec whole) { /* -126 <= whole <= 127 */
    for (int i = 0; i < WIDTH; i++) v[i] *= float_of_bits((uint32_t)(127 + (whole[i] == whole[i] ? (int)whole[i] : 0)) << 23);
    return v;
}
INLINE vec nan_from(vec v, float limit) { /* NaN where |v| >= limit */
    for (int i = 0; i < WIDTH; i++) v[i] = v[i] >= limit || v[i] <= -limit ? NAN : v[i];
    return v;
}

typedef struct {
    float values[16];
} table;

INLINE table table_of(const float *values) {
    table t;
    memcpy(t.values, values, sizeof t.values);
    return t;
}
#define TABLE_MAP(t, expression) /* expression in v */ \
    do { \
        for (int half_ = 0; half_ < 16; half_ += 8) { \
            vec v = load((t).values + half_); \
            store((t).values + half_, (expression)); \
        } \
    } while (0)

/* The 32 codes of block b from their planes. */
INLINE void codes_of(const int bits, const uint8_t *const plane[3], int64_t b, int32_t c[32]) {
    int place = 0, next = 0;
    if (bits == 8) {
        for (int j = 0; j < 32; j++) c[j] = plane[0][32 * b + j];
        return;
    }
    for (int j = 0; j < 32; j++) c[j] = 0;
    if (bits & 4) {
        const uint8_t *run = plane[next++] + 16 * b;
        for (int j = 0; j < 16; j++) c[j] = run[j] & 15;
        for (int j = 0; j < 16; j++) c[16 + j] = run[j] >> 4;
        place = 4;
    }
    if (bits & 2) {
        const uint8_t *run = plane[next++] + 8 * b;
        for (int j = 0; j < 32; j++) c[j] |= ((run[j / 4] >> (2 * (j % 4))) & 3) << place;
        place += 2;
    }
    if (bits & 1) {
        const uint8_t *run = plane[next] + 4 * b;
        for (int j = 0; j < 32; j++) c[j] |= ((run[j / 8] >> (j % 8)) & 1) << place;
    }
}

INLINE void table_block(const int bits, const uint8_t *const plane[3], int64_t b, table low, table high, vec out[4]) {
    int32_t c[32];
    float values[32];
    codes_of(bits, plane, b, c);
    for (int j = 0; j < 16; j++) values[j] = low.values[c[j]];
    for (int j = 16; j < 32; j++) values[j] = high.values[c[j]];
    for (int i = 0; i < 4; i++) out[i] = load(values + 8 * i);
}

/* A table of all codes of 5 or 6 bits, for processors that can look up so many at once: not this one. */
typedef struct {
    char none;
} lookup;

static void fill_lookup(const anybit_weight *w, lookup *none) { (void)w, (void)none; }

INLINE void integer_block(const int bits, const int is_signed, const uint8_t *const plane[3], int64_t b, int32_t bias,
                          const lookup *none, vec out[4]) {
    (void)none;
    int32_t c[32];
    float values[32];
    codes_of(bits, plane, b, c);
    for (int j = 0; j < 32; j++) values[j] = (float)(bits < 8 ? c[j] - bias : is_signed ? (int8_t)c[j] : c[j]);
    for (int i = 0; i < 4; i++) out[i] = load(values + 8 * i);
}

INLINE void minifloat_block(const int bits, const uint8_t *const plane[3], int64_t b, const anybit_minifloat *f,
                            const lookup *none, vec out[4]) {
    (void)none;
    int32_t c[32];
    float values[32];
    codes_of(bits, plane, b, c);
    for (int j = 0; j < 32; j++) {
        uint16_t half = (uint16_t)(((int16_t)(uint16_t)(c[j] << f->left) >> f->right) & f->mask);
        values[j] = half_to_float((c[j] & f->nan_and) == f->nan_is ? 0x7e00 : half) * f->power;
    }
    for (int i = 0; i < 4; i++) out[i] = load(values + 8 * i);
}
