/* Scales and offsets of a piece of some rows as float32, one for each unit of 16 or 32 columns, and where its codes
 * are. Included by engine.c once for each instruction set. */

/* Numbers of 16 columns, a byte times a float of 256 columns, where the product multiplies them itself; fine[0] NULL:
 * it does not. */
typedef struct {
    const uint8_t *fine[ROWS];
    float coarse[ROWS][PIECE / 256 + 16];
    int is_signed;
} two_levels;

/* A piece of some rows: planes at its first block, a scale and an offset for each unit. */
typedef struct {
    const uint8_t *plane[ROWS][3];
    const lookup *all;
    int scale_shift; /* 1 << scale_shift columns have one scale */
    two_levels scales, offsets;
    int64_t ahead[3]; /* bytes from the codes of these rows to those that are asked for beforehand */
    float scale[ROWS][UNITS], offset[ROWS][UNITS];
} pieces;

INLINE int64_t units_in(int64_t columns, int unit) { return (columns + unit - 1) >> (unit == 16 ? 4 : 5); }

/* Asks for the bytes that will be read in the place of these some rows later: the next rows, or a page ahead. */
INLINE void prefetch(const uint8_t *const *from, int rows, int64_t stride, int64_t bytes) {
    const int64_t ahead = ROWS * stride > AHEAD ? ROWS * stride : AHEAD;
    if (rows == ROWS && from[ROWS - 1] - from[0] == (ROWS - 1) * stride && stride < bytes + 64) { /* one run of bytes */
        rows = 1;
        bytes += (ROWS - 1) * stride;
    }
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from[r] + ahead + i);
}

/* The entries of array `a` for the units of columns [from, from + columns) of some rows, spread to the units. */
static void units_of(const anybit_array *a, const int64_t *row, int rows, int64_t from, int64_t columns,
                     int unit, float (*out)[UNITS]) {
    const int64_t group = a->group, size = format_bytes[a->format], count = units_in(columns, unit);
    const int64_t first = group == 0 || from == 0 ? 0 : (int64_t)((uint64_t)from / (uint64_t)group);
    const int64_t ratio = group >> (unit == 16 ? 4 : 5);
    const uint8_t *base = (const uint8_t *)a->data + first * size, *start[ROWS];
    for (int r = 0; r < rows; r++)
        start[r] = base + (a->row_block == 1 ? row[r] : row[r] / a->row_block) * a->row_stride;
    if (group == unit && a->format == ANYBIT_F16 && rows == ROWS) { /* the same as below, most common */
        for (int r = 0; r < ROWS; r++) {
            for (int64_t i = 0; i < count; i += WIDTH)
                store(out[r] + i, load_half((const uint16_t *)(const void *)start[r] + i));
            for (int64_t i = 0; i < count; i += 32) __builtin_prefetch(start[r] + AHEAD + 2 * i);
        }
    } else if (group == unit) {
        prefetch(start, rows, a->row_stride, count * size);
        convert_rows(a->format, start, rows, count, out);
    } else if (group == 0 || from + columns <= (first + 1) * group) { /* one entry */
        for (int r = 0; r < rows; r++) {
            const vec value = splat(one_number(a->format, start[r]));
            for (int64_t i = 0; i < count; i += WIDTH) store(out[r] + i, value);
        }
    } else if (ratio * unit == group && first * group == from) {
        float entries[ROWS][UNITS];
        const int64_t stored = (int64_t)((uint64_t)(columns + group - 1) / (uint64_t)group);
        const int shift = ratio == 2 ? 1 : ratio == 4 ? 2 : 3;
        prefetch(start, rows, a->row_stride, stored * size);
        convert_rows(a->format, start, rows, stored, entries);
        for (int r = 0; r < rows; r++) {
            if (ratio == 1 << shift)
                for (int64_t i = 0; i < count; i += WIDTH)
                    store(out[r] + i, repeated(entries[r] + (i >> shift), shift));
            else if (ratio == WIDTH)
                for (int64_t g = 0; g < stored; g++) store(out[r] + g * WIDTH, splat(entries[r][g]));
            else if (ratio % WIDTH == 0) /* a division for each vector would take longer than all else */
                for (int64_t g = 0, i = 0; g < stored; g++)
                    for (const int64_t end = i + ratio; i < end && i < count; i += WIDTH)
                        store(out[r] + i, splat(entries[r][g]));
            else
                for (int64_t i = 0; i < count; i++) out[r][i] = entries[r][i / ratio];
        }
    } else { /* groups that straddle units or pieces */
        for (int r = 0; r < rows; r++)
            for (int64_t i = 0; i < count; i++)
                out[r][i] = one_number(a->format, start[r] + ((from + i * unit) / group - first) * size);
    }
}

/* Scales of two levels as K-quants have them, a byte for each unit times a float16 for several: one pass; 0 for others. */
static int multiplied_units(const anybit_array *a, const anybit_array *b, const int64_t *row, int rows,
                            int64_t from, int64_t columns, int unit, float (*out)[UNITS]) {
    const int is_byte = a->format == ANYBIT_U8 || a->format == ANYBIT_I8;
    const int64_t ratio = b->group / unit, count = units_in(columns, unit);
    if (!is_byte || b->format != ANYBIT_F16 || a->group != unit || a->row_block != 1 || b->row_block != 1) return 0;
    if (b->group % unit || (ratio != 8 && ratio != 16) || (from && from % b->group)) return 0;
    const int shift = ratio == 8 ? 3 : 4;
    const int64_t fine_from = from ? from / unit : 0;
    const int64_t coarse_from = from ? from / b->group * 2 : 0;
    for (int r = 0; r < rows; r++) {
        const uint8_t *fine = (const uint8_t *)a->data + fine_from + row[r] * a->row_stride;
        const uint8_t *coarse = (const uint8_t *)b->data + coarse_from + row[r] * b->row_stride;
        float factors[UNITS / 8 + 16];
        convert(ANYBIT_F16, coarse, (count + ratio - 1) >> shift, factors);
        __builtin_prefetch(coarse + AHEAD);
        for (int64_t i = 0; i < count; i += WIDTH) {
            const vec values = a->format == ANYBIT_U8 ? load_unsigned(fine + i) : load_signed(fine + i);
            const vec by = ratio < WIDTH ? repeated(factors + (i >> shift), shift) : splat(factors[i >> shift]);
            const vec product = mul(values, by);
            store(out[r] + i, a->negate ? sub(splat(-0.0f), product) : product);
            if (i % 64 == 0) __builtin_prefetch(fine + AHEAD + i);
        }
    }
    return 1;
}

/* The same left to the product of codes in runs of 256 columns; 0 for others. */
static int fine_and_coarse(const anybit_array *a, const anybit_array *b, const int64_t *row, int rows,
                           int64_t from, int64_t columns, two_levels *to) {
    if ((a->format != ANYBIT_U8 && a->format != ANYBIT_I8) || b->format != ANYBIT_F16 || a->group != 16) return 0;
    if (b->group != 256 || a->row_block != 1 || b->row_block != 1 || from % 256) return 0;
    for (int r = 0; r < rows; r++) {
        const uint8_t *fine = (const uint8_t *)a->data + row[r] * a->row_stride + from / 16;
        const uint8_t *coarse =
            (const uint8_t *)b->data + row[r] * b->row_stride + from / 256 * 2;
        convert(ANYBIT_F16, coarse, (columns + 255) / 256, to->coarse[r]);
        for (int64_t i = 0; a->negate && i < (columns + 255) / 256; i++) to->coarse[r][i] = -to->coarse[r][i];
        __builtin_prefetch(coarse + AHEAD);
        to->fine[r] = fine;
    }
    to->is_signed = a->format == ANYBIT_I8;
    return 1;
}

/* Scales as they are stored, an entry a group: 0 where groups do not fit into runs of lanes. */
static int stored_entries(const anybit_array *a, const int64_t *row, int rows, int64_t from,
                          int64_t columns, int *shift, float (*out)[UNITS]) {
    const int64_t group = a->group;
    if (group < 32 || (group & (group - 1)) || from & (group - 1) || a->row_block != 1) return 0;
    *shift = __builtin_ctzll((unsigned long long)group);
    const int64_t count = (columns + group - 1) >> *shift, first = from >> *shift, size = format_bytes[a->format];
    const uint8_t *start[ROWS];
    for (int r = 0; r < rows; r++)
        start[r] = (const uint8_t *)a->data + row[r] * a->row_stride + first * size;
    prefetch(start, rows, a->row_stride, count * size);
    convert_rows(a->format, start, rows, count, out);
    return 1;
}

/* Everything but the codes and the look-up tables: reads the scales and offsets of the piece and points at its codes. */
static void fetch(const anybit_weight *w, const int64_t *row, int rows, int64_t from, int64_t columns,
                  int unit, const int is_dot, pieces *p) {
    p->scale_shift = unit == 16 ? 4 : 5;
    p->scales.fine[0] = p->offsets.fine[0] = NULL;
    static const int bytes_of_plane[9][3] = {{0}, {4}, {8}, {8, 4}, {16}, {16, 4}, {16, 8}, {16, 8, 4}, {32}};
    const int64_t count = units_in(columns, unit);
    for (int i = 0; i < 3 && w->plane[i]; i++) {
        const int64_t block = w->kind == ANYBIT_FLOAT ? (w->bits == 32 ? 128 : 64) : bytes_of_plane[w->bits][i];
        const uint8_t *base = (const uint8_t *)w->plane[i] + (from >> 5) * block;
        const uint8_t *start[ROWS];
        for (int r = 0; r < rows; r++) p->plane[r][i] = start[r] = base + row[r] * w->plane_row_stride[i];
        p->ahead[i] = ROWS * w->plane_row_stride[i] > AHEAD ? ROWS * w->plane_row_stride[i] : AHEAD;
        if (!is_dot) prefetch(start, rows, w->plane_row_stride[i], (columns >> 5) * block);
    }
    if (w->kind == ANYBIT_FLOAT) return;
    float second[ROWS][UNITS];
    const int is_plain = w->scale2.data && !w->divide && !w->scale.negate;
    int is_done = is_plain && is_dot && reads_by_units(w) &&
                  fine_and_coarse(&w->scale, &w->scale2, row, rows, from, columns, &p->scales);
    if (is_plain && !is_done)
        is_done = multiplied_units(&w->scale, &w->scale2, row, rows, from, columns, unit, p->scale);
    if (is_dot && w->scale.data && !w->scale2.data && arranged_size(w))
        is_done = stored_entries(&w->scale, row, rows, from, columns, &p->scale_shift, p->scale);
    if (!is_done && w->scale.data)
        units_of(&w->scale, row, rows, from, columns, unit, p->scale);
    else if (!is_done)
        for (int r = 0; r < rows; r++)
            for (int64_t i = 0; i < count; i += WIDTH) store(p->scale[r] + i, splat(1.0f));
    if (w->scale2.data && !is_done) {
        units_of(&w->scale2, row, rows, from, columns, unit, second);
        for (int r = 0; r < rows; r++)
            for (int64_t i = 0; i < count; i += WIDTH) {
                const vec s = load(p->scale[r] + i), t = load(second[r] + i);
                store(p->scale[r] + i, w->divide ? divide(s, t) : mul(s, t));
            }
    }
    if (!w->offset.data) return;
    if (w->offset2.data && is_dot && reads_by_units(w) &&
        fine_and_coarse(&w->offset, &w->offset2, row, rows, from, columns, &p->offsets))
        return;
    if (w->offset2.data &&
        multiplied_units(&w->offset, &w->offset2, row, rows, from, columns, unit, p->offset))
        return;
    units_of(&w->offset, row, rows, from, columns, unit, p->offset);
    if (w->offset2.data) {
        units_of(&w->offset2, row, rows, from, columns, unit, second);
        for (int r = 0; r < rows; r++)
            for (int64_t i = 0; i < count; i += WIDTH) {
                const vec o = mul(load(p->offset[r] + i), load(second[r] + i));
                store(p->offset[r] + i, w->offset.negate ? sub(splat(-0.0f), o) : o);
            }
        return;
    }
    if (w->offset.negate)
        for (int r = 0; r < rows; r++)
            for (int64_t i = 0; i < count; i += WIDTH)
                store(p->offset[r] + i, sub(splat(-0.0f), load(p->offset[r] + i)));
}
