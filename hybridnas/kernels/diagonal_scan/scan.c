/* The scan h_t = a_t h_{t-1} + x_t, forward and backward, channel-last, float32. The specification is reference.py.
 *
 * Lanes are channels. A unit of work is 64 neighbouring channels of one batch row: enough independent chains to hide
 * the latency of a step. Complex numbers arrive as P = 2 planes, real and imaginary parts, else P = 1. The order of all
 * sums follows from the shapes, and no two units write to one place.
 *
 * seq_idx arrives as reset (B, L) bytes: at a reset the state before it is zero.
 */
#include "vectors.h"

#define GROUP 64
#define MOST (GROUP / V)

typedef struct {
    int64_t P, B, L, D, threads;
    int64_t a_p, a_b, a_l, x_p, x_b, x_l, dh_p, dh_b, dh_l; /* strides in floats; last dimension 1 */
    const float *a, *x, *initial;                           /* initial (P, B, D) or NULL */
    const uint8_t *reset;
    float *h; /* (P, B, L, D): written by the forward, read by the backward */
    const float *dh;
    float *da, *dx, *dinitial; /* like h; dinitial (P, B, D) */
} Args;

INLINE int lanes_of(const int full, int width, int i) { return full ? V : width - i * V; }

INLINE void forward_group(const Args *s, int64_t b, int64_t d, int width, const int full, const int P) {
    const int count = full ? MOST : (width + V - 1) / V;
    vf carry[2][MOST];
    for (int p = 0; p < P; p++)
        for (int i = 0; i < count; i++)
            carry[p][i] = s->initial ? load_part(s->initial + (p * s->B + b) * s->D + d + i * V, lanes_of(full, width, i))
                                     : splat(0.f);
    const uint8_t *reset = s->reset ? s->reset + b * s->L : NULL;
    for (int64_t l = 0; l < s->L; l++) {
        if (reset && reset[l])
            for (int p = 0; p < P; p++)
                for (int i = 0; i < count; i++) carry[p][i] = splat(0.f);
        const float *a = s->a + b * s->a_b + l * s->a_l + d, *x = s->x + b * s->x_b + l * s->x_l + d;
        float *h = s->h + (b * s->L + l) * s->D + d;
        const int64_t plane = s->B * s->L * s->D;
        for (int i = 0; i < count; i++) {
            const int n = lanes_of(full, width, i);
            const vf ar = load_part(a + i * V, n), xr = load_part(x + i * V, n), before = carry[0][i];
            if (P == 2) {
                const vf ai = load_part(a + s->a_p + i * V, n), xi = load_part(x + s->x_p + i * V, n);
                carry[0][i] = ar * before - ai * carry[1][i] + xr;
                carry[1][i] = ar * carry[1][i] + ai * before + xi;
                store_part(h + plane + i * V, carry[1][i], n);
            } else carry[0][i] = ar * before + xr;
            store_part(h + i * V, carry[0][i], n);
        }
    }
}

/* carry: the gradient of h_{t-1} through step t, conj(a_t) times that of h_t. */
INLINE void backward_group(const Args *s, int64_t b, int64_t d, int width, const int full, const int P) {
    const int count = full ? MOST : (width + V - 1) / V;
    vf carry[2][MOST];
    for (int p = 0; p < P; p++)
        for (int i = 0; i < count; i++) carry[p][i] = splat(0.f);
    const uint8_t *reset = s->reset ? s->reset + b * s->L : NULL;
    const int64_t plane = s->B * s->L * s->D;
    for (int64_t l = s->L - 1; l >= 0; l--) {
        const float *a = s->a + b * s->a_b + l * s->a_l + d, *dh = s->dh + b * s->dh_b + l * s->dh_l + d;
        const int64_t at = (b * s->L + l) * s->D + d;
        const int starts = reset && reset[l];
        const float *before[2];
        for (int p = 0; p < P; p++)
            before[p] = l ? s->h + p * plane + at - s->D : s->initial ? s->initial + (p * s->B + b) * s->D + d : NULL;
        for (int i = 0; i < count; i++) {
            const int n = lanes_of(full, width, i);
            const vf ar = load_part(a + i * V, n), gr = load_part(dh + i * V, n) + carry[0][i];
            const vf hr = starts || !before[0] ? splat(0.f) : load_part(before[0] + i * V, n);
            vf dar = gr * hr, next = ar * gr;
            if (P == 2) {
                const vf ai = load_part(a + s->a_p + i * V, n), gi = load_part(dh + s->dh_p + i * V, n) + carry[1][i];
                const vf hi = starts || !before[1] ? splat(0.f) : load_part(before[1] + i * V, n);
                dar += gi * hi;
                next += ai * gi;
                store_part(s->da + plane + at + i * V, gi * hr - gr * hi, n);
                store_part(s->dx + plane + at + i * V, gi, n);
                carry[1][i] = starts ? splat(0.f) : ar * gi - ai * gr;
            }
            store_part(s->da + at + i * V, dar, n);
            store_part(s->dx + at + i * V, gr, n);
            carry[0][i] = starts ? splat(0.f) : next;
        }
    }
    if (s->initial)
        for (int p = 0; p < P; p++)
            for (int i = 0; i < count; i++)
                store_part(s->dinitial + (p * s->B + b) * s->D + d + i * V, carry[p][i], lanes_of(full, width, i));
}

/* Sizes that are constants to the compiler: whole groups, and the number of planes. */
#define EACH_GROUP(function)                                                                              \
    const int64_t groups = (s->D + GROUP - 1) / GROUP;                                                    \
    const int threads = (int)s->threads;                                                                  \
    (void)threads;                                                                                        \
    _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")                    \
    for (int64_t unit = 0; unit < s->B * groups; unit++) {                                                \
        const int64_t b = unit / groups, d = unit % groups * GROUP;                                       \
        const int width = (int)(s->D - d < GROUP ? s->D - d : GROUP);                                     \
        if (s->P == 1 && width == GROUP) function(s, b, d, GROUP, 1, 1);                                  \
        else if (s->P == 1) function(s, b, d, width, 0, 1);                                               \
        else if (width == GROUP) function(s, b, d, GROUP, 1, 2);                                          \
        else function(s, b, d, width, 0, 2);                                                              \
    }                                                                                                     \
    return 0;

int hybridnas_diagonal_forward(const Args *s) { EACH_GROUP(forward_group) }

int hybridnas_diagonal_backward(const Args *s) { EACH_GROUP(backward_group) }
