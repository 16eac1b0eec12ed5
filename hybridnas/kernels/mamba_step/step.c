/* One token through a Mamba layer: norm, input projection, convolution, SiLU, x_proj, dt_proj, softplus, state update,
 * skip, gate, output projection, residual, in one call. Letters: B batch, D width, I inner channels, N states, K taps,
 * R rank of the step size; weights (out, in) as torch.nn.Linear has them.
 */
#include "rows.h"

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

/* What one thread does of a layer; the barriers are where one needs all of what the others made. */
static void layer(const args *a, const shared *s, float *x, int t, int threads) {
    const int64_t B = a->B, D = a->D, I = a->I;
    int64_t first, last;
    const norm before = {a->norm, a->norm_weight, a->norm_bias, (float)a->eps};
    const taps window = {a->conv_weight, a->conv_bias, a->conv_in, a->conv_out, I, a->K};
    normed(&before, a->x, x, B, D);
    share(I, TILE, t, threads, &first, &last);
    const product in_u = {a->in_weight, a->in_bias, x, NULL, s->u, D, D, I};
    const product in_z = {a->in_weight + I * D, a->in_bias ? a->in_bias + I : NULL, x, NULL, s->z, D, D, I};
    multiply(&in_u, B, first, last);
    for (int64_t b = 0; b < B; b++) convolve(&window, s->u + b * I, b, first, last);
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
