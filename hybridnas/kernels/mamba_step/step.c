/* One token through a Mamba layer: norm, input projection, convolution, SiLU, x_proj, dt_proj, softplus, state update,
 * skip, gate, output projection, residual, in one call. Letters: B batch, D width, I inner channels, N states, K taps,
 * R rank of the step size; weights (out, in) as torch.nn.Linear has them.
 *
 * A product with one vector reads every weight once: it costs what memory costs. So threads split rows of weights, each
 * row is summed by one thread in one order, and results depend neither on the threads nor on the rest of the batch.
 */
#include "vectors.h"
#include <math.h>

#define ROWS 4         /* rows of weights side by side: enough independent sums to hide the latency of one */
#define AHEAD 8        /* rows ahead that are asked for: the processor's own prefetching stops at a page's end */
#define EARLY (96 << 10) /* weights of the last product asked for while the states are computed */

typedef struct {
    int64_t B, D, I, N, K, R, norm, residual, threads; /* norm: 0 none, 1 RMS, 2 layer; R 0: constant step */
    double eps;
    const float *x, *norm_weight, *norm_bias, *in_weight, *in_bias, *conv_weight, *conv_bias, *x_weight, *dt_weight,
        *dt_bias, *A_log, *D_skip, *B_const, *C_const, *out_weight, *out_bias, *conv_in, *ssm_in;
    float *y, *conv_out, *ssm_out; /* each may be its own input */
} args;

/* Work that threads share, (B, ...) each. */
typedef struct {
    float *u, *z, *proj; /* u and z (B, I); proj (B, P): what x_proj yields of step, B and C */
    int64_t P;
} shared;

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

static void normed(const args *a, float *out) {
    for (int64_t b = 0; b < a->B; b++) {
        const float *x = a->x + b * a->D;
        float *y = out + b * a->D;
        if (!a->norm) {
            memcpy(y, x, (size_t)a->D * 4);
            continue;
        }
        const float center = a->norm == 2 ? mean_of(x, a->D, 0.f, 0) : 0.f;
        const float scale = 1.f / sqrtf(mean_of(x, a->D, center, 1) + (float)a->eps);
        for (int64_t i = 0; i < a->D; i++) {
            const float v = (x[i] - center) * scale;
            y[i] = v * (a->norm_weight ? a->norm_weight[i] : 1.f) + (a->norm_bias ? a->norm_bias[i] : 0.f);
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

/* The convolution and SiLU of channels first to last, in place in u; the window moves on by one. */
INLINE void convolve_taps(const args *a, float *u, int64_t b, int64_t first, int64_t last, const int64_t K) {
    const int64_t I = a->I;
    const float *before = a->conv_in + b * (K - 1) * I;
    float *after = a->conv_out + b * (K - 1) * I;
    for (int64_t i = first; i < last; i += V) {
        const int count = last - i < V ? (int)(last - i) : V;
        const vf now = load_part(u + i, count);
        vf sum = a->conv_bias ? load_part(a->conv_bias + i, count) : splat(0.f);
        for (int64_t k = 0; k < K; k++) {
            const float *w = a->conv_weight + i * K + k;
            vf taps = {0};
            if (count == V) /* all at once: a vector filled number by number goes through memory */
#if V == 16
                taps = (vf){w[0],     w[K],     w[2 * K],  w[3 * K],  w[4 * K],  w[5 * K],  w[6 * K],  w[7 * K],
                            w[8 * K], w[9 * K], w[10 * K], w[11 * K], w[12 * K], w[13 * K], w[14 * K], w[15 * K]};
#else
                taps = (vf){w[0], w[K], w[2 * K], w[3 * K], w[4 * K], w[5 * K], w[6 * K], w[7 * K]};
#endif
            else
                for (int j = 0; j < count; j++) taps[j] = w[j * K];
            const vf x = k < K - 1 ? load_part(before + k * I + i, count) : now;
            sum += taps * x;
            if (k > 0) store_part(after + (k - 1) * I + i, x, count);
        }
        store_part(u + i, silu(sum), count);
    }
}

static void convolve(const args *a, float *u, int64_t b, int64_t first, int64_t last) {
    if (a->K == 4) convolve_taps(a, u, b, first, last, 4);
    else convolve_taps(a, u, b, first, last, a->K);
}

/* Where a channel's N states are whole vectors, no end needs care. */
INLINE vf load_states(const float *p, int64_t left, int whole) {
    return whole || left >= V ? load(p) : load_part(p, (int)left);
}

/* The states of `count` channels up to four from one, side by side; returns C h of each. */
INLINE quad advance(const float *A_log, const float *before, float *after, const float *B_N, const float *C_N,
                    const float *dt, const float *dtu, const int count, const int64_t N, const int whole) {
    vf s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    for (int64_t n = 0; n < N; n += V) {
        const int64_t left = N - n;
        const vf B_V = load_states(B_N + n, left, whole), C_V = load_states(C_N + n, left, whole);
        vf h[ROWS];
#pragma GCC unroll 4
        for (int j = 0; j < ROWS; j++) {
            if (j >= count) {
                h[j] = splat(0.f);
                continue;
            }
            const int64_t at = j * N + n;
            const vf A = -LOG2E * exp2_any(load_states(A_log + at, left, whole) * LOG2E);
            h[j] = exp2_any(A * dt[j]) * load_states(before + at, left, whole) + B_V * dtu[j];
            if (whole) store(after + at, h[j]);
            else store_part(after + at, h[j], left < V ? (int)left : V);
        }
        s0 += h[0] * C_V, s1 += h[1] * C_V, s2 += h[2] * C_V, s3 += h[3] * C_V;
    }
    return sum_four(s0, s1, s2, s3);
}

static quad advance_any(const float *A_log, const float *before, float *after, const float *B_N, const float *C_N,
                        const float *dt, const float *dtu, int count, int64_t N) {
    if (count < ROWS) return advance(A_log, before, after, B_N, C_N, dt, dtu, count, N, 0);
    if (N == 16) return advance(A_log, before, after, B_N, C_N, dt, dtu, ROWS, 16, 1);
    if (N % V == 0) return advance(A_log, before, after, B_N, C_N, dt, dtu, ROWS, N, 1);
    return advance(A_log, before, after, B_N, C_N, dt, dtu, ROWS, N, 0);
}

/* Ask for the part of the output weights that belongs to channels [first, last): sums of states leave memory idle. */
INLINE void ask_for_output(const args *a, int64_t first, int64_t last) {
    const int64_t size = a->D * a->I < EARLY ? a->D * a->I : EARLY;
    for (int64_t i = size * first / a->I; i < size * last / a->I; i += TILE) __builtin_prefetch(a->out_weight + i, 0, 2);
}

/* Steps, states, skip and gate of channels first to last; the result replaces u. */
static void select_and_gate(const args *a, const shared *s, int64_t b, int64_t first, int64_t last) {
    const int64_t I = a->I, N = a->N;
    float *u = s->u + b * I;
    const float *z = s->z + b * I, *proj = s->proj + b * s->P;
    const float *B_N = a->B_const ? a->B_const : proj + a->R;
    const float *C_N = a->C_const ? a->C_const : proj + a->R + (a->B_const ? 0 : N);
    for (int64_t i = first; i < last; i += V) {
        const int count = last - i < V ? (int)(last - i) : V;
        float raw[V] = {0}, steps[V], inputs[V], read[V] = {0};
        for (int j = 0; j < count && a->R; j += ROWS) {
            const quad sums = rows_times(a->dt_weight + (i + j) * a->R, proj, a->R, count - j);
            memcpy(raw + j, &sums, sizeof sums);
        }
        ask_for_output(a, i, i + count);
        const vf dt = log_one_plus_exp(load(raw) + load_part(a->dt_bias + i, count));
        const vf x = load_part(u + i, count);
        store(steps, dt);
        store(inputs, dt * x);
        for (int j = 0; j < count; j += ROWS) {
            const int64_t at = (b * I + i + j) * N;
            const quad y = advance_any(a->A_log + (i + j) * N, a->ssm_in + at, a->ssm_out + at, B_N, C_N, steps + j,
                                       inputs + j, count - j < ROWS ? count - j : ROWS, N);
            memcpy(read + j, &y, sizeof y);
        }
        const vf gate = load_part(z + i, count);
        const vf y = load(read) + load_part(a->D_skip + i, count) * x;
        store_part(u + i, y * silu(gate), count);
    }
}

/* Rows [first, last) of thread t of n, in whole blocks. */
INLINE void share(int64_t total, int64_t block, int t, int n, int64_t *first, int64_t *last) {
    const int64_t blocks = (total + block - 1) / block;
    *first = blocks * t / n * block;
    *last = blocks * (t + 1) / n * block;
    if (*last > total) *last = total;
    if (*first > total) *first = total;
}

/* What one thread does of a layer; the barriers are where one needs all of what the others made. */
static void layer(const args *a, const shared *s, float *x, int t, int threads) {
    const int64_t B = a->B, D = a->D, I = a->I;
    int64_t first, last;
    normed(a, x);
    share(I, TILE, t, threads, &first, &last);
    const product in_u = {a->in_weight, a->in_bias, x, NULL, s->u, D, D, I};
    const product in_z = {a->in_weight + I * D, a->in_bias ? a->in_bias + I : NULL, x, NULL, s->z, D, D, I};
    multiply(&in_u, B, first, last);
    for (int64_t b = 0; b < B; b++) convolve(a, s->u + b * I, b, first, last);
    multiply(&in_z, B, first, last);
#pragma omp barrier
    int64_t from, to;
    share(s->P, ROWS, t, threads, &from, &to);
    const product select = {a->x_weight, NULL, s->u, NULL, s->proj, I, I, s->P};
    multiply(&select, B, from, to);
#pragma omp barrier
    for (int64_t b = 0; b < B; b++) select_and_gate(a, s, b, first, last);
#pragma omp barrier
    share(D, TILE, t, threads, &from, &to);
    const product out = {a->out_weight, a->out_bias, s->u, a->residual ? a->x : NULL, a->y, I, I, D};
    multiply(&out, B, from, to);
}

int hybridnas_mamba_step(const args *a) {
    if (!a->B) return 0;
    const int threads = a->threads > 1 ? (int)a->threads : 1;
    shared s = {.P = a->R + (a->B_const ? 0 : a->N) + (a->C_const ? 0 : a->N)};
    float *work = allocate(a->B * (2 * a->I + s.P + threads * a->D));
    if (!work) return 1;
    s.u = work, s.z = s.u + a->B * a->I, s.proj = s.z + a->B * a->I;
    float *x = s.proj + a->B * s.P;
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        layer(a, &s, x + omp_get_thread_num() * a->B * a->D, omp_get_thread_num(), omp_get_num_threads());
        free(work);
        return 0;
    }
#endif
    layer(a, &s, x, 0, 1);
    free(work);
    return 0;
}
