/* vmath.h: exp, sigmoid and tanh on vectors.
 * Knows simd.h; needs no libm. (First version: final polynomials and bounds follow.) */
#ifndef RF_VMATH_H
#define RF_VMATH_H

#include "simd.h"

#if RF_DOUBLE
#define RF_MANTISSA 52
#define RF_MAGIC (0x1.8p52 + 1023)
#define RF_LOG2E 0x1.71547652b82fep+0
#define RF_LN2_HI 0x1.62e42ff000000p-1
#define RF_LN2_LO -0x1.718432a1b0e26p-35
#define RF_SIGMOID_LIMIT 708.5
#define RF_TANH_LIMIT 20.0
#define RF_SIGN ((T_int)1 << 63)
#else
#define RF_MANTISSA 23
#define RF_MAGIC (0x1.8p23f + 127)
#define RF_LOG2E 0x1.715476p+0f
#define RF_LN2_HI 0x1.62ep-1f
#define RF_LN2_LO 0x1.0bfbe8p-15f
#define RF_SIGMOID_LIMIT 88.0f
#define RF_TANH_LIMIT 9.1f
#define RF_SIGN ((T_int)1 << 31)
#endif

RF_INLINE vec halfcoth(vec r) { /* (r/2) coth(r/2) */
    const vec y = r * r * splat((T)0.25);
#if RF_DOUBLE
    vec e = splat(0x1.63487e5962925p-16);
    e = fma_(e, y, splat(-0x1.bbd3a9a9635e6p-13));
    e = fma_(e, y, splat(0x1.1566aac01c653p-9));
    e = fma_(e, y, splat(-0x1.6c16c16bd9dddp-6));
    e = fma_(e, y, splat(0x1.555555555552dp-2));
#else
    vec e = splat(-0x1.6a8bfap-6f);
    e = fma_(e, y, splat(0x1.555514p-2f));
#endif
    return fma_(e, y, splat(1));
}

RF_INLINE vec exp_(vec x) {
#if RF_DOUBLE
    const vec z = min_keep(splat(710), max_keep(splat(-709), x));
#else
    const vec z = min_keep(splat(89), max_keep(splat(-88), x));
#endif
    const vec t = fma_(z, splat(RF_LOG2E), splat(RF_MAGIC));
    const vec k = t - splat(RF_MAGIC);
    const vec r = fma_(k, splat(-RF_LN2_LO), fma_(k, splat(-RF_LN2_HI), z));
    const vec e = halfcoth(r), h = r * splat((T)0.5);
    const vec half = splat((T)0.5) * k, t1 = half + splat(RF_MAGIC),
              t2 = (k - (t1 - splat(RF_MAGIC))) + splat(RF_MAGIC);
    return (e + h) / (e - h) * (vec)((ivec)t1 << RF_MANTISSA) * (vec)((ivec)t2 << RF_MANTISSA);
}

RF_INLINE vec sigmoid(vec x) {
    const vec z = min_keep(splat(RF_SIGMOID_LIMIT), max_keep(splat(-RF_SIGMOID_LIMIT), x));
    const vec t = fma_(z, splat(-RF_LOG2E), splat(RF_MAGIC));
    const vec k = t - splat(RF_MAGIC);
    const vec r = fma_(k, splat(RF_LN2_LO), fma_(k, splat(RF_LN2_HI), z));
    const vec s = (vec)((ivec)t << RF_MANTISSA);
    const vec e = halfcoth(r), h = r * splat((T)0.5);
    return (e + h) / fma_(s, e - h, e + h);
}

RF_INLINE vec tanh_(vec x) {
    const vec a = min_keep(splat(RF_TANH_LIMIT), (vec)((ivec)x & isplat(~RF_SIGN)));
    const vec t = fma_(a, splat(2 * RF_LOG2E), splat(RF_MAGIC));
    const vec k = t - splat(RF_MAGIC);
    const vec u = fma_(k, splat(-RF_LN2_LO / 2), fma_(k, splat(-RF_LN2_HI / 2), a));
    const vec s = (vec)((ivec)t << RF_MANTISSA);
    const vec e = halfcoth(u + u);
#if RF_DOUBLE
    const vec m = s - 1, p = s + 1;
    const vec v = fma_(m, e, p * u) / fma_(p, e, m * u);
#else
    const vec d = e - u, y = a * a;
    const vec big = 1 - (d + d) / fma_(s, e + u, d);
    vec c = splat(-0.00570498872745f);
    c = fma_(c, y, splat(0.0206390887954f));
    c = fma_(c, y, splat(-0.0537397155531f));
    c = fma_(c, y, splat(0.133314422036f));
    c = fma_(c, y, splat(-0.333332819422f));
    const vec v = blend(a < splat(0.625f), fma_(c, a * y, a), big);
#endif
    return (vec)((ivec)v | ((ivec)x & isplat(RF_SIGN)));
}

#endif
