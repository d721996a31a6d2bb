/* What a decoder block does beside its products, for one token: norms, rotary embedding, attention, gate. Included by
 * engine.c once for each instruction set; all in float32. */

static float sum_of_squares(const float *x, int64_t n) {
    vec sums[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * WIDTH <= n; i += 4 * WIDTH)
        for (int j = 0; j < 4; j++) sums[j] = fused(load(x + i + j * WIDTH), load(x + i + j * WIDTH), sums[j]);
    for (; i + WIDTH <= n; i += WIDTH) sums[0] = fused(load(x + i), load(x + i), sums[0]);
    float rest = total(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    for (; i < n; i++) rest += x[i] * x[i];
    return rest;
}

static float norm_factor(const float *x, float eps, int64_t n) {
    return 1.0f / sqrtf(sum_of_squares(x, n) / (float)n + eps);
}

/* y = w * (x * 1/sqrt(mean(x^2) + eps)); y may be x */
static void rms_norm(const float *x, const float *w, float eps, int64_t n, float *y) {
    const float factor = norm_factor(x, eps, n);
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) store(y + i, mul(load(w + i), mul(load(x + i), splat(factor))));
    for (; i < n; i++) y[i] = w[i] * (x[i] * factor);
}

/* The rotation of halves: x1 cos - x2 sin, x2 cos + x1 sin, over the first `rotated` numbers of a head. */
static void rotate(float *x, const float *cosine, const float *sine, int64_t rotated) {
    const int64_t half = rotated / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cosine[i] - b * sine[i];
        x[half + i] = b * cosine[half + i] + a * sine[half + i];
    }
}

static float product_of(const float *a, const float *b, int64_t n) {
    vec s0 = zero(), s1 = zero();
    int64_t i = 0;
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
        s0 = fused(load(a + i), load(b + i), s0);
        s1 = fused(load(a + i + WIDTH), load(b + i + WIDTH), s1);
    }
    for (; i + WIDTH <= n; i += WIDTH) s0 = fused(load(a + i), load(b + i), s0);
    float rest = total(add(s0, s1));
    for (; i < n; i++) rest += a[i] * b[i];
    return rest;
}

/* e^x to about one unit in the last place: 2^k times a polynomial of the rest; NaN stays. */
INLINE vec exponential(vec x) {
    const vec round = splat(12582912.0f), v = maximum(splat(-87.0f), minimum(splat(88.0f), x));
    const vec k = sub(fused(v, splat(1.44269504f), round), round);
    const vec r = fused(k, splat(-1.42860677e-6f), fused(k, splat(-0.693145752f), v));
    vec p = fused(splat(1.98756915e-4f), r, splat(1.39819994e-3f));
    p = fused(p, r, splat(8.33345205e-3f));
    p = fused(p, r, splat(4.16657962e-2f));
    p = fused(p, r, splat(1.66666654e-1f));
    p = fused(p, r, splat(5.00000012e-1f));
    p = add(fused(mul(p, r), r, r), splat(1.0f));
    return times_power_of_two(p, k);
}

#define LANES 16
static void exponentials(const float *x, float *y) {
    for (int i = 0; i < LANES; i += WIDTH) store(y + i, exponential(load(x + i)));
}

/* out = g / (1 + e^-g) * u */
static void silu_gate(const float *g, const float *u, int64_t n, float *out) {
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) {
        const vec v = load(g + i), bottom = add(splat(1.0f), exponential(sub(zero(), v)));
        store(out + i, mul(divide(v, bottom), load(u + i)));
    }
    for (; i < n; i++) out[i] = g[i] / (1.0f + expf(-g[i])) * u[i];
}

/* One query head over the cached tokens: softmax(q k * scaling) v. `scores` holds a number a token. */
static void attend_head(const float *q, const float *keys, const float *values, int64_t tokens, int64_t dim,
                        float scaling, float *scores, float *out) {
    float most = -INFINITY;
    for (int64_t t = 0; t < tokens; t++) {
        scores[t] = product_of(q, keys + t * dim, dim) * scaling;
        most = scores[t] > most ? scores[t] : most;
    }
    vec sums = zero();
    int64_t w = 0;
    for (; w + WIDTH <= tokens; w += WIDTH) {
        const vec powers = exponential(sub(load(scores + w), splat(most)));
        store(scores + w, powers);
        sums = add(sums, powers);
    }
    float sum = total(sums);
    for (; w < tokens; w++) sum += scores[w] = expf(scores[w] - most);
    const float share = 1.0f / sum;
    int64_t d = 0;
    for (; d + WIDTH <= dim; d += WIDTH) {
        vec got[4] = {zero(), zero(), zero(), zero()};
        int64_t t = 0;
        for (; t + 4 <= tokens; t += 4)
            for (int i = 0; i < 4; i++) got[i] = fused(splat(scores[t + i]), load(values + (t + i) * dim + d), got[i]);
        for (; t < tokens; t++) got[0] = fused(splat(scores[t]), load(values + t * dim + d), got[0]);
        store(out + d, mul(add(add(got[0], got[1]), add(got[2], got[3])), splat(share)));
    }
    for (; d < dim; d++) {
        float got = 0.0f;
        for (int64_t t = 0; t < tokens; t++) got += scores[t] * values[t * dim + d];
        out[d] = got * share;
    }
}

static void attend(void *shared) {
    anybit_attention *job = shared;
    for (int64_t head; (head = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed)) < job->heads;) {
        const int64_t group = head / (job->heads / job->kv_heads);
        attend_head(job->q + head * job->dim, job->keys + group * job->stride, job->values + group * job->stride,
                    job->tokens, job->dim, job->scaling, job->scores + head * job->tokens, job->out + head * job->dim);
    }
}
