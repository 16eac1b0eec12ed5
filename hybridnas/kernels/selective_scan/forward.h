/* The forward of the selective scan, one tile over one run at a time; a part of scan.c, to be read after it. */

/* `count` state entries of a tile over one run, side by side: rows are read and written once for all of them, and their
 * chains of dependent operations overlap. Few at a time keep states, A and the polynomial in registers. Every sum over
 * entries is taken one by one in their order, so that the bits do not depend on how many go together. */
INLINE void state_forward(const int careful, const int count, int64_t rows, const vf *restrict dt, const vf *restrict x,
                          const float *B, int64_t B_l, const float *C, int64_t C_l, const vf *A2, vf *h_io,
                          vf *restrict y) {
    vf h[TOGETHER][W], decay[TOGETHER][W];
    for (int k = 0; k < count; k++)
        for (int w = 0; w < W; w++) h[k][w] = h_io[k * W + w], decay[k][w] = A2[k * W + w];
    for (int64_t l = 0; l < rows; l++)
        for (int w = 0; w < W; w++) {
            const vf step = dt[l * W + w], in = x[l * W + w];
            vf out = y[l * W + w];
            for (int k = 0; k < count; k++) {
                const vf t = step * decay[k][w];
                const vf a = careful ? exp2_any(t) : exp2_inside(t);
                h[k][w] = a * h[k][w] + in * B[l * B_l + k];
                out += h[k][w] * C[l * C_l + k];
            }
            y[l * W + w] = out;
        }
    for (int k = 0; k < count; k++)
        for (int w = 0; w < W; w++) h_io[k * W + w] = h[k][w];
}

typedef struct { vf *dt, *x, *y, *e; } ForwardScratch; /* (rows, W) of one tile */

/* Rows outside, vectors inside: both halves of a cache line are used while it is near. */
INLINE void forward_gather(const int full, const Args *a, const ForwardScratch *s, int64_t b, int64_t d0, int width, Run run) {
    const float *u = a->u + b * a->u_b + run.start * a->u_l + d0, *dt = a->dt + b * a->dt_b + run.start * a->dt_l + d0;
    vf bias[W], skip[W];
    for (int w = 0; w < W; w++) {
        bias[w] = a->bias ? load_part(a->bias + d0 + w * V, lanes_of(full, width, w)) : splat(0.f);
        skip[w] = a->D_skip ? load_part(a->D_skip + d0 + w * V, lanes_of(full, width, w)) : splat(0.f);
    }
    for (int64_t l = 0; l < run.stop - run.start; l++, u += a->u_l, dt += a->dt_l)
        for (int w = 0; w < W; w++) {
            const vf in = load_part(u + w * V, lanes_of(full, width, w));
            s->dt[l * W + w] = load_part(dt + w * V, lanes_of(full, width, w)) + bias[w];
            s->x[l * W + w] = in;
            s->y[l * W + w] = skip[w] * in;
        }
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
                         const vf *limit, vf *h, Ahead next) {
    const int width = (int)minimum(TILE, a->D - d0);
    const int64_t rows = run.stop - run.start;
    if (width == TILE) forward_gather(1, a, s, b, d0, width, run);
    else forward_gather(0, a, s, b, d0, width, run);
    const int careful = steps(0, a, rows, s->dt, s->x, s->e, limit);
    if (run.fresh)
        for (int64_t i = 0; i < a->N * W; i++) h[i] = splat(0.f);
    const float *B = a->Bm + b * a->B_b + run.start * a->B_l, *C = a->Cm + b * a->C_b + run.start * a->C_l;
    const Column reads[] = {{a->u + b * a->u_b + next.row * a->u_l + next.d0, a->u_l},
                            {a->dt + b * a->dt_b + next.row * a->dt_l + next.d0, a->dt_l},
                            {at(a->z, b * a->z_b + run.start * a->z_l + d0), a->z_l}};
    const Column writes[] = {{a->y + (b * a->L + run.start) * a->D + d0, a->D}};
    for (int64_t n = 0, count; n < a->N; n += count) {
        count = together(n, a->N);
        for (int64_t k = n; k < n + count; k++) fetch(0, reads, a->z ? 3 : 2, rows, k, a->N), fetch(1, writes, 1, rows, k, a->N);
#define STATES(careful, count) state_forward(careful, count, rows, s->dt, s->x, B + n, a->B_l, C + n, a->C_l, A2 + n * W, h + n * W, s->y)
        if (careful) {
            if (count == TOGETHER) STATES(1, TOGETHER);
            else STATES(1, 1);
        } else {
            if (count == TOGETHER) STATES(0, TOGETHER);
            else STATES(0, 1);
        }
#undef STATES
    }
    if (width == TILE) forward_store(1, a, s, b, d0, width, run);
    else forward_store(0, a, s, b, d0, width, run);
}

static int forward_unit(const Args *a, int64_t b, int64_t first_tile, int64_t last_tile) {
    const int64_t tiles = blocks_of(a->D, TILE), chunks = blocks_of(a->L, a->chunk), held = a->N * W, count = last_tile - first_tile;
    const int64_t rows = a->chunk * W;
    vf *memory = allocate((4 * rows + 2 * count * held + count * W) * V);
    if (!memory) return 1;
    ForwardScratch s = {.dt = memory, .x = memory + rows, .y = memory + 2 * rows, .e = memory + 3 * rows};
    vf *A2 = memory + 4 * rows, *h = A2 + count * held, *limit = h + count * held;
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
            for (int64_t t = 0; t < count; t++) {
                const int last = t + 1 == count;
                const Ahead next = {last ? run.stop : run.start, (first_tile + (last ? 0 : t + 1)) * TILE};
                forward_tile(a, &s, b, (first_tile + t) * TILE, run, A2 + t * held, limit + t * W, h + t * held, next);
            }
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
