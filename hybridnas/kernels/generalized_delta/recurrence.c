/* RWKV-7's recurrence, forward and backward, float32. The specification is reference.py.
 *
 * Step by step, as gated_delta/recurrence.c is and for its reasons. A unit of work is one head of one row of the batch, or
 * in the forward of few heads a part of one. The forward holds a tile of value channels, lanes are value channels, and one
 * pass over the state per step decays it, writes the step, reads the query and reads what the next step reads. It keeps the
 * state at the start of every chunk; the backward computes a chunk's states again from it, a few value channels at a time,
 * and there lanes are key channels. Units and the order of all sums follow from the shapes alone: results are the same bits
 * for any number of threads.
 *
 * seq_idx arrives as reset (B, L) bytes; a step that resets decays by zero and reads nothing.
 *
 * Letters: K key channels, held as P lanes (a multiple of TILE, zeros beyond K), V value channels, written D here since
 * V is the length of a vector.
 */
#include "vectors.h"

#define ENOUGH_UNITS 16 /* for the threads of a larger machine */

typedef struct {
    int64_t B, L, H, K, D, chunk, threads;
    int64_t q_b, q_l, q_h, k_b, k_l, k_h, g_b, g_l, g_h, a_b, a_l, a_h, b_b, b_l, b_h, v_b, v_l, v_h, do_b, do_l, do_h;
    const float *q, *k, *g, *a, *b, *v, *initial; /* g the log decay; initial (B, H, K, D) */
    const uint8_t *reset;                         /* (B, L) */
    float *o, *final, *read, *checkpoints;        /* read (B, L, H, D): S^T a; checkpoints (B, H, chunks, K, D) */
    const float *dout, *dfinal;
    float *dq, *dk, *dg, *da, *db, *dv, *dinitial; /* (B, L, H, K) but the last two */
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

/* The steps of a chunk, (steps, P) each. */
typedef struct { float *q, *k, *decay, *a, *b; } Steps;
#define PARTS 5

static void prepare(const Args *x, int64_t b, int64_t h, int64_t start, int64_t steps, int64_t P, const Steps *s) {
    const float *q = x->q + b * x->q_b + start * x->q_l + h * x->q_h, *k = x->k + b * x->k_b + start * x->k_l + h * x->k_h;
    const float *g = x->g + b * x->g_b + start * x->g_l + h * x->g_h, *a = x->a + b * x->a_b + start * x->a_l + h * x->a_h;
    const float *along = x->b + b * x->b_b + start * x->b_l + h * x->b_h;
    const uint8_t *reset = x->reset ? x->reset + b * x->L + start : NULL;
    for (int64_t t = 0; t < steps; t++) {
        const int fresh = reset && reset[t];
        for (int64_t i = 0; i < P; i += V) {
            const int count = (int)(x->K - i);
            store(s->q + t * P + i, load_part(q + t * x->q_l + i, count));
            store(s->k + t * P + i, load_part(k + t * x->k_l + i, count));
            store(s->b + t * P + i, load_part(along + t * x->b_l + i, count));
            store(s->a + t * P + i, fresh ? splat(0.f) : load_part(a + t * x->a_l + i, count));
            store(s->decay + t * P + i, fresh ? splat(0.f) : decay_of(load_part(g + t * x->g_l + i, count)));
        }
    }
}

/* Some steps of N vectors of value channels: S (K, N) is the state, `width` how many of the channels exist. */
INLINE void forward_tile(const int N, const Args *x, int64_t b, int64_t h, int64_t d0, int width, int64_t start,
                         int64_t steps, int64_t P, const Steps *s, vf *restrict S) {
    const int64_t K = x->K, row = (b * x->L + start) * x->H + h;
    const float *v = x->v + b * x->v_b + start * x->v_l + h * x->v_h + d0;
    float *o = x->o + row * x->D + d0, *kept = x->read ? x->read + row * x->D + d0 : NULL;
    vf next[4] = {{0}}; /* what the state holds along the step's a, before the step */
    for (int64_t i = 0; i < K; i++)
        for (int n = 0; n < N; n++) next[n] += S[i * N + n] * s->a[i];
    for (int64_t t = 0; t < steps; t++) {
        const float *q = s->q + t * P, *k = s->k + t * P, *decay = s->decay + t * P, *along = s->b + t * P;
        const float *a = s->a + (t + 1 < steps ? t + 1 : t) * P;
        vf value[4], read[4], out[4] = {{0}};
        for (int n = 0; n < N; n++) {
            value[n] = load_part(v + t * x->v_l + n * V, width - n * V);
            read[n] = next[n];
            if (kept) store_part(kept + t * x->H * x->D + n * V, read[n], width - n * V);
            next[n] = splat(0.f);
        }
        for (int64_t i = 0; i < K; i++) {
            const float decay_i = decay[i], k_i = k[i], q_i = q[i], b_i = along[i], a_i = a[i];
            for (int n = 0; n < N; n++) {
                const vf y = S[i * N + n] * decay_i + (value[n] * k_i + read[n] * b_i);
                S[i * N + n] = y;
                out[n] += y * q_i;
                next[n] += y * a_i;
            }
        }
        for (int n = 0; n < N; n++) store_part(o + t * x->H * x->D + n * V, out[n], width - n * V);
    }
}

static void forward_any(int N, const Args *x, int64_t b, int64_t h, int64_t d0, int64_t start, int64_t steps, int64_t P,
                        const Steps *s, vf *S) {
    const int width = (int)minimum(x->D - d0, N * V);
    if (N == 4) forward_tile(4, x, b, h, d0, width, start, steps, P, s, S);
    else if (N == 2) forward_tile(2, x, b, h, d0, width, start, steps, P, s, S);
    else forward_tile(1, x, b, h, d0, width, start, steps, P, s, S);
}

/* How many vectors of value channels a tile has: few enough that its state stays in the first-level cache. */
static int tile_vectors(int64_t K, int64_t channels) {
    const int widest = V == 16 ? (K <= 64 ? 4 : K <= 128 ? 2 : 1) : (K <= 128 ? 2 : 1);
    int N = widest;
    while (N > 1 && (N / 2) * V >= channels) N /= 2;
    return N;
}

/* Into how many units the forward cuts a head's value channels: several where heads are too few for many threads. */
static int64_t parts_of(const Args *x) { return x->B * x->H < ENOUGH_UNITS ? (x->D + 4 * V - 1) / (4 * V) : 1; }

INLINE Steps steps_in(float *memory, int64_t part) {
    return (Steps){memory, memory + part, memory + 2 * part, memory + 3 * part, memory + 4 * part};
}

static int forward_unit(const Args *x, int64_t unit) {
    const int64_t parts = parts_of(x), b = unit / parts / x->H, h = unit / parts % x->H;
    const int64_t first = unit % parts * 4 * V, last = parts == 1 ? x->D : minimum(x->D, first + 4 * V);
    const int64_t K = x->K, D = x->D, P = round_up(K, V), chunks = (x->L + x->chunk - 1) / x->chunk;
    const int64_t across = round_up(last - first, 4 * V), part = x->chunk * P, head = (b * x->H + h) * K * D;
    float *memory = allocate(PARTS * part + K * across);
    if (!memory) return 1;
    const Steps s = steps_in(memory, part);
    vf *states = (vf *)(memory + PARTS * part);
    for (int64_t c = 0; c < chunks; c++) {
        const int64_t start = c * x->chunk, steps = minimum(x->chunk, x->L - start);
        prepare(x, b, h, start, steps, P, &s);
        vf *S = states;
        for (int64_t d0 = first; d0 < last;) {
            const int N = tile_vectors(K, last - d0);
            if (c == 0)
                for (int64_t i = 0; i < K; i++)
                    for (int n = 0; n < N; n++)
                        S[i * N + n] = x->initial ? load_part(x->initial + head + i * D + d0 + n * V, (int)(D - d0) - n * V) : splat(0.f);
            if (x->checkpoints) {
                float *kept = x->checkpoints + ((b * x->H + h) * chunks + c) * K * D + d0;
                for (int64_t i = 0; i < K; i++)
                    for (int n = 0; n < N; n++) store_part(kept + i * D + n * V, S[i * N + n], (int)(D - d0) - n * V);
            }
            forward_any(N, x, b, h, d0, start, steps, P, &s, S);
            if (c + 1 == chunks)
                for (int64_t i = 0; i < K; i++)
                    for (int n = 0; n < N; n++)
                        store_part(x->final + head + i * D + d0 + n * V, S[i * N + n], (int)(D - d0) - n * V);
            S += K * N, d0 += N * V;
        }
    }
    free(memory);
    return 0;
}

#include "backward.h"

static int over(const Args *x, int64_t units, int (*work)(const Args *, int64_t)) {
    int failed = 0;
#pragma omp parallel for schedule(dynamic) num_threads((int)x->threads) reduction(| : failed)
    for (int64_t i = 0; i < units; i++) failed |= work(x, i);
    return failed;
}

int hybridnas_generalized_delta_forward(const Args *x) { return over(x, x->B * x->H * parts_of(x), forward_unit); }

int hybridnas_generalized_delta_backward(const Args *x) { return over(x, x->B * x->H, backward_unit); }
