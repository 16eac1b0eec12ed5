/* The backward of the selective scan, one tile over one run at a time; a part of scan.c, to be read after it. */

typedef struct {
    vf *dt, *x, *u, *g, *slope, *gate, *y, *ddt, *dx; /* (rows, W) of one tile */
    vf *a, *h;                                        /* (rows, W, entries together): decay, the state before */
    vf *pB, *pC;                                      /* (N, rows) of a group: lanes still to be summed */
    vf *dA, *dh, *A2, *limit, *dD, *dbias;            /* per tile of the group */
} BackwardScratch;

/* `count` state entries of a tile over one run, as in the forward: their states again, then gradients from the last row
 * to the first. e is the gradient of a row's state, e a what the row before receives, e a h_before that of delta A. */
INLINE void state_backward(const int careful, const int count, int64_t rows, int64_t chunk, const BackwardScratch *s,
                           const float *B, int64_t B_l, const float *C, int64_t C_l, const vf *A2, const vf *h0,
                           vf *restrict pB, vf *restrict pC, vf *dA_io, vf *dh_io) {
    const vf *restrict dt = s->dt, *restrict x = s->x, *restrict g = s->g;
    vf *restrict decays = s->a, *restrict kept = s->h, *restrict y = s->y, *restrict dx = s->dx, *restrict ddt = s->ddt;
    vf h[TOGETHER][W], dh[TOGETHER][W], dA[TOGETHER][W], decay[TOGETHER][W];
    for (int k = 0; k < count; k++)
        for (int w = 0; w < W; w++) h[k][w] = h0 ? h0[k * W + w] : splat(0.f), decay[k][w] = A2[k * W + w];
    for (int64_t l = 0; l < rows; l++) {
        vf from_C[TOGETHER];
        for (int k = 0; k < count; k++) from_C[k] = pC[k * chunk + l];
        for (int w = 0; w < W; w++) {
            const int64_t i = l * W + w;
            const vf step = dt[i], in = x[i], up = g[i];
            vf out = y[i];
            for (int k = 0; k < count; k++) {
                const vf t = step * decay[k][w];
                const vf a = careful ? exp2_any(t) : exp2_inside(t);
                decays[i * count + k] = a, kept[i * count + k] = h[k][w];
                h[k][w] = a * h[k][w] + in * B[l * B_l + k];
                out += h[k][w] * C[l * C_l + k];
                from_C[k] += up * h[k][w];
            }
            y[i] = out;
        }
        for (int k = 0; k < count; k++) pC[k * chunk + l] = from_C[k];
    }
    for (int k = 0; k < count; k++)
        for (int w = 0; w < W; w++) dh[k][w] = dh_io[k * W + w], dA[k][w] = dA_io[k * W + w];
    for (int64_t l = rows - 1; l >= 0; l--) {
        vf from_B[TOGETHER];
        for (int k = 0; k < count; k++) from_B[k] = pB[k * chunk + l];
        for (int w = 0; w < W; w++) {
            const int64_t i = l * W + w;
            const vf step = dt[i], in = x[i], up = g[i];
            vf to_x = dx[i], to_dt = ddt[i];
            for (int k = 0; k < count; k++) {
                const vf e = up * C[l * C_l + k] + dh[k][w];
                from_B[k] += e * in;
                dh[k][w] = e * decays[i * count + k];
                const vf through = dh[k][w] * kept[i * count + k];
                dA[k][w] += through * step;
                to_x += e * B[l * B_l + k];
                to_dt += through * decay[k][w];
            }
            dx[i] = to_x, ddt[i] = to_dt;
        }
        for (int k = 0; k < count; k++) pB[k * chunk + l] = from_B[k];
    }
    for (int k = 0; k < count; k++)
        for (int w = 0; w < W; w++) dh_io[k * W + w] = dh[k][w], dA_io[k * W + w] = dA[k][w];
}

INLINE void backward_gather(const int full, const Args *a, const BackwardScratch *s, int64_t b, int64_t d0, int width,
                            Run run) {
    const float *u = a->u + b * a->u_b + run.start * a->u_l + d0, *dt = a->dt + b * a->dt_b + run.start * a->dt_l + d0;
    const float *dy = a->dy + b * a->dy_b + run.start * a->dy_l + d0, *z = at(a->z, b * a->z_b + run.start * a->z_l + d0);
    vf bias[W], skip[W];
    for (int w = 0; w < W; w++) {
        bias[w] = a->bias ? load_part(a->bias + d0 + w * V, lanes_of(full, width, w)) : splat(0.f);
        skip[w] = a->D_skip ? load_part(a->D_skip + d0 + w * V, lanes_of(full, width, w)) : splat(0.f);
    }
    for (int64_t l = 0; l < run.stop - run.start; l++, u += a->u_l, dt += a->dt_l, dy += a->dy_l)
        for (int w = 0; w < W; w++) {
            const int64_t i = l * W + w;
            const vf in = load_part(u + w * V, lanes_of(full, width, w));
            s->dt[i] = load_part(dt + w * V, lanes_of(full, width, w)) + bias[w];
            s->g[i] = load_part(dy + w * V, lanes_of(full, width, w));
            if (z) s->gate[i] = load_part(z + l * a->z_l + w * V, lanes_of(full, width, w));
            s->u[i] = s->x[i] = in, s->y[i] = skip[w] * in;
            s->dx[i] = s->ddt[i] = splat(0.f);
        }
}

/* g becomes the gradient before the gate, gate what y before the gate is multiplied by to give dz. */
INLINE void open_gates(int64_t count, vf *restrict g, vf *restrict gate) {
    for (int64_t i = 0; i < count; i++) {
        const vf z = gate[i], dy = g[i], open = sigmoid(z), silu = z * open;
        gate[i] = dy * (open + silu * (1.f - open));
        g[i] = dy * silu;
    }
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
                          Run run, Ahead next) {
    const int64_t tiles = blocks_of(a->D, TILE), chunks = blocks_of(a->L, a->chunk), rows = run.stop - run.start;
    const int64_t held = a->N * W, skipped = run.start - chunk * a->chunk;
    const vf *A2 = s->A2 + local * held;
    const vf *h0 = run.fresh ? NULL : (const vf *)(a->checkpoints + ((b * chunks + chunk) * tiles + tile) * a->N * TILE);
    const int width = (int)minimum(TILE, a->D - tile * TILE), full = width == TILE;
    const int64_t d0 = tile * TILE, o = (b * a->L + run.start) * a->D + d0;
    if (full) backward_gather(1, a, s, b, d0, width, run);
    else backward_gather(0, a, s, b, d0, width, run);
    const int careful = steps(1, a, rows, s->dt, s->x, s->slope, s->limit + local * W);
    if (a->z) open_gates(rows * W, s->g, s->gate);
    const float *B = a->Bm + b * a->B_b + run.start * a->B_l, *C = a->Cm + b * a->C_b + run.start * a->C_l;
    vf *dA = s->dA + local * held, *dh = s->dh + local * held;
    const Column reads[] = {{a->u + b * a->u_b + next.row * a->u_l + next.d0, a->u_l},
                            {a->dt + b * a->dt_b + next.row * a->dt_l + next.d0, a->dt_l},
                            {a->dy + b * a->dy_b + next.row * a->dy_l + next.d0, a->dy_l},
                            {at(a->z, b * a->z_b + next.row * a->z_l + next.d0), a->z_l}};
    const Column writes[] = {{a->du + o, a->D}, {a->ddt + o, a->D}, {at(a->dz, o), a->D}};
    for (int64_t n = 0, count; n < a->N; n += count) {
        count = together(n, a->N);
        for (int64_t k = n; k < n + count; k++)
            fetch(0, reads, a->z ? 4 : 3, rows, k, a->N), fetch(1, writes, a->z ? 3 : 2, rows, k, a->N);
        vf *pB = s->pB + n * a->chunk + skipped, *pC = s->pC + n * a->chunk + skipped;
        const vf *h = h0 ? h0 + n * W : NULL;
#define STATES(careful, count) \
    state_backward(careful, count, rows, a->chunk, s, B + n, a->B_l, C + n, a->C_l, A2 + n * W, h, pB, pC, dA + n * W, dh + n * W)
        if (careful) {
            if (count == TOGETHER) STATES(1, TOGETHER);
            else STATES(1, 1);
        } else {
            if (count == TOGETHER) STATES(0, TOGETHER);
            else STATES(0, 1);
        }
#undef STATES
    }
    if (full) backward_store(1, a, s, b, d0, width, run, s->dD + local * W, s->dbias + local * W);
    else backward_store(0, a, s, b, d0, width, run, s->dD + local * W, s->dbias + local * W);
    if (run.fresh)
        for (int64_t i = 0; i < held; i++) dh[i] = splat(0.f);
}

/* Sum the lanes that a chunk has gathered into the group's partial dB, dC. */
static void flush(const Args *a, const vf *gathered, int64_t rows, float *out) {
    for (int64_t n = 0; n + 8 <= a->N; n += 8)
        for (int64_t l = 0; l < rows; l++) sum_lanes_8(gathered + n * a->chunk + l, a->chunk, out + l * a->N + n);
    for (int64_t n = a->N / 8 * 8; n < a->N; n++)
        for (int64_t l = 0; l < rows; l++) out[l * a->N + n] = sum_lanes(gathered[n * a->chunk + l]);
}

static int backward_unit(const Args *a, int64_t batch_block, int64_t group, float *part_B, float *part_C, float *part_A,
                         float *part_D) {
    const int64_t tiles = blocks_of(a->D, TILE), first = group * a->group, last = minimum(tiles, first + a->group);
    const int64_t count = last - first, chunks = blocks_of(a->L, a->chunk), held = a->N * W, rows = a->chunk * W;
    const int64_t vectors = (9 + 2 * TOGETHER) * rows + 2 * a->N * a->chunk + 3 * count * held + 3 * count * W;
    vf *memory = allocate(vectors * V), *p = memory;
    if (!memory) return 1;
    BackwardScratch s;
    vf **rowwise[] = {&s.dt, &s.x, &s.u, &s.g, &s.slope, &s.gate, &s.y, &s.ddt, &s.dx};
    for (int i = 0; i < 9; i++) *rowwise[i] = p, p += rows;
    s.a = p, p += TOGETHER * rows, s.h = p, p += TOGETHER * rows;
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
                for (int64_t t = 0; t < count; t++) {
                    const int leave = t + 1 == count;
                    const Ahead next = {leave ? run.start - a->chunk : run.start, (first + (leave ? 0 : t + 1)) * TILE};
                    backward_tile(a, &s, b, c, first + t, t, run, next);
                }
                end = run.start;
            }
            const int64_t offset = (b * a->L + start) * a->N;
            flush(a, s.pB, stop - start, part_B + offset);
            flush(a, s.pC, stop - start, part_C + offset);
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
