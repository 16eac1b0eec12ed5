/* Causal depthwise convolution with SiLU, forward and backward, channel-last, float32. The specification is reference.py.
 *
 * Lanes are channels. A unit of work is 128 neighbouring channels of one batch row (forward) or block of rows
 * (backward); it walks L in chunks, one column of V channels at a time inside a chunk, with the last K - 1 inputs and,
 * in the backward, the K - 1 unfinished input gradients in registers. The order of all sums follows from the shapes.
 *
 * seq_idx arrives as reset (B, L) bytes: at a reset the window is emptied.
 */
#include "vectors.h"

#define MAX_TAPS 16
#define GROUP 128
#define CHUNK 64

typedef struct {
    int64_t B, L, D, K, batch_blocks, silu, threads;
    int64_t x_b, x_l, dy_b, dy_l; /* strides in floats; last dimension 1 */
    const float *x, *weight, *bias, *initial; /* weight (K, D); initial (B, K - 1, D) */
    const uint8_t *reset;
    float *y;
    const float *dy;
    float *dx, *dweight, *dbias, *dinitial; /* dweight (K, D) */
} Args;

/* One column of V channels: window[0] is the newest input; pending[j] the gradient of the input j + 1 rows back. */
typedef struct {
    vf window[MAX_TAPS], pending[MAX_TAPS], dweight[MAX_TAPS], dbias;
    int64_t reach; /* how many rows back pending gradients are of this document */
} Column;

INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE void open_column(const Args *a, Column *k, int64_t b, int64_t d, int part) {
    const int64_t before = a->K - 1;
    for (int64_t j = 0; j < before; j++) {
        k->window[j] = a->initial ? load_part(a->initial + (b * before + before - 1 - j) * a->D + d, part) : splat(0.f);
        k->pending[j] = splat(0.f);
    }
    k->reach = a->initial ? before : 0;
}

INLINE vf filter(const int taps, const vf *weight, vf bias, vf now, const vf *window) {
    vf sum = bias + weight[taps - 1] * now;
    for (int j = 0; j < taps - 1; j++) sum += weight[taps - 2 - j] * window[j];
    return sum;
}

INLINE void push(const int taps, vf *window, vf now) {
    for (int j = taps - 2; j > 0; j--) window[j] = window[j - 1];
    if (taps > 1) window[0] = now;
}

INLINE void load_weights(const Args *a, const int taps, int64_t d, int part, vf *weight, vf *bias) {
    for (int j = 0; j < taps; j++) weight[j] = load_part(a->weight + j * a->D + d, part);
    *bias = a->bias ? load_part(a->bias + d, part) : splat(0.f);
}

INLINE void forward_column(const Args *a, const int taps, Column *k, int64_t b, int64_t d, int part, int64_t start,
                           int64_t stop) {
    vf weight[MAX_TAPS], window[MAX_TAPS], bias;
    load_weights(a, taps, d, part, weight, &bias);
    for (int j = 0; j < taps - 1; j++) window[j] = k->window[j];
    const uint8_t *reset = a->reset ? a->reset + b * a->L : NULL;
    for (int64_t l = start; l < stop; l++) {
        if (reset && reset[l])
            for (int j = 0; j < taps - 1; j++) window[j] = splat(0.f);
        const vf now = load_part(a->x + b * a->x_b + l * a->x_l + d, part);
        const vf sum = filter(taps, weight, bias, now, window);
        store_part(a->y + (b * a->L + l) * a->D + d, a->silu ? sum * sigmoid(sum) : sum, part);
        push(taps, window, now);
    }
    for (int j = 0; j < taps - 1; j++) k->window[j] = window[j];
}

INLINE void finish_row(const Args *a, int64_t b, int64_t l, int64_t d, vf gradient, int part) {
    if (l >= 0) store_part(a->dx + (b * a->L + l) * a->D + d, gradient, part);
    else if (a->initial) store_part(a->dinitial + (b * (a->K - 1) + a->K - 1 + l) * a->D + d, gradient, part);
}

INLINE void backward_column(const Args *a, const int taps, Column *k, int64_t b, int64_t d, int part, int64_t start,
                            int64_t stop) {
    vf weight[MAX_TAPS], window[MAX_TAPS], pending[MAX_TAPS], dweight[MAX_TAPS], bias, dbias = k->dbias;
    load_weights(a, taps, d, part, weight, &bias);
    for (int j = 0; j < taps - 1; j++) window[j] = k->window[j], pending[j] = k->pending[j];
    for (int j = 0; j < taps; j++) dweight[j] = k->dweight[j];
    int64_t reach = k->reach;
    const uint8_t *reset = a->reset ? a->reset + b * a->L : NULL;
    for (int64_t l = start; l < stop; l++) {
        if (reset && reset[l]) {
            for (int j = 0; j < taps - 1; j++) {
                if (j < reach) finish_row(a, b, l - 1 - j, d, pending[j], part);
                window[j] = pending[j] = splat(0.f);
            }
            reach = 0;
        }
        const vf now = load_part(a->x + b * a->x_b + l * a->x_l + d, part);
        vf g = load_part(a->dy + b * a->dy_b + l * a->dy_l + d, part);
        if (a->silu) {
            const vf sum = filter(taps, weight, bias, now, window), open = sigmoid(sum);
            g *= open + sum * open * (1.f - open);
        }
        dbias += g;
        dweight[taps - 1] += g * now;
        for (int j = 0; j < taps - 1; j++) {
            dweight[taps - 2 - j] += g * window[j];
            pending[j] += g * weight[taps - 2 - j];
        }
        if (taps > 1 && reach == taps - 1) finish_row(a, b, l - taps + 1, d, pending[taps - 2], part);
        else if (taps > 1) reach++;
        else finish_row(a, b, l, d, g * weight[0], part);
        push(taps, window, now);
        push(taps, pending, g * weight[taps - 1]);
    }
    for (int j = 0; j < taps - 1; j++) k->window[j] = window[j], k->pending[j] = pending[j];
    for (int j = 0; j < taps; j++) k->dweight[j] = dweight[j];
    k->dbias = dbias, k->reach = reach;
}

static void forward_unit(const Args *a, int64_t b, int64_t d0, Column *columns) {
    const int64_t width = minimum(GROUP, a->D - d0);
    for (int64_t d = 0; d < width; d += V) open_column(a, columns + d / V, b, d0 + d, (int)minimum(V, width - d));
    for (int64_t start = 0; start < a->L; start += CHUNK)
        for (int64_t d = 0; d < width; d += V) {
            const int part = (int)minimum(V, width - d);
            const int64_t stop = minimum(a->L, start + CHUNK);
            if (a->K == 4 && part == V) forward_column(a, 4, columns + d / V, b, d0 + d, V, start, stop);
            else forward_column(a, (int)a->K, columns + d / V, b, d0 + d, part, start, stop);
        }
}

static void backward_unit(const Args *a, int64_t block, int64_t d0, Column *columns, float *part_weight) {
    const int64_t width = minimum(GROUP, a->D - d0);
    memset(columns, 0, sizeof(Column) * (GROUP / V));
    for (int64_t b = block * a->B / a->batch_blocks; b < (block + 1) * a->B / a->batch_blocks; b++) {
        for (int64_t d = 0; d < width; d += V) open_column(a, columns + d / V, b, d0 + d, (int)minimum(V, width - d));
        for (int64_t start = 0; start < a->L; start += CHUNK)
            for (int64_t d = 0; d < width; d += V) {
                const int part = (int)minimum(V, width - d);
                const int64_t stop = minimum(a->L, start + CHUNK);
                if (a->K == 4 && part == V) backward_column(a, 4, columns + d / V, b, d0 + d, V, start, stop);
                else backward_column(a, (int)a->K, columns + d / V, b, d0 + d, part, start, stop);
            }
        for (int64_t d = 0; d < width; d += V) {
            const Column *k = columns + d / V;
            for (int64_t j = 0; j < a->K - 1 && j < k->reach; j++)
                finish_row(a, b, a->L - 1 - j, d0 + d, k->pending[j], (int)minimum(V, width - d));
        }
    }
    for (int64_t d = 0; d < width; d += V) {
        const int part = (int)minimum(V, width - d);
        for (int64_t j = 0; j < a->K; j++) store_part(part_weight + j * a->D + d0 + d, columns[d / V].dweight[j], part);
        store_part(part_weight + a->K * a->D + d0 + d, columns[d / V].dbias, part);
    }
}

/* Both return 0, or 1 when memory ran out or there are too many taps. */
int hybridnas_conv_forward(const Args *a) {
    const int64_t groups = (a->D + GROUP - 1) / GROUP;
    const int threads = (int)a->threads;
    int failed = a->K > MAX_TAPS;
    if (failed) return failed;
    (void)threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1) reduction(| : failed)
    for (int64_t unit = 0; unit < a->B * groups; unit++) {
        Column *columns = allocate((int64_t)sizeof(Column) / 4 * (GROUP / V));
        if (!columns) failed |= 1;
        else forward_unit(a, unit / groups, unit % groups * GROUP, columns);
        free(columns);
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
            Column *columns = allocate((int64_t)sizeof(Column) / 4 * (GROUP / V));
            if (!columns) failed |= 1;
            else backward_unit(a, unit / groups, unit % groups * GROUP, columns, parts + unit / groups * sums);
            free(columns);
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
