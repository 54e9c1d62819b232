/* vmath.h: exp, expm1, sigmoid, tanh and softplus on vectors.
 * Knows simd.h alone; calls no libm, reads no table, takes no branch. Constants and polynomials
 * come from derive_vmath.py; tests/test_vmath.py holds the bounds.
 *
 * Worst error measured, in ulp of the result, and where. float32: over every float; float64: over
 * sixteen million numbers (six million of expm1_ and softplus, in float32 too). The first column is
 * with fma (avx2, avx512), the second without.
 *
 *              float32                                    float64
 *   exp_       1.36 (-5.881794)   1.59 (26.69367)         1.25 (16.99)    1.55 (-11.43)
 *   sigmoid    1.93 (-17.46381)   1.93 (-17.46381)        1.89 (-37.09)   1.87 (-37.09)
 *   tanh_      1.33 (0.6039220)   1.33 (0.6039220)        2.46 (5.893)    2.47 (-11.46)
 *   expm1_     2.47 (-0.280383)   2.45 (-0.277399)        2.47 (-0.0630)  2.47 (-0.0630)
 *   softplus   2.75 (-2.017053)   2.83 (-7.261202)        2.76 (-2.745)   2.76 (-2.745)
 *
 * A NaN stays one, infinities and zeros are exact (tanh_(-0) = -0), tanh_ is odd to the bit.
 * Results less than the smallest normal number count as zero: the kernels flush them. A greater x
 * never gives a result less by more than 1 ulp in float32, and tanh_ of float32 never one less. */
#ifndef RF_VMATH_H
#define RF_VMATH_H

#include "simd.h"

/* 2^k for an integer k comes from adding k to RF_MAGIC: the last bits of the sum are k plus the
 * exponent's bias, and a shift moves them to the exponent's place; k = -bias gives 0. The sum also
 * rounds to the nearest integer. */
#if RF_DOUBLE
#define RF_MAGIC (0x1.8p52 + 1023)
#define RF_EXPONENT_SHIFT 52
#define RF_SIGN_BIT INT64_MIN
#else
#define RF_MAGIC (0x1.8p23f + 127)
#define RF_EXPONENT_SHIFT 23
#define RF_SIGN_BIT INT32_MIN
#endif
RF_INLINE vec power_of_two(vec k_plus_magic) {
    return (vec)((ivec)k_plus_magic << RF_EXPONENT_SHIFT);
}

/* ln 2 in two parts: k * RF_LN2_HI is exact for all k that occur, so that x - k ln 2 keeps its
 * accuracy on an isa without fma. */
#if RF_DOUBLE
#define RF_LOG2E 0x1.71547652b82fep+0
#define RF_LN2_HI 0x1.62e42fefa4p-1
#define RF_LN2_LO -0x1.8432a1b0e2634p-43
#define RF_TANH_STEP 0x1.71547652b82fep+1
#else
#define RF_LOG2E 0x1.715476p+0f
#define RF_LN2_HI 0x1.62e4p-1f
#define RF_LN2_LO 0x1.7f7d1cp-20f
#define RF_TANH_STEP 0x1.5d78dep+1f
#endif

/* exp(-x) = 2^k (1 + w / C), with k as power_of_two() takes it, for finite x in range.
 * With r = x + k ln 2, |r| <= ln(2)/2: w = C (exp(-r) - 1) = r (-C + r c(r)), relative error of
 * exp(-r) below 3.6e-9 (0.06 * 2^-24) and 4.4e-18 (0.04 * 2^-53). */
typedef struct {
    vec k, w;
} exp_parts;

/* sigmoid() rounds C + C exp(-x), then divides C by it. With C = 1 the one rounds worst where the
 * other does, just above and below a power of two, and 2.35 ulp come out; of the scales C of few
 * bits, for which C (1 + 2^k) is exact, 7/4 is best: 1.9 ulp. */
#define RF_EXP_SCALE ((T)1.75)

RF_INLINE exp_parts exp_minus(vec x) {
    exp_parts e;
    e.k = fma_(x, splat(-RF_LOG2E), splat(RF_MAGIC));
    const vec k = e.k - splat(RF_MAGIC);
    const vec r = fma_(k, splat(RF_LN2_LO), fma_(k, splat(RF_LN2_HI), x));
#if RF_DOUBLE
    const vec y = r * r; /* even and odd powers apart: half the latency */
    vec even = fma_(splat(0x1.0399db575a389p-21), y, splat(0x1.6c16642d03a28p-15));
    vec odd = fma_(splat(-0x1.782b9cabe462bp-25), y, splat(-0x1.43a3056a1f01p-18));
    even = fma_(even, y, splat(0x1.3e93e954ccdabp-9));
    odd = fma_(odd, y, splat(-0x1.6c16c1202be25p-12));
    even = fma_(even, y, splat(0x1.2aaaaaaaa60b9p-4));
    odd = fma_(odd, y, splat(-0x1.ddddddddfb3d5p-7));
    even = fma_(even, y, splat(0x1.c000000000014p-1));
    odd = fma_(odd, y, splat(-0x1.2aaaaaaaaaa7p-2));
    const vec c = fma_(odd, r, even);
#else
    vec c = fma_(splat(0x1.3bcbbcp-9f), r, splat(-0x1.dfe8f6p-7f));
    c = fma_(c, r, splat(0x1.2aaf66p-4f));
    c = fma_(c, r, splat(-0x1.2aa9fcp-2f));
    c = fma_(c, r, splat(0x1.bffffap-1f));
#endif
    e.w = fma_(c, r, splat(-RF_EXP_SCALE)) * r;
    return e;
}

/* exp(x); denormal results are right too where they are not flushed. The limits are just past those
 * of the range; 2^k goes in by two factors, as one power of two does not reach so far. */
RF_INLINE vec exp_(vec x) {
    const T low = RF_DOUBLE ? -746 : -105, high = RF_DOUBLE ? 710 : 89;
    const exp_parts e = exp_minus(-max_keep(splat(low), min_keep(splat(high), x)));
    const vec p = fma_(e.w, splat(1 / RF_EXP_SCALE), splat(1));
    const vec k = e.k - splat(RF_MAGIC);
    const vec half = fma_(k, splat((T)0.5), splat(RF_MAGIC));
    const vec rest = k - (half - splat(RF_MAGIC)) + splat(RF_MAGIC);
    return p * power_of_two(half) * power_of_two(rest);
}

/* sigmoid(x) = 1 / (1 + exp(-x)) = C / (C (1 + 2^k) + 2^k w). Results of all x below -limit are one
 * number less than the smallest normal one, which is flushed to zero. */
RF_INLINE vec sigmoid(vec x) {
    const T limit = RF_DOUBLE ? 709 : 88;
    const vec C = splat(RF_EXP_SCALE);
    const exp_parts e = exp_minus(max_keep(splat(-limit), min_keep(splat(limit), x)));
    const vec s = power_of_two(e.k);
    return C / fma_(s, e.w, fma_(s, C, C));
}

/* tanh(x), from t = tanh(u) with u = |x| - k ln(2)/2: with s = 2^k
 *   tanh |x| = ((s+1) t + (s-1)) / ((s-1) t + (s+1)) = 1 + (t - 1) / ((s-1)/2 t + (s+1)/2).
 * t = u + u y c(y), y = u^2.
 *
 * float32: the second form errs by little where the result is above 1/2, that is, for
 * |x| > atanh(1/2) = 0.5493; below, k = 0 and the result is t. So k = max(0, round(c |x| - 1)) with
 * c = 1.5 / 0.5494 (RF_TANH_STEP), a little below 2/ln(2): u then reaches up to 0.5494 for small k,
 * and drifts to 1.0 where it matters no more. The polynomial's error is below 4.2e-9
 * (0.07 * 2^-24) relative to tanh(x).
 * float64: the first form, k = round(c |x|) with c = 2/ln(2), |u| <= ln(2)/4; the polynomial's
 * error is below 4.4e-18 (0.04 * 2^-53). The other form would need seven terms more. At the limits
 * of |x| the result rounds to 1. */
RF_INLINE vec tanh_(vec x) {
    const vec half = splat((T)0.5);
    const vec magic = splat(RF_MAGIC - 1); /* makes 2^k / 2 */
    vec a = (vec)((ivec)x & isplat(~RF_SIGN_BIT));
#if RF_DOUBLE
    a = min_keep(splat((T)19.2), a);
    const vec k_magic = fma_(a, splat(RF_TANH_STEP), magic);
#else
    a = min_keep(splat((T)9.1), a);
    const vec k_magic = max_keep(magic, fma_(a, splat(RF_TANH_STEP), splat(RF_MAGIC - 2)));
#endif
    const vec k = k_magic - magic;
    const vec u = fma_(k, splat(-RF_LN2_LO / 2), fma_(k, splat(-RF_LN2_HI / 2), a));
    const vec y = u * u;
#if RF_DOUBLE
    vec c = fma_(splat(0x1.c37b89801e94dp-9), y, splat(-0x1.223c41da26d0dp-7));
    c = fma_(c, y, splat(0x1.664ec8f257a7ap-6));
    c = fma_(c, y, splat(-0x1.ba1ba114ddd18p-5));
    c = fma_(c, y, splat(0x1.11111110dfadep-3));
    c = fma_(c, y, splat(-0x1.55555555554b7p-2));
#else
    vec c = fma_(splat(-0x1.7ee57ap-8f), y, splat(0x1.542ac2p-6f));
    c = fma_(c, y, splat(-0x1.b888c6p-5f));
    c = fma_(c, y, splat(0x1.11094cp-3f));
    c = fma_(c, y, splat(-0x1.55553cp-2f));
#endif
    const vec t = fma_(u * y, c, u);
    const vec s = power_of_two(k_magic), p = s + half, m = s - half;
#if RF_DOUBLE
    const vec v = fma_(p, t, m) / fma_(m, t, p);
#else
    const vec one = min_keep(splat(1), k); /* 0 where k = 0: the result is then t */
    const vec v = one + (t - one) / fma_(m, t, p);
#endif
    return (vec)((ivec)v | ((ivec)x & isplat(RF_SIGN_BIT)));
}

/* exp(x) - 1 of x <= 0, others counting as 0: (2^k - 1) + 2^k w / C. The first part is exact, and 0
 * where the result is small; the second is less than half of it where they have opposite signs. At
 * the limit the result rounds to -1. */
RF_INLINE vec expm1_(vec x) {
    const vec a = max_keep(splat(RF_DOUBLE ? -50 : -30), min_keep((vec){0}, x));
    const exp_parts e = exp_minus(-a);
    const vec s = power_of_two(e.k);
    const vec v = fma_(s * splat(1 / RF_EXP_SCALE), e.w, s - 1);
    return (vec)((ivec)v | ((ivec)x & isplat(RF_SIGN_BIT)));
}

/* log(1 + exp(x)) = max(x, 0) + log(1 + t), t = exp(-|x|) <= 1. With v = t / (1 + t/2) and q = v^2
 *   log(1 + t) = 2 atanh(v/2) = v + v q c(q),
 * the polynomial's error below 4.6e-9 (0.08 * 2^-24) and 1.4e-18 (0.02 * 2^-53) relative to it. */
RF_INLINE vec softplus(vec x) {
    const vec t = exp_((vec)((ivec)x | isplat(RF_SIGN_BIT)));
    const vec v = t / fma_(splat((T)0.5), t, splat(1)), q = v * v;
#if RF_DOUBLE
    vec c = fma_(splat(0x1.5c3b5f01b6a03p-24), q, splat(0x1.55f2158b3830ap-23));
    c = fma_(c, q, splat(0x1.efc9d1e4f0901p-21));
    c = fma_(c, q, splat(0x1.1068a6a5afbdbp-18));
    c = fma_(c, q, splat(0x1.3b1dcb26668c9p-16));
    c = fma_(c, q, splat(0x1.745cb4b56c9f2p-14));
    c = fma_(c, q, splat(0x1.c71c7417e194dp-12));
    c = fma_(c, q, splat(0x1.2492492094035p-9));
    c = fma_(c, q, splat(0x1.99999999a06b1p-7));
    c = fma_(c, q, splat(0x1.5555555555535p-4));
#else
    vec c = fma_(splat(0x1.1ee9d6p-11f), q, splat(0x1.1eb84cp-9f));
    c = fma_(c, q, splat(0x1.99d26ep-7f));
    c = fma_(c, q, splat(0x1.5555p-4f));
#endif
    return max_keep((vec){0}, x) + fma_(v * q, c, v);
}

#endif
