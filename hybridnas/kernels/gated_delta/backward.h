/* The backward of the recurrence, a few value channels at a time; a part of recurrence.c, to be read after it.
 *
 * With A = diag(decay), S the state before a step and S' after it, e the written value, r = (A S)^T k what was read:
 *     dS' += q do^T          dq = S' do           de = dS'^T k        dk = dS' e
 *     dr = -beta de          dS = A (dS' + k dr^T)                    dk += A S dr       d(log decay) = rows of A S * (dS' + k dr^T)
 */

/* out[r] = the sum over the lanes of x[r]; R is 4 or 8. */
INLINE void sum_rows(const int R, const vf *x, float *out) {
    if (R == 8) {
        sum_lanes_8(x, 1, out);
        return;
    }
#ifdef HAVE_SHUFFLE
    const v8 four = add_neighbours(add_neighbours(eight_lanes(x), eight_lanes(x + 1)),
                                   add_neighbours(eight_lanes(x + 2), eight_lanes(x + 3)));
    typedef float v4 __attribute__((vector_size(16), aligned(4)));
    *(v4 *)out = __builtin_shufflevector(four, four, 0, 1, 2, 3) + __builtin_shufflevector(four, four, 4, 5, 6, 7);
#else
    for (int r = 0; r < 4; r++) out[r] = sum_lanes(x[r]);
#endif
}

/* A chunk as the backward reads it, (steps, across) each, zeros beyond D. */
typedef struct { float *written, *dout, *dwritten; } Values;

#define BACKWARD_SIZES(CASE) CASE(16, 8) CASE(32, 8) CASE(48, 4) CASE(64, 4) CASE(96, 4) CASE(128, 4) CASE(256, 4)
#define BACKWARD_ROWS 8    /* the largest R */
INLINE int64_t rows_for(int64_t P) { return P <= 32 ? 8 : 4; }
#define MOST (256 * 4 / V) /* vectors of the largest tile */

/* A chunk of R value channels: dS (R, P) is the state's gradient after the chunk and becomes that before it. */
INLINE void backward_tile(const int delta, const int N, const int R, const float *beta, int64_t steps, int64_t across,
                          const Steps *s, const Values *values, vf *restrict states, vf *restrict sums, float *dS) {
    const int64_t P = N * V;
    vf d[MOST], state[MOST];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) state[r * N + n] = states[r * N + n];
    for (int64_t t = 0; t < steps; t++) {
        const float *k = s->k + t * P, *decay = s->decay + t * P, *e = values->written + t * across;
        vf *after = states + (t + 1) * R * N;
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) {
            const vf decay_n = load(decay + n * V), k_n = load(k + n * V);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) after[r * N + n] = state[r * N + n] = state[r * N + n] * decay_n + k_n * e[r];
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) d[r * N + n] = load(dS + r * P + n * V);
    for (int64_t t = steps - 1; t >= 0; t--) {
        const float *q = s->q + t * P, *k = s->k + t * P, *decay = s->decay + t * P;
        const float *e = values->written + t * across, *dout = values->dout + t * across;
        const vf *before = states + t * R * N, *after = before + R * N;
        vf *sum = sums + t * 4 * N, across_lanes[BACKWARD_ROWS];
        float dwritten[BACKWARD_ROWS], dread[BACKWARD_ROWS];
        for (int r = 0; r < R; r++) across_lanes[r] = splat(0.f);
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) {
            const vf q_n = load(q + n * V), k_n = load(k + n * V);
            vf of_q = sum[n], of_written = sum[N + n];
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                d[r * N + n] += q_n * dout[r];
                across_lanes[r] += d[r * N + n] * k_n;
                of_q += after[r * N + n] * dout[r];
                of_written += d[r * N + n] * e[r];
            }
            sum[n] = of_q, sum[N + n] = of_written;
        }
        sum_rows(R, across_lanes, dwritten);
        for (int r = 0; r < R; r++) {
            values->dwritten[t * across + r] = dwritten[r];
            dread[r] = delta ? -beta[t] * dwritten[r] : 0.f;
        }
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) {
            const vf k_n = load(k + n * V), decay_n = load(decay + n * V);
            vf of_read = sum[2 * N + n], of_decay = sum[3 * N + n];
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                const vf was = before[r * N + n];
                if (delta) {
                    of_read += was * dread[r];
                    d[r * N + n] += k_n * dread[r];
                }
                of_decay += was * d[r * N + n];
                d[r * N + n] *= decay_n;
            }
            if (delta) sum[2 * N + n] = of_read;
            sum[3 * N + n] = of_decay;
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) store(dS + r * P + n * V, d[r * N + n]);
}

#define BACKWARD_SIZES(CASE) CASE(16, 8) CASE(32, 8) CASE(48, 4) CASE(64, 4) CASE(96, 4) CASE(128, 4) CASE(256, 4)
/* One function a size, so that the compiler optimizes each by itself. */
#define BACKWARD_TILE(P, R)                                                                                             \
    static void backward_##P(const float *beta, int64_t steps, int64_t across, const Steps *s, const Values *values,    \
                             vf *states, vf *sums, float *dS) {                                                        \
        if (beta) backward_tile(1, P / V, R, beta, steps, across, s, values, states, sums, dS);                         \
        else backward_tile(0, P / V, R, beta, steps, across, s, values, states, sums, dS);                              \
    }
BACKWARD_SIZES(BACKWARD_TILE)

/* (K, D) values of a head as (D, P), a row for each value channel; NULL is zeros. */
static void transposed(const float *from, int64_t K, int64_t D, int64_t rows, int64_t P, float *to) {
    memset(to, 0, (size_t)(rows * P) * 4);
    if (!from) return;
    for (int64_t i = 0; i < K; i++)
        for (int64_t j = 0; j < D; j++) to[j * P + i] = from[i * D + j];
}

static int backward_unit(const Args *a, int64_t head) {
    const int64_t b = head / a->H, h = head % a->H;
    const int64_t K = a->K, D = a->D, P = lanes_for(K), chunks = (a->L + a->chunk - 1) / a->chunk;
    const int64_t across = round_up(D, BACKWARD_ROWS), part = a->chunk * P, wide = a->chunk * across;
    const int64_t N = P / V, rows = rows_for(P), tile = rows * P;
    float *memory = allocate(4 * part + (a->chunk + 1) * tile + 4 * part + 2 * across * P + 3 * wide + a->chunk);
    if (!memory) return 1;
    const Steps s = {memory, memory + part, memory + 2 * part, memory + 3 * part};
    float *states = memory + 4 * part, *sums = states + (a->chunk + 1) * tile, *dS = sums + 4 * part;
    float *starts = dS + across * P, *values_at = starts + across * P, *beta = values_at + 3 * wide;
    const Values values = {values_at, values_at + wide, values_at + 2 * wide};
    memset(values_at, 0, (size_t)(2 * wide) * 4);
    transposed(a->dfinal ? a->dfinal + head * K * D : NULL, K, D, across, P, dS);
    for (int64_t c = chunks - 1; c >= 0; c--) {
        const int64_t start = c * a->chunk, steps = minimum(a->chunk, a->L - start), row = (b * a->L + start) * a->H + h;
        prepare(a, b, h, start, steps, P, &s);
        transposed(a->checkpoints + (head * chunks + c) * K * D, K, D, across, P, starts);
        memset(sums, 0, (size_t)(steps * 4 * P) * 4);
        for (int64_t t = 0; t < steps; t++) {
            const int64_t at = row + t * a->H;
            const float *v = a->v + b * a->v_b + (start + t) * a->v_l + h * a->v_h;
            const float *dout = a->dout + b * a->do_b + (start + t) * a->do_l + h * a->do_h;
            memcpy(values.dout + t * across, dout, (size_t)D * 4);
            if (a->beta) {
                beta[t] = a->beta[at];
                for (int64_t j = 0; j < D; j++) values.written[t * across + j] = beta[t] * a->missed[at * D + j];
            } else
                memcpy(values.written + t * across, v, (size_t)D * 4);
        }
        for (int64_t d0 = 0; d0 < D; d0 += rows) {
            const Values mine = {values.written + d0, values.dout + d0, values.dwritten + d0};
            memcpy(states, starts + d0 * P, (size_t)tile * 4);
            switch (P) {
#define BACKWARD_CALL(P, R)                                                                                             \
    case P: backward_##P(a->beta ? beta : NULL, steps, across, &s, &mine, (vf *)states, (vf *)sums, dS + d0 * P); break;
                BACKWARD_SIZES(BACKWARD_CALL)
            }
        }
        for (int64_t t = 0; t < steps; t++) {
            const int64_t at = row + t * a->H;
            const float *dwritten = values.dwritten + t * across;
            const vf *sum = (vf *)sums + t * 4 * N;
            float of_beta = 0.f;
            for (int64_t j = 0; j < D; j++) {
                a->dv[at * D + j] = a->beta ? beta[t] * dwritten[j] : dwritten[j];
                if (a->beta) of_beta += dwritten[j] * a->missed[at * D + j];
            }
            if (a->beta) a->dbeta[at] = of_beta;
            vf of_head = splat(0.f);
            for (int64_t n = 0; n < N; n++) {
                const int count = (int)(K - n * V);
                const vf decay = load(s.decay + t * P + n * V), of_decay = decay * sum[3 * N + n];
                store_part(a->dq + at * K + n * V, sum[n] * (float)a->scale, count);
                store_part(a->dk + at * K + n * V, sum[N + n] + decay * sum[2 * N + n], count);
                if (a->g && a->by_channel) store_part(a->dg + at * K + n * V, of_decay, count);
                of_head += of_decay;
            }
            if (a->g && !a->by_channel) a->dg[at] = sum_lanes(of_head);
        }
    }
    for (int64_t i = 0; i < K; i++)
        for (int64_t j = 0; j < D; j++) a->dinitial[(head * K + i) * D + j] = dS[j * P + i];
    free(memory);
    return 0;
}
