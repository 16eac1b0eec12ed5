/* One token through a layer around a gated linear recurrence: norm, input projection, convolution, decay, delta rule,
 * output norm, gate, output projection, residual, in one call. The specification is reference.py.
 *
 * Letters: B batch, D width, C mixed channels (queries, keys, values), T taps, G key heads, H value heads, K key and
 * M state channels of a head (its N values, and one more where the output is divided by the keys' sum), X decays.
 */
#include "rows.h"

enum { DECAY_NONE, DECAY_FIXED, DECAY_SOFTPLUS, DECAY_BOUNDED, DECAY_SIGMOID, DECAY_FORGET };
enum { MAP_NONE, MAP_ELU, MAP_RELU, MAP_L2 };
enum { OUT_NONE, OUT_HEAD, OUT_WHOLE, OUT_SUM };
enum { GATE_NONE, GATE_SILU, GATE_SIGMOID };

typedef struct {
    int64_t B, D, C, T, G, H, K, N, X, gate_in, decay_in, silu, map, decay, out_norm, gate, norm, residual, threads;
    /* silu: without a convolution, the channels that SiLU follows */
    double eps, out_eps, l2_eps, sum_eps, scale, beta, decay_by; /* decay_by: bound, temperature or least forget gate */
    const float *x, *norm_weight, *norm_bias, *in_weight, *conv_weight, *conv_bias, *decay_weight, *decay_bias, *A_log,
        *dt_bias, *frequency, *gate_weight, *out_norm_weight, *out_weight, *conv_in, *memory_in;
    float *y, *conv_out, *memory_out; /* each may be its own input */
} args;

typedef struct {
    float *row, *decay, *gate, *read; /* in_proj's (B, R); logits of the decay (B, X); gate (B, I); output (B, I) */
    int64_t R, I, M;
} shared;

INLINE float logistic(float x) {
    const float e = expf(-fabsf(x));
    return (x < 0.f ? e : 1.f) / (1.f + e);
}
INLINE float softplus(float x) { return (x > 0.f ? x : 0.f) + log1pf(expf(-fabsf(x))); }

/* The queries or keys of a head after the feature map, times `by`. */
static void mapped(const args *a, const float *x, float by, float *y) {
    float factor = by;
    if (a->map == MAP_L2) {
        float sum = 0.f;
        for (int64_t i = 0; i < a->K; i++) sum += x[i] * x[i];
        factor = by / sqrtf(sum + (float)a->l2_eps);
    }
    for (int64_t i = 0; i < a->K; i++) {
        float f = x[i];
        if (a->map == MAP_ELU) f = f > 0.f ? f + 1.f : expf(f);
        if (a->map == MAP_RELU) f = f < 0.f ? 0.f : f; /* NaN stays */
        y[i] = f * factor;
    }
}

/* Decays of a head's key channels; raw are its logits. A forget gate f is the decay, 1 - f the key. */
static void decays(const args *a, const float *raw, int64_t h, float *decay, float *key) {
    const float by = (float)a->decay_by;
    const int64_t each = a->X / a->H; /* logits of a head: 1 or K, or 0 */
    const float rate = a->A_log ? expf(a->A_log[h]) : 0.f;
    for (int64_t i = 0; i < a->K; i++) {
        if (i && each <= 1 && a->decay != DECAY_FORGET) {
            decay[i] = decay[0];
            continue;
        }
        const float r = each ? raw[h * each + (each > 1 ? i : 0)] : 0.f;
        const float biased = a->dt_bias ? r + a->dt_bias[h * each + (each > 1 ? i : 0)] : r;
        switch (a->decay) {
        case DECAY_FIXED: decay[i] = expf(a->A_log[h]); break; /* the logarithm itself */
        case DECAY_SOFTPLUS: decay[i] = expf(-rate * softplus(biased)); break;
        case DECAY_BOUNDED: decay[i] = expf(by * logistic(rate * biased)); break;
        case DECAY_SIGMOID: decay[i] = expf(-softplus(-r) / by); break;
        case DECAY_FORGET:
            decay[i] = by + (1.f - by) * logistic(r);
            key[i] = (1.f - by) * logistic(-r);
            break;
        default: decay[i] = 1.f;
        }
    }
}

/* The state of one head, (K, M), `vectors` vectors of its columns: what it holds for the key, then the step, then o. */
INLINE void advance(const int vectors, const args *a, const float *q, const float *k, const float *decay, float beta,
                    const float *v, const float *before, float *after, float *o, int64_t M, int width) {
    vf value[4], out[4] = {{0}};
    for (int n = 0; n < vectors; n++) value[n] = load_part(v + n * V, width - n * V);
    if (a->beta != 0.) {
        vf held[4] = {{0}};
        for (int64_t i = 0; i < a->K; i++)
            for (int n = 0; n < vectors; n++)
                held[n] += load_part(before + i * M + n * V, width - n * V) * (k[i] * decay[i]);
        for (int n = 0; n < vectors; n++) value[n] = (value[n] - held[n]) * beta;
    }
    for (int64_t i = 0; i < a->K; i++)
        for (int n = 0; n < vectors; n++) {
            const int count = width - n * V;
            const vf s = load_part(before + i * M + n * V, count) * decay[i] + value[n] * k[i];
            store_part(after + i * M + n * V, s, count);
            out[n] += s * q[i];
        }
    for (int n = 0; n < vectors; n++) store_part(o + n * V, out[n], width - n * V);
}

/* Turn the pairs of rows (i, i + K/2) back by one position, which the next token's queries and keys count from 0. */
static void turn_back(const args *a, float *S, int64_t M) {
    const int64_t half = a->K / 2;
    for (int64_t i = 0; i < half; i++) {
        const float c = cosf(a->frequency[i]), s = sinf(a->frequency[i]);
        float *one = S + i * M, *two = S + (i + half) * M;
        for (int64_t j = 0; j < M; j++) {
            const float first = one[j], second = two[j];
            one[j] = first * c + second * s;
            two[j] = second * c - first * s;
        }
    }
}

/* o = weight * o / rms(o) over n channels, times the gate's activation. */
static void finish(const args *a, float *o, const float *gate, const float *weight, int64_t n) {
    if (weight) {
        const float by = 1.f / sqrtf(mean_of(o, n, 0.f, 1) + (float)a->out_eps);
        for (int64_t i = 0; i < n; i++) o[i] *= by * weight[i];
    }
    for (int64_t i = 0; i < n && a->gate; i += V) {
        const int count = n - i < V ? (int)(n - i) : V;
        const vf g = load_part(gate + i, count);
        const vf open = a->gate == GATE_SILU ? silu(g) : choose(g == g, sigmoid(g), g);
        store_part(o + i, load_part(o + i, count) * open, count);
    }
}

/* The recurrence of value head h of row b; work holds 3 K + 2 M floats. */
static void head(const args *a, const shared *s, int64_t b, int64_t h, float *work) {
    const int64_t K = a->K, M = s->M, N = a->N, at = (b * a->H + h) * K * M, keys = a->G * K, g = h / (a->H / a->G);
    float *q = work, *k = q + K, *decay = k + K, *v = decay + K, *o = v + M;
    const float *row = s->row + b * s->R, *u = row;
    const int tied = a->decay == DECAY_FORGET; /* keys come from the forget gate */
    mapped(a, u + g * K, (float)a->scale, q);
    if (!tied) mapped(a, u + keys + g * K, 1.f, k);
    decays(a, s->decay ? s->decay + b * a->X : row + a->C + a->gate_in, h, decay, k);
    memcpy(v, u + (tied ? 1 : 2) * keys + h * N, (size_t)N * 4);
    if (M > N) v[N] = 1.f;
    const float beta = a->beta != 0. ? (float)a->beta * logistic(row[a->C + a->gate_in + a->decay_in + h]) : 0.f;
    int64_t d = 0;
    const float *before = a->memory_in + at;
    float *after = a->memory_out + at;
    for (; d + 4 * V <= M; d += 4 * V) advance(4, a, q, k, decay, beta, v + d, before + d, after + d, o + d, M, 4 * V);
    for (; d < M; d += V) {
        const int width = M - d < V ? (int)(M - d) : V;
        if (width == V) advance(1, a, q, k, decay, beta, v + d, before + d, after + d, o + d, M, V);
        else advance(1, a, q, k, decay, beta, v + d, before + d, after + d, o + d, M, width);
    }
    if (a->frequency) turn_back(a, after, M);
    float *read = s->read + b * s->I + h * N;
    const float by = M > N ? 1.f / (o[N] + (float)a->sum_eps) : 1.f;
    for (int64_t i = 0; i < N; i++) read[i] = o[i] * by;
    if (a->out_norm != OUT_WHOLE) {
        const float *gate = s->gate ? s->gate + b * s->I : row + a->C;
        finish(a, read, gate + h * N, a->out_norm == OUT_HEAD ? a->out_norm_weight : NULL, N);
    }
}

/* What one thread does of a layer; the barriers are where one needs all of what the others made. */
static void layer(const args *a, const shared *s, float *x, float *work, int t, int threads) {
    const int64_t B = a->B, D = a->D;
    const norm before = {a->norm, a->norm_weight, a->norm_bias, (float)a->eps};
    const taps window = {a->conv_weight, a->conv_bias, a->conv_in, a->conv_out, a->C, a->T};
    int64_t first, last;
    normed(&before, a->x, x, B, D);
    share(s->R, ROWS, t, threads, &first, &last);
    const product in = {a->in_weight, NULL, x, NULL, s->row, D, D, s->R};
    multiply(&in, B, first, last);
#pragma omp barrier
    share(a->C, TILE, t, threads, &first, &last);
    for (int64_t b = 0; b < B; b++) {
        float *u = s->row + b * s->R;
        if (a->T) convolve(&window, u, b, first, last);
        else
            for (int64_t i = first; i < last && i < a->silu; i++) u[i] *= logistic(u[i]);
    }
    if (s->gate) {
        const product gate = {a->gate_weight, NULL, s->row + a->C, NULL, s->gate, a->gate_in, s->R, s->I};
        share(s->I, ROWS, t, threads, &first, &last);
        multiply(&gate, B, first, last);
    }
    if (s->decay) {
        const float *part = s->row + a->C + a->gate_in;
        const product decay = {a->decay_weight, a->decay_bias, part, NULL, s->decay, a->decay_in, s->R, a->X};
        share(a->X, ROWS, t, threads, &first, &last);
        multiply(&decay, B, first, last);
    }
#pragma omp barrier
    share(B * a->H, 1, t, threads, &first, &last);
    for (int64_t unit = first; unit < last; unit++) head(a, s, unit / a->H, unit % a->H, work);
#pragma omp barrier
    if (a->out_norm == OUT_WHOLE) {
        share(B, 1, t, threads, &first, &last);
        for (int64_t b = first; b < last; b++)
            finish(a, s->read + b * s->I, s->gate ? s->gate + b * s->I : s->row + b * s->R + a->C, a->out_norm_weight,
                   s->I);
#pragma omp barrier
    }
    share(D, TILE, t, threads, &first, &last);
    const product out = {a->out_weight, NULL, s->read, a->residual ? a->x : NULL, a->y, s->I, s->I, D};
    multiply(&out, B, first, last);
}

int hybridnas_delta_step(const args *a) {
    if (!a->B) return 0;
    const int threads = a->threads > 1 ? (int)a->threads : 1;
    shared s = {.R = a->C + a->gate_in + a->decay_in + (a->beta != 0. ? a->H : 0), .I = a->H * a->N};
    s.M = a->N + (a->out_norm == OUT_SUM);
    const int64_t X = a->decay_weight ? a->X : 0, gates = a->gate_weight ? s.I : 0, each = 3 * a->K + 2 * s.M;
    float *all = allocate(a->B * (s.R + s.I + X + gates) + threads * (a->B * a->D + each));
    if (!all) return 1;
    s.row = all, s.read = s.row + a->B * s.R;
    s.decay = X ? s.read + a->B * s.I : NULL;
    s.gate = gates ? s.read + a->B * (s.I + X) : NULL;
    float *x = s.read + a->B * (s.I + X + gates), *work = x + threads * a->B * a->D;
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            const int t = omp_get_thread_num();
            layer(a, &s, x + t * a->B * a->D, work + t * each, t, omp_get_num_threads());
        }
        free(all);
        return 0;
    }
#endif
    layer(a, &s, x, work, 0, 1);
    free(all);
    return 0;
}
