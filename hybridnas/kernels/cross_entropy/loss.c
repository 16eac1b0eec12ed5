/* Cross-entropy of rows of logits and its gradient, float32. The specification is reference.py.
 *
 * A row is read for its largest logit, for the exponentials and their sum, and, where the gradient is wanted, once more
 * to scale them: all while it is in the cache. Rows are independent; their sums follow from the length alone. The gradient may
 * take the place of the logits.
 */
#include "vectors.h"
#include <math.h>

typedef struct {
    int64_t T, vocab, logits_row, out_row, gradient, threads; /* rows in floats; last dimension 1 */
    const float *logits;
    const int64_t *targets;
    const float *scale, *z_loss; /* scale (T) or NULL: 1; z_loss (1) */
    float *out, *loss, *logsumexp;
} Args;

INLINE vf tail(const float *p, int count, float beyond) {
    float lanes[V];
    for (int i = 0; i < V; i++) lanes[i] = i < count ? p[i] : beyond;
    return load(lanes);
}

INLINE vf larger(vf a, vf b) { return choose(a > b, a, b); }

INLINE float largest_lane(vf x) {
    float s[V];
    memcpy(s, &x, sizeof s);
    for (int step = V / 2; step; step /= 2)
        for (int i = 0; i < step; i++) s[i] = s[i] > s[i + step] ? s[i] : s[i + step];
    return s[0];
}

/* e^x for x <= 0: 1e-38 where it would underflow, NaN stays NaN. */
INLINE vf power(vf x) { return choose(x == x, exp_negative(x), x); }

/* Four sums side by side, so that the latency of one does not count. */
#define STREAMS 4
#define BLOCK (STREAMS * V)

INLINE void one_row(const int gradient, const Args *a, int64_t t) {
    const float *x = a->logits + t * a->logits_row;
    float *out = a->out + t * a->out_row;
    const float chosen = x[a->targets[t]];
    const int64_t whole = a->vocab / V * V;
    const int rest = (int)(a->vocab - whole);
    vf top[STREAMS], sum[STREAMS];
    for (int k = 0; k < STREAMS; k++) top[k] = splat(-__builtin_inff()), sum[k] = splat(0.f);
    int64_t v = 0;
    for (; v + BLOCK <= whole; v += BLOCK)
        for (int k = 0; k < STREAMS; k++) top[k] = larger(load(x + v + k * V), top[k]);
    for (; v < whole; v += V) top[0] = larger(load(x + v), top[0]);
    if (rest) top[0] = larger(tail(x + whole, rest, -__builtin_inff()), top[0]);
    const float peak = largest_lane(larger(larger(top[0], top[1]), larger(top[2], top[3])));
    for (v = 0; v + BLOCK <= whole; v += BLOCK)
        for (int k = 0; k < STREAMS; k++) {
            const vf e = power(load(x + v + k * V) - peak);
            sum[k] += e;
            if (gradient) store(out + v + k * V, e);
        }
    for (; v < whole; v += V) {
        const vf e = power(load(x + v) - peak);
        sum[0] += e;
        if (gradient) store(out + v, e);
    }
    if (rest) {
        const vf e = power(tail(x + whole, rest, peak) - peak);
        for (int i = 0; i < rest; i++) {
            sum[0][i] += e[i];
            if (gradient) out[whole + i] = e[i];
        }
    }
    const float total = sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])), z = a->z_loss[0];
    const float logsumexp = peak + logf(total);
    a->logsumexp[t] = logsumexp;
    a->loss[t] = logsumexp - chosen + z * logsumexp * logsumexp;
    if (!gradient) return;
    const float scale = a->scale ? a->scale[t] : 1.f, factor = scale * (1.f + 2.f * z * logsumexp) / total;
    for (v = 0; v < whole; v += V) store(out + v, load(out + v) * factor);
    for (; v < a->vocab; v++) out[v] *= factor;
    out[a->targets[t]] -= scale;
}

int hybridnas_loss_rows(const Args *a) {
    const int threads = (int)a->threads;
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < a->T; t++) {
        if (a->gradient) one_row(1, a, t);
        else one_row(0, a, t);
    }
    return 0;
}
