/* What this processor can do at most: independent multiply-adds, and powers of two, on vectors in registers. */
#include "vectors.h"

typedef struct { int64_t count, threads; float *sink; } Args; /* count of vector operations, all threads together */

#define CHAINS 10 /* enough to hide the latency of a multiply-add; two constants still fit beside them */
#define POWERS 2  /* each is a dozen operations of which several can run at once */

/* The compiler must not merge iterations: each depends on the one before through its chain, and the sum is kept. */
static float multiply_adds(int64_t count) {
    vf chain[CHAINS], sum = splat(0.f);
    for (int i = 0; i < CHAINS; i++) chain[i] = splat(1e-3f * (float)(i + 1));
    const vf a = splat(0.999f), b = splat(1e-3f);
    for (int64_t k = 0; k < count; k += CHAINS)
        for (int i = 0; i < CHAINS; i++) chain[i] = chain[i] * a + b;
    for (int i = 0; i < CHAINS; i++) sum += chain[i];
    return sum_lanes(sum);
}

static float powers(int64_t count) {
    vf chain[POWERS], sum = splat(0.f);
    for (int i = 0; i < POWERS; i++) chain[i] = splat(-0.1f * (float)(i + 1));
    for (int64_t k = 0; k < count; k += POWERS)
        for (int i = 0; i < POWERS; i++) sum += exp2_inside(chain[i]), chain[i] -= splat(1e-6f);
    return sum_lanes(sum);
}

static int spread(const Args *a, float (*work)(int64_t)) {
    float total = 0.f;
#pragma omp parallel for num_threads(a->threads) schedule(static) reduction(+ : total)
    for (int64_t t = 0; t < a->threads; t++) total += work((a->count + a->threads - 1) / a->threads);
    *a->sink = total;
    return 0;
}

int hybridnas_floor_multiply_adds(const Args *a) { return spread(a, multiply_adds); }
int hybridnas_floor_powers(const Args *a) { return spread(a, powers); }
