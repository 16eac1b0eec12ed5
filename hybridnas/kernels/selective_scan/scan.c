/* Selective scan, forward and backward, channel-last, float32. The specification is reference.py.
 *
 * Lanes are channels. A unit of work is a group of neighbouring tiles of one block of batch rows; it walks L in chunks,
 * every tile of the group inside a chunk, so that rows are read as whole cache lines. The forward keeps the state at the
 * start of every chunk; the backward computes a chunk's states again from it. Units, chunks and the order of all sums
 * follow from the shapes alone: results are the same bits for any number of threads.
 *
 * seq_idx arrives as reset (B, L) bytes; a chunk is cut into runs at resets and each run starts from zero.
 *
 * Here: what both directions share, and the entry points; forward.h and backward.h are parts of this file.
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

#define TOGETHER (V == 16 ? 2 : 1) /* state entries side by side; eight lanes give two chains of their own, W */

typedef struct { int64_t start, stop; int fresh; } Run;
typedef struct { int64_t row, d0; } Ahead; /* where the tile after this one starts */

INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
/* How many of vector w's lanes are channels; a constant where the whole tile is. */
INLINE int lanes_of(const int full, int width, int w) { return full ? V : width - w * V; }
/* How many entries go together from entry n on. */
INLINE int64_t together(int64_t n, int64_t N) { return N - n < TOGETHER ? 1 : TOGETHER; }
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

/* A column of cache lines, one a row, that will be needed soon. */
typedef struct { const float *first; int64_t stride; } Column;

/* Part n of N of what is needed next, asked for while this entry is computed; harmless past the end. */
INLINE void fetch(const int write, const Column *columns, int count, int64_t rows, int64_t n, int64_t N) {
    for (int64_t l = n * rows / N; l < (n + 1) * rows / N; l++)
        for (int i = 0; i < count; i++) {
            const float *line = columns[i].first + l * columns[i].stride;
            if (write) __builtin_prefetch(line, 1, 2);
            else __builtin_prefetch(line, 0, 2);
        }
}

/* delta from what was given, its derivative and x = delta u, in short loops: each is a chain of dependent operations, and
 * a processor runs ahead only as far as its window of instructions reaches. Returns whether some step leaves the fast
 * range of the exponential. slope holds e^-|.| on the way; it becomes the derivative only where that is asked for. */
INLINE int steps(const int derivative, const Args *a, int64_t rows, vf *restrict dt, vf *restrict x, vf *restrict slope,
                 const vf *limit) {
    vi outside = {0};
    if (a->softplus) {
        for (int64_t i = 0; i < rows * W; i++) slope[i] = exp_negative(-magnitude(dt[i]));
        for (int64_t i = 0; i < rows * W; i++) {
            const vf raw = dt[i], e = slope[i];
            dt[i] = softplus_from(raw, e);
            if (derivative) slope[i] = sigmoid_from(raw, e);
        }
    } else if (derivative)
        for (int64_t i = 0; i < rows * W; i++) slope[i] = splat(1.f);
    for (int64_t l = 0; l < rows; l++)
        for (int w = 0; w < W; w++) {
            x[l * W + w] *= dt[l * W + w];
            outside |= ~(magnitude(dt[l * W + w]) <= limit[w]);
        }
    return any_lane(outside);
}

#include "forward.h"
#include "backward.h"

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
