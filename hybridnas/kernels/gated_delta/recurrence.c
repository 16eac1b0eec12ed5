/* Gated linear recurrences, forward and backward, float32. The specification is reference.py.
 *
 * Step by step, since in registers that costs what chunked matrix products of the same state cost, and every decay is
 * exact. A unit of work is one value head of one row of the batch, or in the forward of few heads a part of one. The
 * forward holds a tile of value channels, lanes are value channels, and one pass over the state per step decays it, writes
 * the step's value, reads the query and reads the next step's key. It keeps the state at the start of every chunk; the
 * backward computes a chunk's states again from it, a few value channels at a time, and there lanes are key channels: of
 * all its sums only one is across lanes. Units and the order of all sums follow from the shapes alone: results are the
 * same bits for any number of threads.
 *
 * seq_idx arrives as reset (B, L) bytes; a step that resets decays by zero.
 *
 * Letters: K key channels, held as P lanes (a multiple of TILE, zeros beyond K), V value channels, written D here since
 * V is the length of a vector.
 */
#include "vectors.h"

#define ENOUGH_UNITS 16 /* for the threads of a larger machine */

typedef struct {
    int64_t B, L, H, share, K, D, chunk, by_channel, threads;
    int64_t q_b, q_l, q_g, k_b, k_l, k_g, v_b, v_l, v_h, g_b, g_l, g_h, do_b, do_l, do_h; /* strides in floats */
    double scale;
    const float *q, *k, *v, *g, *beta, *initial; /* g the log decay; beta (B, L, H); initial (B, H, K, D) */
    const uint8_t *reset;                        /* (B, L) */
    float *o, *final, *missed, *checkpoints; /* missed (B, L, H, D): v less what was read; checkpoints (B, H, chunks, K, D) */
    const float *dout, *dfinal;
    float *dq, *dk, *dv, *dg, *dbeta, *dinitial; /* dq, dk (B, L, H, K); dg (B, L, H) or (B, L, H, K) */
} Args;

INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t size) { return (n + size - 1) / size * size; }

/* Lanes that hold K key channels, a multiple of TILE that backward_tile is compiled for; 0 where it is for none. */
static int64_t lanes_for(int64_t K) {
    static const int64_t sizes[] = {16, 32, 48, 64, 96, 128, 256};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (K <= sizes[i]) return sizes[i];
    return 0;
}

/* e^x, and exactly zero where a float cannot hold it with all its digits. */
INLINE vf decay_of(vf x) {
    const vf t = x * LOG2E;
    return choose(t < splat(-126.f), splat(0.f), exp2_any(t));
}

/* The steps of a chunk, (steps, P) each: scaled queries, keys, decays, and keys times decays. */
typedef struct { float *q, *k, *decay, *read; } Steps;

static void prepare(const Args *a, int64_t b, int64_t h, int64_t start, int64_t steps, int64_t P, const Steps *s) {
    const float *q = a->q + b * a->q_b + start * a->q_l + h / a->share * a->q_g;
    const float *k = a->k + b * a->k_b + start * a->k_l + h / a->share * a->k_g;
    const float *g = a->g ? a->g + b * a->g_b + start * a->g_l + h * a->g_h : NULL;
    const uint8_t *reset = a->reset ? a->reset + b * a->L + start : NULL;
    const vf scale = splat((float)a->scale);
    for (int64_t t = 0; t < steps; t++) {
        const int fresh = reset && reset[t];
        vf by_head = splat(1.f);
        if (g && !a->by_channel) by_head = decay_of(splat(g[t * a->g_l]));
        for (int64_t i = 0; i < P; i += V) {
            const int count = (int)(a->K - i);
            vf decay = by_head;
            if (g && a->by_channel) decay = decay_of(load_part(g + t * a->g_l + i, count));
            if (fresh) decay = splat(0.f);
            const vf key = load_part(k + t * a->k_l + i, count);
            store(s->q + t * P + i, load_part(q + t * a->q_l + i, count) * scale);
            store(s->k + t * P + i, key);
            store(s->decay + t * P + i, decay);
            store(s->read + t * P + i, key * decay);
        }
    }
}

/* Some steps of N vectors of value channels: S (K, N) is the state, `width` how many of the channels exist. */
INLINE void forward_tile(const int delta, const int N, const Args *a, int64_t b, int64_t h, int64_t d0, int width,
                         int64_t start, int64_t steps, int64_t P, const Steps *s, vf *restrict S) {
    const int64_t K = a->K, row = (b * a->L + start) * a->H + h;
    const float *v = a->v + b * a->v_b + start * a->v_l + h * a->v_h + d0;
    float *o = a->o + row * a->D + d0, *missed = a->missed ? a->missed + row * a->D + d0 : NULL;
    vf read[4] = {{0}}; /* what the state holds for the step's key, before the step is written */
    if (delta)
        for (int64_t i = 0; i < K; i++)
            for (int n = 0; n < N; n++) read[n] += S[i * N + n] * s->read[i];
    for (int64_t t = 0; t < steps; t++) {
        const float *q = s->q + t * P, *k = s->k + t * P, *decay = s->decay + t * P;
        const float *next = s->read + (t + 1 < steps ? t + 1 : t) * P;
        vf value[4], out[4] = {{0}};
        for (int n = 0; n < N; n++) {
            value[n] = load_part(v + t * a->v_l + n * V, width - n * V);
            if (delta) {
                value[n] -= read[n];
                if (missed) store_part(missed + t * a->H * a->D + n * V, value[n], width - n * V);
                value[n] *= a->beta[row + t * a->H];
                read[n] = splat(0.f);
            }
        }
        for (int64_t i = 0; i < K; i++) {
            const float decay_i = decay[i], k_i = k[i], q_i = q[i], next_i = next[i];
            for (int n = 0; n < N; n++) {
                const vf x = S[i * N + n] * decay_i + value[n] * k_i;
                S[i * N + n] = x;
                out[n] += x * q_i;
                if (delta) read[n] += x * next_i;
            }
        }
        for (int n = 0; n < N; n++) store_part(o + t * a->H * a->D + n * V, out[n], width - n * V);
    }
}

static void forward_any(int N, const Args *a, int64_t b, int64_t h, int64_t d0, int64_t start, int64_t steps, int64_t P,
                        const Steps *s, vf *S) {
    const int width = (int)minimum(a->D - d0, N * V), delta = a->beta != NULL;
    if (delta && N == 4) forward_tile(1, 4, a, b, h, d0, width, start, steps, P, s, S);
    else if (delta && N == 2) forward_tile(1, 2, a, b, h, d0, width, start, steps, P, s, S);
    else if (delta) forward_tile(1, 1, a, b, h, d0, width, start, steps, P, s, S);
    else if (N == 4) forward_tile(0, 4, a, b, h, d0, width, start, steps, P, s, S);
    else if (N == 2) forward_tile(0, 2, a, b, h, d0, width, start, steps, P, s, S);
    else forward_tile(0, 1, a, b, h, d0, width, start, steps, P, s, S);
}

/* How many vectors of value channels a tile has: few enough that its state stays in the first-level cache. */
static int tile_vectors(int64_t K, int64_t channels) {
    const int widest = V == 16 ? (K <= 64 ? 4 : K <= 128 ? 2 : 1) : (K <= 128 ? 2 : 1);
    int N = widest;
    while (N > 1 && (N / 2) * V >= channels) N /= 2;
    return N;
}

/* Into how many units the forward cuts a head's value channels: several where heads are too few for many threads. */
static int64_t parts_of(const Args *a) { return a->B * a->H < ENOUGH_UNITS ? (a->D + 4 * V - 1) / (4 * V) : 1; }

static int forward_unit(const Args *a, int64_t unit) {
    const int64_t parts = parts_of(a), b = unit / parts / a->H, h = unit / parts % a->H;
    const int64_t first = unit % parts * 4 * V, last = parts == 1 ? a->D : minimum(a->D, first + 4 * V);
    const int64_t K = a->K, D = a->D, P = round_up(K, V), chunks = (a->L + a->chunk - 1) / a->chunk;
    const int64_t across = round_up(last - first, 4 * V), part = a->chunk * P, head = (b * a->H + h) * K * D;
    float *memory = allocate(4 * part + K * across);
    if (!memory) return 1;
    const Steps s = {memory, memory + part, memory + 2 * part, memory + 3 * part};
    vf *states = (vf *)(memory + 4 * part);
    for (int64_t c = 0; c < chunks; c++) {
        const int64_t start = c * a->chunk, steps = minimum(a->chunk, a->L - start);
        prepare(a, b, h, start, steps, P, &s);
        vf *S = states;
        for (int64_t d0 = first; d0 < last;) {
            const int N = tile_vectors(K, last - d0);
            if (c == 0)
                for (int64_t i = 0; i < K; i++)
                    for (int n = 0; n < N; n++)
                        S[i * N + n] = a->initial ? load_part(a->initial + head + i * D + d0 + n * V, (int)(D - d0) - n * V) : splat(0.f);
            if (a->checkpoints) {
                float *kept = a->checkpoints + ((b * a->H + h) * chunks + c) * K * D + d0;
                for (int64_t i = 0; i < K; i++)
                    for (int n = 0; n < N; n++) store_part(kept + i * D + n * V, S[i * N + n], (int)(D - d0) - n * V);
            }
            forward_any(N, a, b, h, d0, start, steps, P, &s, S);
            if (c + 1 == chunks)
                for (int64_t i = 0; i < K; i++)
                    for (int n = 0; n < N; n++)
                        store_part(a->final + head + i * D + d0 + n * V, S[i * N + n], (int)(D - d0) - n * V);
            S += K * N, d0 += N * V;
        }
    }
    free(memory);
    return 0;
}

#include "backward.h"

static int over(const Args *a, int64_t units, int (*work)(const Args *, int64_t)) {
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads((int)a->threads) reduction(| : failed)
    for (int64_t i = 0; i < units; i++) failed |= work(a, i);
    return failed;
}

int hybridnas_gated_delta_forward(const Args *a) { return over(a, a->B * a->H * parts_of(a), forward_unit); }

int hybridnas_gated_delta_backward(const Args *a) { return over(a, a->B * a->H, backward_unit); }
