/* The backward of the recurrence, a few value channels at a time; a part of recurrence.c, to be read after it.
 *
 * With A = diag(decay), S the state before a step and S' after it, u = S^T a what was read:
 *     dS' += q do^T          dq = S' do           dv = dS'^T k        dk = dS' v         du = dS'^T b        db = dS' u
 *     dS = A dS' + a du^T    da = S du            d(log decay) = A times rows of S * dS'
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
typedef struct { float *value, *read, *dout, *dvalue; } Values;

#define BACKWARD_SIZES(CASE) CASE(16, 8) CASE(32, 8) CASE(48, 4) CASE(64, 4) CASE(96, 4) CASE(128, 4) CASE(256, 4)
#define BACKWARD_ROWS 8    /* the largest R */
INLINE int64_t rows_for(int64_t P) { return P <= 32 ? 8 : 4; }
#define MOST (256 * 4 / V) /* vectors of the largest tile */

/* A chunk of R value channels: dS (R, P) is the state's gradient after the chunk and becomes that before it. */
INLINE void backward_tile(const int N, const int R, int64_t steps, int64_t across, const Steps *s, const Values *values,
                          vf *restrict states, vf *restrict sums, float *dS) {
    const int64_t P = N * V;
    vf d[MOST], state[MOST];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) state[r * N + n] = states[r * N + n];
    for (int64_t t = 0; t < steps; t++) {
        const float *k = s->k + t * P, *decay = s->decay + t * P, *along = s->b + t * P;
        const float *value = values->value + t * across, *read = values->read + t * across;
        vf *after = states + (t + 1) * R * N;
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) {
            const vf decay_n = load(decay + n * V), k_n = load(k + n * V), b_n = load(along + n * V);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++)
                after[r * N + n] = state[r * N + n] = state[r * N + n] * decay_n + (k_n * value[r] + b_n * read[r]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) d[r * N + n] = load(dS + r * P + n * V);
    for (int64_t t = steps - 1; t >= 0; t--) {
        const float *q = s->q + t * P, *k = s->k + t * P, *decay = s->decay + t * P, *a = s->a + t * P, *along = s->b + t * P;
        const float *value = values->value + t * across, *read = values->read + t * across;
        const float *dout = values->dout + t * across;
        const vf *before = states + t * R * N, *after = before + R * N;
        vf *sum = sums + t * PARTS * N, of_keys[BACKWARD_ROWS], of_b[BACKWARD_ROWS];
        float dread[BACKWARD_ROWS];
        for (int r = 0; r < R; r++) of_keys[r] = of_b[r] = splat(0.f);
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) {
            const vf q_n = load(q + n * V), k_n = load(k + n * V), b_n = load(along + n * V);
            vf dq = sum[n], dk = sum[N + n], db = sum[2 * N + n];
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                d[r * N + n] += q_n * dout[r];
                of_keys[r] += d[r * N + n] * k_n;
                of_b[r] += d[r * N + n] * b_n;
                dq += after[r * N + n] * dout[r];
                dk += d[r * N + n] * value[r];
                db += d[r * N + n] * read[r];
            }
            sum[n] = dq, sum[N + n] = dk, sum[2 * N + n] = db;
        }
        sum_rows(R, of_keys, values->dvalue + t * across);
        sum_rows(R, of_b, dread);
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) {
            const vf a_n = load(a + n * V), decay_n = load(decay + n * V);
            vf da = sum[3 * N + n], of_decay = sum[4 * N + n];
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                const vf was = before[r * N + n];
                da += was * dread[r];
                of_decay += was * d[r * N + n];
                d[r * N + n] = d[r * N + n] * decay_n + a_n * dread[r];
            }
            sum[3 * N + n] = da, sum[4 * N + n] = of_decay;
        }
    }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) store(dS + r * P + n * V, d[r * N + n]);
}

/* One function a size, so that the compiler optimizes each by itself. */
#define BACKWARD_TILE(P, R)                                                                                             \
    static void backward_##P(int64_t steps, int64_t across, const Steps *s, const Values *values, vf *states, vf *sums,  \
                             float *dS) {                                                                              \
        backward_tile(P / V, R, steps, across, s, values, states, sums, dS);                                            \
    }
BACKWARD_SIZES(BACKWARD_TILE)

/* (K, D) values of a head as (D, P), a row for each value channel; NULL is zeros. */
static void transposed(const float *from, int64_t K, int64_t D, int64_t rows, int64_t P, float *to) {
    memset(to, 0, (size_t)(rows * P) * 4);
    if (!from) return;
    for (int64_t i = 0; i < K; i++)
        for (int64_t j = 0; j < D; j++) to[j * P + i] = from[i * D + j];
}

static int backward_unit(const Args *x, int64_t head) {
    const int64_t b = head / x->H, h = head % x->H;
    const int64_t K = x->K, D = x->D, P = lanes_for(K), chunks = (x->L + x->chunk - 1) / x->chunk;
    const int64_t across = round_up(D, BACKWARD_ROWS), part = x->chunk * P, wide = x->chunk * across;
    const int64_t N = P / V, rows = rows_for(P), tile = rows * P;
    float *memory = allocate(2 * PARTS * part + (x->chunk + 1) * tile + 2 * across * P + 4 * wide);
    if (!memory) return 1;
    const Steps s = steps_in(memory, part);
    float *states = memory + PARTS * part, *sums = states + (x->chunk + 1) * tile, *dS = sums + PARTS * part;
    float *starts = dS + across * P, *values_at = starts + across * P;
    const Values values = {values_at, values_at + wide, values_at + 2 * wide, values_at + 3 * wide};
    memset(values_at, 0, (size_t)(3 * wide) * 4);
    transposed(x->dfinal ? x->dfinal + head * K * D : NULL, K, D, across, P, dS);
    for (int64_t c = chunks - 1; c >= 0; c--) {
        const int64_t start = c * x->chunk, steps = minimum(x->chunk, x->L - start), row = (b * x->L + start) * x->H + h;
        prepare(x, b, h, start, steps, P, &s);
        transposed(x->checkpoints + (head * chunks + c) * K * D, K, D, across, P, starts);
        memset(sums, 0, (size_t)(steps * PARTS * P) * 4);
        for (int64_t t = 0; t < steps; t++) {
            const int64_t at = row + t * x->H;
            memcpy(values.value + t * across, x->v + b * x->v_b + (start + t) * x->v_l + h * x->v_h, (size_t)D * 4);
            memcpy(values.read + t * across, x->read + at * D, (size_t)D * 4);
            memcpy(values.dout + t * across, x->dout + b * x->do_b + (start + t) * x->do_l + h * x->do_h, (size_t)D * 4);
        }
        for (int64_t d0 = 0; d0 < D; d0 += rows) {
            const Values mine = {values.value + d0, values.read + d0, values.dout + d0, values.dvalue + d0};
            memcpy(states, starts + d0 * P, (size_t)tile * 4);
            switch (P) {
#define BACKWARD_CALL(P, R)                                                                                             \
    case P: backward_##P(steps, across, &s, &mine, (vf *)states, (vf *)sums, dS + d0 * P); break;
                BACKWARD_SIZES(BACKWARD_CALL)
            }
        }
        for (int64_t t = 0; t < steps; t++) {
            const int64_t at = row + t * x->H;
            const int fresh = x->reset && x->reset[b * x->L + start + t];
            const vf *sum = (vf *)sums + t * PARTS * N;
            memcpy(x->dv + at * D, values.dvalue + t * across, (size_t)D * 4);
            for (int64_t n = 0; n < N; n++) {
                const int count = (int)(K - n * V);
                store_part(x->dq + at * K + n * V, sum[n], count);
                store_part(x->dk + at * K + n * V, sum[N + n], count);
                store_part(x->db + at * K + n * V, sum[2 * N + n], count);
                store_part(x->da + at * K + n * V, fresh ? splat(0.f) : sum[3 * N + n], count);
                store_part(x->dg + at * K + n * V, load(s.decay + t * P + n * V) * sum[4 * N + n], count);
            }
        }
    }
    for (int64_t i = 0; i < K; i++)
        for (int64_t j = 0; j < D; j++) x->dinitial[(head * K + i) * D + j] = dS[j * P + i];
    free(memory);
    return 0;
}
