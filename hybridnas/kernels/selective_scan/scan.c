/* Selective scan, forward and backward, channel-last, float32. The specification is reference.py.
 *
 * Lanes are channels. A unit of work is a group of neighbouring tiles of one block of batch rows; it walks L in chunks,
 * every tile of the group inside a chunk, so that rows are read as whole cache lines. The forward keeps the state at the
 * start of every chunk; the backward computes a chunk's states again from it. Units, chunks and the order of all sums
 * follow from the shapes alone: results are the same bits for any number of threads.
 *
 * seq_idx arrives as reset (B, L) bytes; a chunk is cut into runs at resets and each run starts from zero.
 */
#include "vectors.h"

typedef struct {
    int64_t B, L, D, N, chunk, group, batch_blocks, softplus, threads;
    int64_t u_b, u_l, dt_b, dt_l, B_b, B_l, C_b, C_l, z_b, z_l, dy_b, dy_l; /* strides in floats; last dimension 1 */
    const float *u, *dt, *A, *Bm, *Cm, *D_skip, *z, *bias, *h0;
    const uint8_t *reset;
    float *y, *final, *checkpoints; /* checkpoints (B, chunks, tiles, N, 16) */
    const float *dy, *dfinal;
    float *du, *ddt, *dA, *dB, *dC, *dD, *dz, *dbias, *dh0;
} Args;

typedef struct { int64_t start, stop; int fresh; } Run;

INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
/* How many of vector w's lanes are channels; a constant where the whole tile is. */
INLINE int lanes_of(const int full, int width, int w) { return full ? V : width - w * V; }
INLINE const float *at(const float *p, int64_t offset) { return p ? p + offset : NULL; }

/* The run of a chunk that starts at `start`: up to the next reset. */
INLINE Run run_from(const uint8_t *reset, int64_t start, int64_t chunk_stop) {
    Run run = {start, chunk_stop, reset && reset[start]};
    if (reset)
        for (int64_t l = start + 1; l < chunk_stop; l++)
            if (reset[l]) { run.stop = l; break; }
    return run;
}

/* The run of a chunk that stops at `stop`. */
INLINE Run run_until(const uint8_t *reset, int64_t chunk_start, int64_t stop) {
    Run run = {chunk_start, stop, reset && reset[chunk_start]};
    if (reset)
        for (int64_t l = stop - 1; l > chunk_start; l--)
            if (reset[l]) { run.start = l; run.fresh = 1; break; }
    return run;
}

/* Per tile: A * log2(e) as (N, W) vectors, and the largest |delta| for which no exponent leaves the fast range. */
static void load_A(const Args *a, int64_t d0, int width, vf *A2, vf *limit) {
    vf largest[W];
    for (int w = 0; w < W; w++) largest[w] = splat(0.f);
    for (int64_t n = 0; n < a->N; n++)
        for (int w = 0; w < W; w++) {
            float lanes[V];
            for (int j = 0; j < V; j++) lanes[j] = w * V + j < width ? a->A[(d0 + w * V + j) * a->N + n] * LOG2E : 0.f;
            const vf x = load(lanes);
            A2[n * W + w] = x;
            largest[w] = choose(magnitude(x) > largest[w], magnitude(x), largest[w]);
        }
    for (int w = 0; w < W; w++) limit[w] = splat(125.f) / choose(largest[w] > splat(1e-30f), largest[w], splat(1e-30f));
}

static void load_state(const float *h, int64_t N, int width, vf *out) {
    for (int64_t n = 0; n < N; n++)
        for (int w = 0; w < W; w++) {
            float lanes[V];
            for (int j = 0; j < V; j++) lanes[j] = h && w * V + j < width ? h[(w * V + j) * N + n] : 0.f;
            out[n * W + w] = load(lanes);
        }
}

static void store_state(float *h, int64_t N, int width, const vf *in) {
    for (int64_t n = 0; n < N; n++)
        for (int j = 0; j < width; j++) h[j * N + n] = ((const float *)(in + n * W))[j];
}

/* ------------------------------------------------------------------------------------------------------ forward */

/* One state entry n of a tile over one run. One entry at a time keeps the state, A and the polynomial in registers. */
INLINE void state_forward(const int careful, int64_t rows, const vf *restrict dt, const vf *restrict x, const float *B,
                          int64_t B_l, const float *C, int64_t C_l, const vf *A2, vf *h_io, vf *restrict y) {
    vf h[W], decay[W];
    for (int w = 0; w < W; w++) h[w] = h_io[w], decay[w] = A2[w];
    for (int64_t l = 0; l < rows; l++) {
        const float b = B[l * B_l], c = C[l * C_l];
        for (int w = 0; w < W; w++) {
            const vf t = dt[l * W + w] * decay[w];
            const vf a = careful ? exp2_any(t) : exp2_inside(t);
            h[w] = a * h[w] + x[l * W + w] * b;
            y[l * W + w] += h[w] * c;
        }
    }
    for (int w = 0; w < W; w++) h_io[w] = h[w];
}

typedef struct { vf *dt, *x, *y; } ForwardScratch; /* (rows, W) of one tile */

/* Rows outside, vectors inside: both halves of a cache line are used while it is near. */
INLINE int forward_load(const int full, const Args *a, const ForwardScratch *s, int64_t b, int64_t d0, int width, Run run,
                        const vf *limit) {
    const int64_t rows = run.stop - run.start;
    const float *u = a->u + b * a->u_b + run.start * a->u_l + d0, *dt = a->dt + b * a->dt_b + run.start * a->dt_l + d0;
    vf bias[W], skip[W];
    vi outside = {0};
    for (int w = 0; w < W; w++) {
        bias[w] = a->bias ? load_part(a->bias + d0 + w * V, lanes_of(full, width, w)) : splat(0.f);
        skip[w] = a->D_skip ? load_part(a->D_skip + d0 + w * V, lanes_of(full, width, w)) : splat(0.f);
    }
    for (int64_t l = 0; l < rows; l++, u += a->u_l, dt += a->dt_l) {
        __builtin_prefetch(u + TILE), __builtin_prefetch(dt + TILE); /* the next tile; harmless past the end */
        for (int w = 0; w < W; w++) {
            vf slope, step = load_part(dt + w * V, lanes_of(full, width, w)) + bias[w];
            if (a->softplus) step = softplus(step, &slope);
            const vf in = load_part(u + w * V, lanes_of(full, width, w));
            outside |= ~(magnitude(step) <= limit[w]);
            s->dt[l * W + w] = step;
            s->x[l * W + w] = step * in;
            s->y[l * W + w] = skip[w] * in;
        }
    }
    return any_lane(outside);
}

INLINE void forward_store(const int full, const Args *a, const ForwardScratch *s, int64_t b, int64_t d0, int width, Run run) {
    const float *z = at(a->z, b * a->z_b + run.start * a->z_l + d0);
    float *y = a->y + (b * a->L + run.start) * a->D + d0;
    for (int64_t l = 0; l < run.stop - run.start; l++, y += a->D)
        for (int w = 0; w < W; w++) {
            vf out = s->y[l * W + w];
            if (z) {
                const vf gate = load_part(z + l * a->z_l + w * V, lanes_of(full, width, w));
                out *= gate * sigmoid(gate);
            }
            store_part(y + w * V, out, lanes_of(full, width, w));
        }
}

static void forward_tile(const Args *a, const ForwardScratch *s, int64_t b, int64_t d0, Run run, const vf *A2,
                         const vf *limit, vf *h) {
    const int width = (int)minimum(TILE, a->D - d0);
    const int64_t rows = run.stop - run.start;
    const int careful = width == TILE ? forward_load(1, a, s, b, d0, width, run, limit)
                                      : forward_load(0, a, s, b, d0, width, run, limit);
    if (run.fresh)
        for (int64_t i = 0; i < a->N * W; i++) h[i] = splat(0.f);
    const float *B = a->Bm + b * a->B_b + run.start * a->B_l, *C = a->Cm + b * a->C_b + run.start * a->C_l;
    for (int64_t n = 0; n < a->N; n++)
        if (careful) state_forward(1, rows, s->dt, s->x, B + n, a->B_l, C + n, a->C_l, A2 + n * W, h + n * W, s->y);
        else state_forward(0, rows, s->dt, s->x, B + n, a->B_l, C + n, a->C_l, A2 + n * W, h + n * W, s->y);
    if (width == TILE) forward_store(1, a, s, b, d0, width, run);
    else forward_store(0, a, s, b, d0, width, run);
}

static int forward_unit(const Args *a, int64_t b, int64_t first_tile, int64_t last_tile) {
    const int64_t tiles = blocks_of(a->D, TILE), chunks = blocks_of(a->L, a->chunk), held = a->N * W, count = last_tile - first_tile;
    const int64_t rows = a->chunk * W;
    vf *memory = allocate((4 * rows + 2 * count * held + count * W) * V);
    if (!memory) return 1;
    ForwardScratch s = {.dt = memory, .x = memory + rows, .y = memory + 2 * rows};
    vf *A2 = memory + 3 * rows, *h = A2 + count * held, *limit = h + count * held;
    for (int64_t t = 0; t < count; t++) {
        const int64_t d0 = (first_tile + t) * TILE;
        const int width = (int)minimum(TILE, a->D - d0);
        load_A(a, d0, width, A2 + t * held, limit + t * W);
        load_state(at(a->h0, (b * a->D + d0) * a->N), a->N, width, h + t * held);
    }
    const uint8_t *reset = a->reset ? a->reset + b * a->L : NULL;
    for (int64_t c = 0; c < chunks; c++) {
        if (a->checkpoints)
            memcpy(a->checkpoints + ((b * chunks + c) * tiles + first_tile) * a->N * TILE, h, (size_t)(count * held) * sizeof(vf));
        const int64_t stop = minimum(a->L, (c + 1) * a->chunk);
        for (int64_t start = c * a->chunk; start < stop;) {
            const Run run = run_from(reset, start, stop);
            for (int64_t t = 0; t < count; t++)
                forward_tile(a, &s, b, (first_tile + t) * TILE, run, A2 + t * held, limit + t * W, h + t * held);
            start = run.stop;
        }
    }
    for (int64_t t = 0; t < count; t++) {
        const int64_t d0 = (first_tile + t) * TILE;
        store_state(a->final + (b * a->D + d0) * a->N, a->N, (int)minimum(TILE, a->D - d0), h + t * held);
    }
    free(memory);
    return 0;
}

/* ----------------------------------------------------------------------------------------------------- backward */

typedef struct {
    vf *dt, *x, *u, *g, *slope, *gate, *y, *ddt, *dx; /* (rows, W) of one tile */
    vf *a, *m;                                        /* (rows, W) of one entry: decay, decay times the state before */
    vf *pB, *pC;                                      /* (N, rows) of a group: lanes still to be summed */
    vf *dA, *dh, *A2, *limit, *dD, *dbias;            /* per tile of the group */
} BackwardScratch;

/* One state entry of a tile over one run: its states again, then gradients from the last row to the first.
 * With m = a h_before: dL/d(delta A) = e m, and e a is what the row before receives. */
INLINE void state_backward(const int careful, int64_t rows, const BackwardScratch *s, const float *B, int64_t B_l,
                           const float *C, int64_t C_l, const vf *A2, const vf *h0, vf *restrict pB, vf *restrict pC,
                           vf *dA_io, vf *dh_io) {
    const vf *restrict dt = s->dt, *restrict x = s->x, *restrict g = s->g;
    vf *restrict decays = s->a, *restrict kept = s->m, *restrict y = s->y, *restrict dx = s->dx, *restrict ddt = s->ddt;
    vf h[W], dh[W], dA[W], decay[W];
    for (int w = 0; w < W; w++) h[w] = h0 ? h0[w] : splat(0.f), decay[w] = A2[w];
    for (int64_t l = 0; l < rows; l++) {
        const float b = B[l * B_l], c = C[l * C_l];
        vf from_C = pC[l];
        for (int w = 0; w < W; w++) {
            const int64_t i = l * W + w;
            const vf t = dt[i] * decay[w];
            const vf a = careful ? exp2_any(t) : exp2_inside(t);
            const vf m = a * h[w];
            decays[i] = a, kept[i] = m;
            h[w] = x[i] * b + m;
            y[i] += h[w] * c;
            from_C += g[i] * h[w];
        }
        pC[l] = from_C;
    }
    for (int w = 0; w < W; w++) dh[w] = dh_io[w], dA[w] = dA_io[w];
    for (int64_t l = rows - 1; l >= 0; l--) {
        const float b = B[l * B_l], c = C[l * C_l];
        vf from_B = pB[l];
        for (int w = 0; w < W; w++) {
            const int64_t i = l * W + w;
            const vf e = g[i] * c + dh[w], k = e * kept[i];
            from_B += e * x[i];
            dh[w] = e * decays[i];
            dA[w] += k * dt[i];
            dx[i] += e * b;
            ddt[i] += k * decay[w];
        }
        pB[l] = from_B;
    }
    for (int w = 0; w < W; w++) dh_io[w] = dh[w], dA_io[w] = dA[w];
}

INLINE int backward_load(const int full, const Args *a, const BackwardScratch *s, int64_t b, int64_t d0, int width,
                         Run run, const vf *limit) {
    const float *u = a->u + b * a->u_b + run.start * a->u_l + d0, *dt = a->dt + b * a->dt_b + run.start * a->dt_l + d0;
    const float *dy = a->dy + b * a->dy_b + run.start * a->dy_l + d0, *z = at(a->z, b * a->z_b + run.start * a->z_l + d0);
    vf bias[W], skip[W];
    vi outside = {0};
    for (int w = 0; w < W; w++) {
        bias[w] = a->bias ? load_part(a->bias + d0 + w * V, lanes_of(full, width, w)) : splat(0.f);
        skip[w] = a->D_skip ? load_part(a->D_skip + d0 + w * V, lanes_of(full, width, w)) : splat(0.f);
    }
    for (int64_t l = 0; l < run.stop - run.start; l++, u += a->u_l, dt += a->dt_l, dy += a->dy_l) {
        __builtin_prefetch(u + TILE), __builtin_prefetch(dt + TILE), __builtin_prefetch(dy + TILE);
        for (int w = 0; w < W; w++) {
            const int64_t i = l * W + w;
            vf slope = splat(1.f), step = load_part(dt + w * V, lanes_of(full, width, w)) + bias[w];
            if (a->softplus) step = softplus(step, &slope);
            const vf in = load_part(u + w * V, lanes_of(full, width, w));
            vf g = load_part(dy + w * V, lanes_of(full, width, w));
            if (z) {
                const vf gate = load_part(z + l * a->z_l + w * V, lanes_of(full, width, w));
                const vf open = sigmoid(gate), silu = gate * open;
                s->gate[i] = g * (open + silu * (1.f - open));
                g *= silu;
            }
            outside |= ~(magnitude(step) <= limit[w]);
            s->dt[i] = step, s->slope[i] = slope, s->u[i] = in, s->x[i] = step * in, s->g[i] = g;
            s->y[i] = skip[w] * in, s->dx[i] = splat(0.f), s->ddt[i] = splat(0.f);
        }
    }
    return any_lane(outside);
}

INLINE void backward_store(const int full, const Args *a, const BackwardScratch *s, int64_t b, int64_t d0, int width,
                           Run run, vf *dD, vf *dbias) {
    int64_t o = (b * a->L + run.start) * a->D + d0;
    vf skip[W], to_D[W], to_bias[W];
    for (int w = 0; w < W; w++) {
        skip[w] = a->D_skip ? load_part(a->D_skip + d0 + w * V, lanes_of(full, width, w)) : splat(0.f);
        to_D[w] = dD[w], to_bias[w] = dbias[w];
    }
    for (int64_t l = 0; l < run.stop - run.start; l++, o += a->D)
        for (int w = 0; w < W; w++) {
            const int64_t i = l * W + w;
            const vf ddt = (s->ddt[i] * (1.f / LOG2E) + s->dx[i] * s->u[i]) * s->slope[i];
            to_D[w] += s->g[i] * s->u[i];
            to_bias[w] += ddt;
            store_part(a->du + o + w * V, s->dx[i] * s->dt[i] + s->g[i] * skip[w], lanes_of(full, width, w));
            store_part(a->ddt + o + w * V, ddt, lanes_of(full, width, w));
            if (a->z) store_part(a->dz + o + w * V, s->gate[i] * s->y[i], lanes_of(full, width, w));
        }
    for (int w = 0; w < W; w++) dD[w] = to_D[w], dbias[w] = to_bias[w];
}

static void backward_tile(const Args *a, BackwardScratch *s, int64_t b, int64_t chunk, int64_t tile, int64_t local,
                          Run run) {
    const int64_t tiles = blocks_of(a->D, TILE), chunks = blocks_of(a->L, a->chunk), rows = run.stop - run.start;
    const int64_t held = a->N * W, skipped = run.start - chunk * a->chunk;
    const vf *A2 = s->A2 + local * held;
    const vf *h0 = run.fresh ? NULL : (const vf *)(a->checkpoints + ((b * chunks + chunk) * tiles + tile) * a->N * TILE);
    const int width = (int)minimum(TILE, a->D - tile * TILE), full = width == TILE;
    const int careful = full ? backward_load(1, a, s, b, tile * TILE, width, run, s->limit + local * W)
                             : backward_load(0, a, s, b, tile * TILE, width, run, s->limit + local * W);
    const float *B = a->Bm + b * a->B_b + run.start * a->B_l, *C = a->Cm + b * a->C_b + run.start * a->C_l;
    vf *dA = s->dA + local * held, *dh = s->dh + local * held;
    for (int64_t n = 0; n < a->N; n++) {
        vf *pB = s->pB + n * a->chunk + skipped, *pC = s->pC + n * a->chunk + skipped;
        const vf *h = h0 ? h0 + n * W : NULL;
        if (careful) state_backward(1, rows, s, B + n, a->B_l, C + n, a->C_l, A2 + n * W, h, pB, pC, dA + n * W, dh + n * W);
        else state_backward(0, rows, s, B + n, a->B_l, C + n, a->C_l, A2 + n * W, h, pB, pC, dA + n * W, dh + n * W);
    }
    if (full) backward_store(1, a, s, b, tile * TILE, width, run, s->dD + local * W, s->dbias + local * W);
    else backward_store(0, a, s, b, tile * TILE, width, run, s->dD + local * W, s->dbias + local * W);
    if (run.fresh)
        for (int64_t i = 0; i < held; i++) dh[i] = splat(0.f);
}

/* Sum the lanes that a chunk has gathered into the group's partial dB, dC. */
static void flush_BC(const Args *a, const BackwardScratch *s, int64_t rows, float *dB, float *dC) {
    for (int64_t l = 0; l < rows; l++)
        for (int64_t n = 0; n < a->N; n++) {
            dB[l * a->N + n] = sum_lanes(s->pB[n * a->chunk + l]);
            dC[l * a->N + n] = sum_lanes(s->pC[n * a->chunk + l]);
        }
}

static int backward_unit(const Args *a, int64_t batch_block, int64_t group, float *part_B, float *part_C, float *part_A,
                         float *part_D) {
    const int64_t tiles = blocks_of(a->D, TILE), first = group * a->group, last = minimum(tiles, first + a->group);
    const int64_t count = last - first, chunks = blocks_of(a->L, a->chunk), held = a->N * W, rows = a->chunk * W;
    const int64_t vectors = 11 * rows + 2 * a->N * a->chunk + 3 * count * held + 3 * count * W;
    vf *memory = allocate(vectors * V), *p = memory;
    if (!memory) return 1;
    BackwardScratch s;
    vf **rowwise[] = {&s.dt, &s.x, &s.u, &s.g, &s.slope, &s.gate, &s.y, &s.ddt, &s.dx};
    for (int i = 0; i < 9; i++) *rowwise[i] = p, p += rows;
    s.a = p, p += rows, s.m = p, p += rows;
    s.pB = p, p += a->N * a->chunk, s.pC = p, p += a->N * a->chunk;
    s.dA = p, p += count * held, s.dh = p, p += count * held, s.A2 = p, p += count * held;
    s.limit = p, p += count * W, s.dD = p, p += count * W, s.dbias = p, p += count * W;
    memset(s.dA, 0, (size_t)(count * held) * sizeof(vf));
    memset(s.dD, 0, (size_t)(2 * count * W) * sizeof(vf));
    for (int64_t t = 0; t < count; t++)
        load_A(a, (first + t) * TILE, (int)minimum(TILE, a->D - (first + t) * TILE), s.A2 + t * held, s.limit + t * W);
    const int64_t b0 = batch_block * a->B / a->batch_blocks, b1 = (batch_block + 1) * a->B / a->batch_blocks;
    for (int64_t b = b0; b < b1; b++) {
        const uint8_t *reset = a->reset ? a->reset + b * a->L : NULL;
        for (int64_t t = 0; t < count; t++) {
            const int64_t d0 = (first + t) * TILE;
            load_state(at(a->dfinal, (b * a->D + d0) * a->N), a->N, (int)minimum(TILE, a->D - d0), s.dh + t * held);
        }
        for (int64_t c = chunks - 1; c >= 0; c--) {
            const int64_t start = c * a->chunk, stop = minimum(a->L, start + a->chunk);
            memset(s.pB, 0, (size_t)(2 * a->N * a->chunk) * sizeof(vf));
            for (int64_t end = stop; end > start;) {
                const Run run = run_until(reset, start, end);
                for (int64_t t = 0; t < count; t++) backward_tile(a, &s, b, c, first + t, t, run);
                end = run.start;
            }
            const int64_t offset = (b * a->L + start) * a->N;
            flush_BC(a, &s, stop - start, part_B + offset, part_C + offset);
        }
        for (int64_t t = 0; t < count; t++) {
            const int64_t d0 = (first + t) * TILE;
            store_state(a->dh0 + (b * a->D + d0) * a->N, a->N, (int)minimum(TILE, a->D - d0), s.dh + t * held);
        }
    }
    for (int64_t t = 0; t < count; t++) {
        const int64_t d0 = (first + t) * TILE;
        const int width = (int)minimum(TILE, a->D - d0);
        store_state(part_A + d0 * a->N, a->N, width, s.dA + t * held);
        memcpy(part_D + d0, s.dD + t * W, (size_t)width * 4);
        memcpy(part_D + a->D + d0, s.dbias + t * W, (size_t)width * 4);
    }
    free(memory);
    return 0;
}

/* out[i] = sum over parts, in order. */
static void add_parts(float *out, const float *parts, int64_t count, int64_t size, int threads) {
    const int64_t piece = 4096;
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t start = 0; start < size; start += piece) {
        const int64_t stop = minimum(size, start + piece);
        for (int64_t i = start; i < stop; i++) out[i] = parts[i];
        for (int64_t p = 1; p < count; p++)
            for (int64_t i = start; i < stop; i++) out[i] += parts[p * size + i];
    }
}

/* --------------------------------------------------------------------------------------------------- entry points */

/* Both return 0, or 1 when memory ran out. */
int hybridnas_scan_forward(const Args *a) {
    const int threads = (int)a->threads;
    const int64_t tiles = blocks_of(a->D, TILE);
    int64_t group = a->group; /* nothing is summed over channels here: the split may follow the threads */
    while (group > 1 && a->B * blocks_of(tiles, group) < 4 * threads) group = (group + 1) / 2;
    const int64_t groups = blocks_of(tiles, group);
    int failed = 0;
    (void)threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1) reduction(| : failed)
    for (int64_t unit = 0; unit < a->B * groups; unit++) {
        const int64_t first = unit % groups * group;
        failed |= forward_unit(a, unit / groups, first, minimum(tiles, first + group));
    }
    return failed;
}

int hybridnas_scan_backward(const Args *a) {
    const int threads = (int)a->threads;
    const int64_t groups = blocks_of(blocks_of(a->D, TILE), a->group), units = a->batch_blocks * groups;
    const int64_t narrow = a->B * a->L * a->N, decay = a->D * a->N;
    float *parts_B = groups > 1 ? allocate(groups * narrow) : a->dB, *parts_C = groups > 1 ? allocate(groups * narrow) : a->dC;
    float *parts_A = allocate(a->batch_blocks * decay), *parts_D = allocate(a->batch_blocks * 2 * a->D);
    float *sums = allocate(2 * a->D);
    int failed = !parts_B || !parts_C || !parts_A || !parts_D || !sums;
    if (!failed) {
        int short_of_memory = 0;
        (void)threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1) reduction(| : short_of_memory)
        for (int64_t unit = 0; unit < units; unit++) {
            const int64_t block = unit / groups, group = unit % groups;
            short_of_memory |= backward_unit(a, block, group, parts_B + group * narrow, parts_C + group * narrow,
                                             parts_A + block * decay, parts_D + block * 2 * a->D);
        }
        failed = short_of_memory;
        if (groups > 1) {
            add_parts(a->dB, parts_B, groups, narrow, threads);
            add_parts(a->dC, parts_C, groups, narrow, threads);
        }
        add_parts(a->dA, parts_A, a->batch_blocks, decay, 1);
        add_parts(sums, parts_D, a->batch_blocks, 2 * a->D, 1);
        memcpy(a->dD, sums, (size_t)a->D * 4);
        memcpy(a->dbias, sums + a->D, (size_t)a->D * 4);
    }
    if (groups > 1) free(parts_B), free(parts_C);
    free(parts_A), free(parts_D), free(sums);
    return failed;
}
