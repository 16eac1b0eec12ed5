/* Vectors of floats and the few functions on them that the kernels share; GCC or Clang, any processor.
 *
 * A tile is 16 neighbouring channels, one cache line: W vectors of V lanes. V follows the widest registers that the
 * compiler may use; sums across lanes follow it, so that results on two kinds of processor differ in the last bits.
 */
#ifndef HYBRIDNAS_VECTORS_H
#define HYBRIDNAS_VECTORS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define TILE 16
#if defined(__AVX512F__)
#define V 16
#else
#define V 8 /* two registers of four where there is no AVX2 */
#endif
#define W (TILE / V)

typedef float vf __attribute__((vector_size(V * 4)));
typedef float vf_unaligned __attribute__((vector_size(V * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(V * 4)));
#define INLINE static inline __attribute__((always_inline))
#define LOG2E 1.44269504f

INLINE vf splat(float x) { return (vf){0} + x; }
INLINE vf load(const float *p) { return *(const vf_unaligned *)p; }
INLINE void store(float *p, vf x) { *(vf_unaligned *)p = x; }

/* mask ? yes : no, lane by lane; C has no such operator on vectors. */
INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

/* 2^t to 1e-7 relative for |t| < 126; anything outside gives nonsense. Exact at 0, so that slow decays stay exact. */
INLINE vf exp2_inside(vf t) {
    const vf shifted = t + 12582912.f; /* 1.5 * 2^23: the integer part moves into the low bits */
    const vf r = t - (shifted - 12582912.f);
    vf p = r * splat(1.326472708e-03f) + splat(9.671512862e-03f);
    p = p * r + splat(5.550733746e-02f);
    p = p * r + splat(2.402224208e-01f);
    p = p * r + splat(6.931469776e-01f);
    p = p * r + splat(1.0f);
    return (vf)((vi)p + ((vi)shifted << 23));
}

/* 2^t for every t: 1e-38 where it would underflow, infinity where it overflows, NaN stays NaN. */
INLINE vf exp2_any(vf t) {
    vf inside = choose(t < splat(-126.f), splat(-126.f), t);
    inside = choose(inside > splat(126.f), splat(126.f), inside);
    vf y = exp2_inside(inside);
    y = choose(t > splat(126.f), splat(__builtin_inff()), y);
    return choose(t == t, y, t);
}

/* e^x for x <= 0, no less than 1e-38; what NaN gives is for the caller, who has x. */
INLINE vf exp_negative(vf x) {
    const vf t = x * LOG2E;
    return exp2_inside(choose(t < splat(-126.f), splat(-126.f), t));
}

/* log(1 + e) for 0 <= e <= 1, to 3e-8 relative. */
INLINE vf log1p_unit(vf e) {
    vf p = e * splat(5.364810730e-03f) + splat(-3.006574005e-02f);
    p = p * e + splat(7.920445427e-02f);
    p = p * e + splat(-1.375379578e-01f);
    p = p * e + splat(1.915365203e-01f);
    p = p * e + splat(-2.485716297e-01f);
    p = p * e + splat(3.332132254e-01f);
    p = p * e + splat(-4.999964796e-01f);
    return (p * e) * e + e;
}

INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

/* 1 / (1 + e^-x) given e = e^-|x|. */
INLINE vf sigmoid_from(vf x, vf e) { return choose(x < splat(0.f), e, splat(1.f)) / (1.f + e); }

INLINE vf sigmoid(vf x) { return sigmoid_from(x, exp_negative(-magnitude(x))); }

/* log(1 + e^x) given e = e^-|x|; NaN stays NaN. */
INLINE vf softplus_from(vf x, vf e) {
    const vf y = choose(x > splat(0.f), x, splat(0.f)) + log1p_unit(e);
    return choose(x == x, y, x);
}

/* The first `count` of V floats, zeros after. */
INLINE vf load_part(const float *p, int count) {
    if (count >= V) return load(p);
    vf x = {0};
    if (count > 0) memcpy(&x, p, (size_t)count * 4);
    return x;
}

INLINE void store_part(float *p, vf x, int count) {
    if (count >= V) store(p, x);
    else if (count > 0) memcpy(p, &x, (size_t)count * 4);
}

INLINE float sum_lanes(vf x) {
    float s[V];
    memcpy(s, &x, sizeof s);
    for (int step = V / 2; step; step /= 2)
        for (int i = 0; i < step; i++) s[i] += s[i + step];
    return s[0];
}

/* out[i] = the sum over the lanes of x[i * stride], for eight of them. */
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAVE_SHUFFLE 1
#endif
#endif
#ifdef HAVE_SHUFFLE
typedef float v8 __attribute__((vector_size(32)));
typedef float v8_unaligned __attribute__((vector_size(32), aligned(4)));
INLINE v8 eight_lanes(const vf *x) {
    const v8 *half = (const v8 *)x;
    return V == 16 ? half[0] + half[1] : half[0];
}
INLINE v8 add_neighbours(v8 a, v8 b) { /* within each half: a0+a1, a2+a3, b0+b1, b2+b3 */
    return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}
INLINE void sum_lanes_8(const vf *x, int64_t stride, float *out) {
    v8 four[2];
    for (int i = 0; i < 2; i++, x += 4 * stride)
        four[i] = add_neighbours(add_neighbours(eight_lanes(x), eight_lanes(x + stride)),
                                 add_neighbours(eight_lanes(x + 2 * stride), eight_lanes(x + 3 * stride)));
    *(v8_unaligned *)out = __builtin_shufflevector(four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11) +
                           __builtin_shufflevector(four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15);
}
#else
INLINE void sum_lanes_8(const vf *x, int64_t stride, float *out) {
    for (int i = 0; i < 8; i++) out[i] = sum_lanes(x[i * stride]);
}
#endif

INLINE int any_lane(vi x) {
    int32_t a[V], found = 0;
    memcpy(a, &x, sizeof a);
    for (int i = 0; i < V; i++) found |= a[i];
    return found;
}

static void *allocate(int64_t floats) {
    void *p = NULL;
    return posix_memalign(&p, 64, (size_t)(floats > 0 ? floats : 1) * 4) ? NULL : p;
}

#endif
