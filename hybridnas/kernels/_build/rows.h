/* Parts of a step through a layer, one token of each sequence: products of weights with vectors, norm, convolution.
 *
 * A product with one vector reads every weight once: it costs what memory costs. So threads split rows of weights, each
 * row is summed by one thread in one order, and results depend neither on the threads nor on the rest of the batch.
 * Weights lie (out, in) as torch.nn.Linear has them.
 */
#ifndef HYBRIDNAS_ROWS_H
#define HYBRIDNAS_ROWS_H

#include "vectors.h"
#include <math.h>

#define ROWS 4         /* rows of weights side by side: enough independent sums to hide the latency of one */
#define AHEAD 8        /* rows ahead that are asked for: the processor's own prefetching stops at a page's end */

typedef struct {
    const float *weight, *bias, *x, *add; /* add: like y, or NULL */
    float *y;
    int64_t in, x_stride, y_stride;
} product;

typedef float quad __attribute__((vector_size(16), aligned(4)));
#ifdef __clang__
#define PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t quad_index __attribute__((vector_size(16)));
#define PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, (quad_index){i, j, k, l})
#endif

INLINE quad fold(vf x) {
    quad parts[V / 4], sum;
    memcpy(parts, &x, sizeof x);
    sum = parts[0];
    for (int i = 1; i < V / 4; i++) sum += parts[i];
    return sum;
}

/* The sums over the lanes of four vectors, side by side. */
INLINE quad sum_four(vf a, vf b, vf c, vf d) {
    const quad p = fold(a), q = fold(b), r = fold(c), s = fold(d);
    const quad left = PICK(p, q, 0, 4, 1, 5) + PICK(p, q, 2, 6, 3, 7);
    const quad right = PICK(r, s, 0, 4, 1, 5) + PICK(r, s, 2, 6, 3, 7);
    return PICK(left, right, 0, 1, 4, 5) + PICK(left, right, 2, 3, 6, 7);
}

/* Sums of `rows` rows times x; a row's sum does not depend on its neighbours. */
INLINE quad dot_rows(const float *w, const float *x, int64_t n, int rows) {
    vf even[ROWS] = {{0}}, odd[ROWS] = {{0}};
    int64_t i = 0;
    for (; i + 2 * V <= n; i += 2 * V) {
        const vf a = load(x + i), b = load(x + i + V);
        for (int r = 0; r < rows; r++) {
            even[r] += load(w + r * n + i) * a;
            odd[r] += load(w + r * n + i + V) * b;
            __builtin_prefetch(w + (r + AHEAD) * n + i);
        }
    }
    for (; i < n; i += V) {
        const int count = n - i < V ? (int)(n - i) : V;
        const vf a = load_part(x + i, count);
        for (int r = 0; r < rows; r++) even[r] += load_part(w + r * n + i, count) * a;
    }
    return sum_four(even[0] + odd[0], even[1] + odd[1], even[2] + odd[2], even[3] + odd[3]);
}

static quad rows_times(const float *w, const float *x, int64_t n, int64_t rows) {
    switch (rows) { /* a known count stays in registers */
    case 1: return dot_rows(w, x, n, 1);
    case 2: return dot_rows(w, x, n, 2);
    case 3: return dot_rows(w, x, n, 3);
    default: return dot_rows(w, x, n, ROWS);
    }
}

/* y = add + weight x + bias for rows first to last of every sequence. */
static void multiply(const product *p, int64_t batch, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row += ROWS) {
        const int rows = last - row < ROWS ? (int)(last - row) : ROWS;
        for (int64_t b = 0; b < batch; b++) { /* the rows are in the first-level cache from the second on */
            quad sums = rows_times(p->weight + row * p->in, p->x + b * p->x_stride, p->in, rows);
            float *y = p->y + b * p->y_stride + row;
            for (int r = 0; r < rows; r++) {
                if (p->bias) sums[r] += p->bias[row + r];
                y[r] = p->add ? p->add[b * p->y_stride + row + r] + sums[r] : sums[r];
            }
        }
    }
}

static float mean_of(const float *x, int64_t n, float center, int squared) {
    vf sum = {0};
    for (int64_t i = 0; i < n; i += V) {
        const int count = n - i < V ? (int)(n - i) : V;
        vf v = load_part(x + i, count);
        if (squared) {
            v -= center;
            if (count < V) { /* lanes beyond the row count as the center */
                vf kept = {0};
                memcpy(&kept, &v, (size_t)count * 4);
                v = kept;
            }
            v *= v;
        }
        sum += v;
    }
    return sum_lanes(sum) / (float)n;
}

/* The norm in front of a layer, of each of B rows: 0 none, 1 RMS, 2 layer. */
typedef struct {
    int64_t kind;
    const float *weight, *bias;
    float eps;
} norm;

static void normed(const norm *a, const float *rows, float *out, int64_t B, int64_t D) {
    for (int64_t b = 0; b < B; b++) {
        const float *x = rows + b * D;
        float *y = out + b * D;
        if (!a->kind) {
            memcpy(y, x, (size_t)D * 4);
            continue;
        }
        const float center = a->kind == 2 ? mean_of(x, D, 0.f, 0) : 0.f;
        const float scale = 1.f / sqrtf(mean_of(x, D, center, 1) + a->eps);
        for (int64_t i = 0; i < D; i++) {
            const float v = (x[i] - center) * scale;
            y[i] = v * (a->weight ? a->weight[i] : 1.f) + (a->bias ? a->bias[i] : 0.f);
        }
    }
}

INLINE vf silu(vf x) {
    const vf e = exp2_any(magnitude(x) * -LOG2E);
    return x * choose(x < splat(0.f), e, splat(1.f)) / (1.f + e);
}

INLINE vf log_one_plus_exp(vf x) { /* softplus */
    return choose(x > splat(0.f), x, splat(0.f)) + log1p_unit(exp2_any(magnitude(x) * -LOG2E));
}

typedef struct {
    const float *weight, *bias, *before; /* weight (I, K); before (B, K - 1, I): the inputs that came earlier */
    float *after;                        /* may be before */
    int64_t I, K;
} taps;

/* The convolution and SiLU of channels first to last, in place in u; the window moves on by one. */
INLINE void convolve_taps(const taps *a, float *u, int64_t b, int64_t first, int64_t last, const int64_t K) {
    const int64_t I = a->I;
    const float *before = a->before + b * (K - 1) * I;
    float *after = a->after + b * (K - 1) * I;
    for (int64_t i = first; i < last; i += V) {
        const int count = last - i < V ? (int)(last - i) : V;
        const vf now = load_part(u + i, count);
        vf sum = a->bias ? load_part(a->bias + i, count) : splat(0.f);
        for (int64_t k = 0; k < K; k++) {
            const float *w = a->weight + i * K + k;
            vf w_V = {0};
            if (count == V) /* all at once: a vector filled number by number goes through memory */
#if V == 16
                w_V = (vf){w[0],     w[K],     w[2 * K],  w[3 * K],  w[4 * K],  w[5 * K],  w[6 * K],  w[7 * K],
                            w[8 * K], w[9 * K], w[10 * K], w[11 * K], w[12 * K], w[13 * K], w[14 * K], w[15 * K]};
#else
                w_V = (vf){w[0], w[K], w[2 * K], w[3 * K], w[4 * K], w[5 * K], w[6 * K], w[7 * K]};
#endif
            else
                for (int j = 0; j < count; j++) w_V[j] = w[j * K];
            const vf x = k < K - 1 ? load_part(before + k * I + i, count) : now;
            sum += w_V * x;
            if (k > 0) store_part(after + (k - 1) * I + i, x, count);
        }
        store_part(u + i, silu(sum), count);
    }
}

static void convolve(const taps *a, float *u, int64_t b, int64_t first, int64_t last) {
    if (a->K == 4) convolve_taps(a, u, b, first, last, 4);
    else convolve_taps(a, u, b, first, last, a->K);
}

/* Rows [first, last) of thread t of n, in whole blocks. */
INLINE void share(int64_t total, int64_t block, int t, int n, int64_t *first, int64_t *last) {
    const int64_t blocks = (total + block - 1) / block;
    *first = blocks * t / n * block;
    *last = blocks * (t + 1) / n * block;
    if (*last > total) *last = total;
    if (*first > total) *first = total;
}

#endif
