/* Causal depthwise convolution with SiLU, forward and backward, channel-last, float32. The specification is reference.py.
 *
 * Lanes are channels. A unit of work is 128 neighbouring channels of one batch row (forward) or block of rows
 * (backward); it walks L in chunks, one tile of channels (a cache line) at a time inside a chunk, with the last K - 1
 * inputs and, in the backward, the K - 1 unfinished input gradients kept from chunk to chunk. Inside a chunk the sums of
 * all rows come first and their SiLU after: two short loops, in each of which many rows are under way at once. The order
 * of all sums follows from the shapes.
 *
 * seq_idx arrives as reset (B, L) bytes: at a reset the window is emptied.
 */
#include "vectors.h"

#define MAX_TAPS 16
#define GROUP 128
#define CHUNK 32

typedef struct {
    int64_t B, L, D, K, batch_blocks, silu, threads;
    int64_t x_b, x_l, dy_b, dy_l; /* strides in floats; last dimension 1 */
    const float *x, *weight, *bias, *initial; /* weight (K, D); initial (B, K - 1, D) */
    const uint8_t *reset;
    float *y;
    const float *dy;
    float *dx, *dweight, *dbias, *dinitial; /* dweight (K, D) */
} Args;

/* One tile: window[j] is the input j + 1 rows back; pending[j] that input's unfinished gradient. */
typedef struct {
    vf window[MAX_TAPS][W], pending[MAX_TAPS][W], dweight[MAX_TAPS][W], dbias[W];
    int64_t reach; /* how many rows back pending gradients are of this document */
} Tile;

typedef struct { vf x[CHUNK * W], g[CHUNK * W]; } Scratch; /* g: the sums before SiLU, then their gradients */

INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int part(const int full, int width, int w) { return full ? V : width - w * V; }

INLINE void open_tile(const Args *a, Tile *k, int64_t b, int64_t d, int width) {
    const int64_t before = a->K - 1;
    for (int64_t j = 0; j < before; j++)
        for (int w = 0; w < W; w++) {
            const float *initial = a->initial ? a->initial + (b * before + before - 1 - j) * a->D + d + w * V : NULL;
            k->window[j][w] = initial ? load_part(initial, width - w * V) : splat(0.f);
            k->pending[j][w] = splat(0.f);
        }
    k->reach = a->initial ? before : 0;
}

INLINE void load_weights(const Args *a, const int taps, const int full, int64_t d, int width, vf weight[][W], vf *bias) {
    for (int w = 0; w < W; w++) {
        for (int j = 0; j < taps; j++) weight[j][w] = load_part(a->weight + j * a->D + d + w * V, part(full, width, w));
        bias[w] = a->bias ? load_part(a->bias + d + w * V, part(full, width, w)) : splat(0.f);
    }
}

/* The sums of a chunk's rows into s->g and the inputs into s->x; the window moves on. */
INLINE void convolve(const Args *a, const int taps, const int full, Tile *k, Scratch *s, int64_t b, int64_t d, int width,
                     int64_t start, int64_t stop) {
    vf weight[MAX_TAPS][W], window[MAX_TAPS][W], bias[W];
    load_weights(a, taps, full, d, width, weight, bias);
    for (int j = 0; j < taps - 1; j++)
        for (int w = 0; w < W; w++) window[j][w] = k->window[j][w];
    const uint8_t *reset = a->reset ? a->reset + b * a->L : NULL;
    const float *x = a->x + b * a->x_b + start * a->x_l + d;
    for (int64_t l = 0; l < stop - start; l++, x += a->x_l) {
        __builtin_prefetch(x + TILE); /* the next tile; harmless past the end */
        if (reset && reset[start + l])
            for (int j = 0; j < taps - 1; j++)
                for (int w = 0; w < W; w++) window[j][w] = splat(0.f);
        for (int w = 0; w < W; w++) {
            const vf now = load_part(x + w * V, part(full, width, w));
            vf sum = bias[w] + weight[taps - 1][w] * now;
            for (int j = 0; j < taps - 1; j++) sum += weight[taps - 2 - j][w] * window[j][w];
            for (int j = taps - 2; j > 0; j--) window[j][w] = window[j - 1][w];
            if (taps > 1) window[0][w] = now;
            s->x[l * W + w] = now, s->g[l * W + w] = sum;
        }
    }
    for (int j = 0; j < taps - 1; j++)
        for (int w = 0; w < W; w++) k->window[j][w] = window[j][w];
}

INLINE void forward_tile(const Args *a, const int taps, const int full, Tile *k, Scratch *s, int64_t b, int64_t d,
                         int width, int64_t start, int64_t stop) {
    float *y = a->y + (b * a->L + start) * a->D + d;
    for (int64_t l = 0; l < stop - start; l++) __builtin_prefetch(y + l * a->D, 1);
    convolve(a, taps, full, k, s, b, d, width, start, stop);
    for (int64_t l = 0; l < stop - start; l++, y += a->D)
        for (int w = 0; w < W; w++) {
            const vf sum = s->g[l * W + w];
            store_part(y + w * V, a->silu ? sum * sigmoid(sum) : sum, part(full, width, w));
        }
}

INLINE void finish_row(const Args *a, int64_t b, int64_t l, int64_t d, vf gradient, int lanes) {
    if (l >= 0) store_part(a->dx + (b * a->L + l) * a->D + d, gradient, lanes);
    else if (a->initial) store_part(a->dinitial + (b * (a->K - 1) + a->K - 1 + l) * a->D + d, gradient, lanes);
}

/* Gradients of one vector of a tile over a chunk whose inputs and sums' gradients are in the scratch. */
INLINE int64_t spread(const Args *a, const int taps, Tile *k, const Scratch *s, const int w, int64_t b, int64_t d,
                      int lanes, const vf before[][W], int64_t start, int64_t stop) {
    vf weight[MAX_TAPS], window[MAX_TAPS], pending[MAX_TAPS], dweight[MAX_TAPS], dbias = k->dbias[w];
    for (int j = 0; j < taps; j++) weight[j] = load_part(a->weight + j * a->D + d, lanes), dweight[j] = k->dweight[j][w];
    for (int j = 0; j < taps - 1; j++) window[j] = before[j][w], pending[j] = k->pending[j][w];
    int64_t reach = k->reach;
    const uint8_t *reset = a->reset ? a->reset + b * a->L : NULL;
    for (int64_t l = start; l < stop; l++) {
        if (reset && reset[l]) {
            for (int j = 0; j < taps - 1; j++) {
                if (j < reach) finish_row(a, b, l - 1 - j, d, pending[j], lanes);
                window[j] = pending[j] = splat(0.f);
            }
            reach = 0;
        }
        const vf now = s->x[(l - start) * W + w], g = s->g[(l - start) * W + w];
        dbias += g;
        dweight[taps - 1] += g * now;
        for (int j = 0; j < taps - 1; j++) {
            dweight[taps - 2 - j] += g * window[j];
            pending[j] += g * weight[taps - 2 - j];
        }
        if (taps > 1 && reach == taps - 1) finish_row(a, b, l - taps + 1, d, pending[taps - 2], lanes);
        else if (taps > 1) reach++;
        else finish_row(a, b, l, d, g * weight[0], lanes);
        for (int j = taps - 2; j > 0; j--) window[j] = window[j - 1], pending[j] = pending[j - 1];
        if (taps > 1) window[0] = now, pending[0] = g * weight[taps - 1];
    }
    for (int j = 0; j < taps - 1; j++) k->pending[j][w] = pending[j];
    for (int j = 0; j < taps; j++) k->dweight[j][w] = dweight[j];
    k->dbias[w] = dbias;
    return reach;
}

INLINE void backward_tile(const Args *a, const int taps, const int full, Tile *k, Scratch *s, int64_t b, int64_t d,
                          int width, int64_t start, int64_t stop) {
    vf before[MAX_TAPS][W];
    for (int j = 0; j < taps - 1; j++)
        for (int w = 0; w < W; w++) before[j][w] = k->window[j][w];
    const float *dy = a->dy + b * a->dy_b + start * a->dy_l + d, *dx = a->dx + (b * a->L + start) * a->D + d;
    for (int64_t l = 0; l < stop - start; l++) { /* needed after the sums */
        __builtin_prefetch(dy + l * a->dy_l);
        __builtin_prefetch(dx + l * a->D, 1);
    }
    convolve(a, taps, full, k, s, b, d, width, start, stop);
    for (int64_t l = 0; l < stop - start; l++, dy += a->dy_l)
        for (int w = 0; w < W; w++) {
            const vf sum = s->g[l * W + w], open = sigmoid(sum);
            const vf slope = a->silu ? open + sum * open * (1.f - open) : splat(1.f);
            s->g[l * W + w] = load_part(dy + w * V, part(full, width, w)) * slope;
        }
    int64_t reach = k->reach;
    for (int w = 0; w < W; w++)
        if (part(full, width, w) > 0)
            reach = spread(a, taps, k, s, w, b, d + w * V, part(full, width, w), (const vf(*)[W])before, start, stop);
    k->reach = reach;
}

static void forward_unit(const Args *a, int64_t b, int64_t d0, Tile *tiles, Scratch *s) {
    const int64_t group = minimum(GROUP, a->D - d0);
    for (int64_t d = 0; d < group; d += TILE) open_tile(a, tiles + d / TILE, b, d0 + d, (int)minimum(TILE, group - d));
    for (int64_t start = 0; start < a->L; start += CHUNK)
        for (int64_t d = 0; d < group; d += TILE) {
            const int width = (int)minimum(TILE, group - d), taps = (int)a->K;
            const int64_t stop = minimum(a->L, start + CHUNK);
            /* the taps of Mamba and of LFM2 are constants to the compiler */
            if (taps == 4 && width == TILE) forward_tile(a, 4, 1, tiles + d / TILE, s, b, d0 + d, TILE, start, stop);
            else if (taps == 3 && width == TILE) forward_tile(a, 3, 1, tiles + d / TILE, s, b, d0 + d, TILE, start, stop);
            else forward_tile(a, taps, 0, tiles + d / TILE, s, b, d0 + d, width, start, stop);
        }
}

static void backward_unit(const Args *a, int64_t block, int64_t d0, Tile *tiles, Scratch *s, float *part_weight) {
    const int64_t group = minimum(GROUP, a->D - d0);
    memset(tiles, 0, sizeof(Tile) * (GROUP / TILE));
    for (int64_t b = block * a->B / a->batch_blocks; b < (block + 1) * a->B / a->batch_blocks; b++) {
        for (int64_t d = 0; d < group; d += TILE)
            open_tile(a, tiles + d / TILE, b, d0 + d, (int)minimum(TILE, group - d));
        for (int64_t start = 0; start < a->L; start += CHUNK)
            for (int64_t d = 0; d < group; d += TILE) {
                const int width = (int)minimum(TILE, group - d), taps = (int)a->K;
                const int64_t stop = minimum(a->L, start + CHUNK);
                if (taps == 4 && width == TILE) backward_tile(a, 4, 1, tiles + d / TILE, s, b, d0 + d, TILE, start, stop);
                else if (taps == 3 && width == TILE)
                    backward_tile(a, 3, 1, tiles + d / TILE, s, b, d0 + d, TILE, start, stop);
                else backward_tile(a, taps, 0, tiles + d / TILE, s, b, d0 + d, width, start, stop);
            }
        for (int64_t d = 0; d < group; d += V) {
            const Tile *k = tiles + d / TILE;
            for (int64_t j = 0; j < a->K - 1 && j < k->reach; j++)
                finish_row(a, b, a->L - 1 - j, d0 + d, k->pending[j][d % TILE / V], (int)minimum(V, group - d));
        }
    }
    for (int64_t d = 0; d < group; d += V) {
        const int lanes = (int)minimum(V, group - d);
        const Tile *k = tiles + d / TILE;
        float *out = part_weight + d0 + d;
        for (int64_t j = 0; j < a->K; j++) store_part(out + j * a->D, k->dweight[j][d % TILE / V], lanes);
        store_part(out + a->K * a->D, k->dbias[d % TILE / V], lanes);
    }
}

#define WORKING ((int64_t)(sizeof(Tile) * (GROUP / TILE) + sizeof(Scratch)) / 4) /* floats */

/* Both return 0, or 1 when memory ran out or there are too many taps. */
int hybridnas_conv_forward(const Args *a) {
    const int64_t groups = (a->D + GROUP - 1) / GROUP;
    const int threads = (int)a->threads;
    int failed = a->K > MAX_TAPS;
    if (failed) return failed;
    (void)threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1) reduction(| : failed)
    for (int64_t unit = 0; unit < a->B * groups; unit++) {
        Tile *tiles = allocate(WORKING);
        if (!tiles) failed |= 1;
        else forward_unit(a, unit / groups, unit % groups * GROUP, tiles, (Scratch *)(tiles + GROUP / TILE));
        free(tiles);
    }
    return failed;
}

int hybridnas_conv_backward(const Args *a) {
    const int64_t groups = (a->D + GROUP - 1) / GROUP, sums = (a->K + 1) * a->D;
    const int threads = (int)a->threads;
    float *parts = allocate(a->batch_blocks * sums);
    int failed = a->K > MAX_TAPS || !parts;
    if (!failed) {
        (void)threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1) reduction(| : failed)
        for (int64_t unit = 0; unit < a->batch_blocks * groups; unit++) {
            Tile *tiles = allocate(WORKING);
            Scratch *scratch = (Scratch *)(tiles + GROUP / TILE);
            if (!tiles) failed |= 1;
            else backward_unit(a, unit / groups, unit % groups * GROUP, tiles, scratch, parts + unit / groups * sums);
            free(tiles);
        }
        memset(a->dweight, 0, (size_t)(a->K * a->D) * 4);
        memset(a->dbias, 0, (size_t)a->D * 4);
        for (int64_t p = 0; p < a->batch_blocks; p++) {
            for (int64_t i = 0; i < a->K * a->D; i++) a->dweight[i] += parts[p * sums + i];
            for (int64_t i = 0; i < a->D; i++) a->dbias[i] += parts[p * sums + a->K * a->D + i];
        }
    }
    free(parts);
    return failed;
}
