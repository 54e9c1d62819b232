/* simd.h: the vector type and its few operations; the only intrinsics of csrc.
 * Knows the isa and the precision, set by the including isa/ stub: RF_BYTES (bytes of a vector: 16,
 * 32 or 64) and RF_DOUBLE (0 or 1). Plain arithmetic (+ - * /, comparisons, integer shifts) is the
 * compiler's own on GNU vector types; here stands what C has no operator for. */
#ifndef RF_SIMD_H
#define RF_SIMD_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if RF_DOUBLE
typedef double T;
typedef int64_t T_int;
#else
typedef float T;
typedef int32_t T_int;
#endif

typedef T vec __attribute__((vector_size(RF_BYTES)));
typedef T_int ivec __attribute__((vector_size(RF_BYTES))); /* also masks: 0 or -1 in each lane */
typedef T vec_u __attribute__((vector_size(RF_BYTES), aligned(sizeof(T)), may_alias));

/* Lanes of a vector, and accumulators of a register tile: three quarters of the register file, the
 * rest for the factors of a term or its weights, whichever are fewer, and one of the others. */
enum { W = RF_BYTES / sizeof(T) };
#if RF_BYTES == 64 || defined(__aarch64__)
#define RF_ACCUMULATORS 24
#else
#define RF_ACCUMULATORS 12
#endif

#define RF_INLINE static inline __attribute__((always_inline))

RF_INLINE vec load(const T *p) { return (vec)(*(const vec_u *)p); }
RF_INLINE void store(T *p, vec v) { *(vec_u *)p = (vec_u)v; }
RF_INLINE vec splat(T s) { return s - (vec){0}; }
RF_INLINE ivec isplat(T_int s) { return s - (ivec){0}; }

/* One name for the intrinsics of both precisions: X(_mm512_fmadd) is _mm512_fmadd_ps or _pd. */
#define RF_JOIN_(a, b) a##b
#define RF_JOIN(a, b) RF_JOIN_(a, b)
#if RF_DOUBLE
#define RF_PS(name) RF_JOIN(name, _pd)
#else
#define RF_PS(name) RF_JOIN(name, _ps)
#endif

/* fma: a * b + c in one rounding; the base isa of x86 has none and rounds twice.
 * min_keep, max_keep: the limit, or x; a NaN in x stays (x86 returns its second operand then).
 * load_n, store_n: the first n lanes, 0 < n <= W; other lanes are zero, and never touched. */
#if RF_BYTES == 64
RF_INLINE vec fma_(vec a, vec b, vec c) { return RF_PS(_mm512_fmadd)(a, b, c); }
RF_INLINE vec min_keep(vec limit, vec x) { return RF_PS(_mm512_min)(limit, x); }
RF_INLINE vec max_keep(vec limit, vec x) { return RF_PS(_mm512_max)(limit, x); }
RF_INLINE vec sqrt_(vec x) { return RF_PS(_mm512_sqrt)(x); }
RF_INLINE vec load_n(const T *p, ptrdiff_t n) {
    return RF_PS(_mm512_maskz_loadu)((1u << n) - 1, p);
}
RF_INLINE void store_n(T *p, ptrdiff_t n, vec v) { RF_PS(_mm512_mask_storeu)(p, (1u << n) - 1, v); }
#elif RF_BYTES == 32
RF_INLINE vec fma_(vec a, vec b, vec c) { return RF_PS(_mm256_fmadd)(a, b, c); }
RF_INLINE vec min_keep(vec limit, vec x) { return RF_PS(_mm256_min)(limit, x); }
RF_INLINE vec max_keep(vec limit, vec x) { return RF_PS(_mm256_max)(limit, x); }
RF_INLINE vec sqrt_(vec x) { return RF_PS(_mm256_sqrt)(x); }
RF_INLINE ivec first_lanes(ptrdiff_t n) {
#if RF_DOUBLE
    return (ivec){0, 1, 2, 3} < isplat((T_int)n);
#else
    return (ivec){0, 1, 2, 3, 4, 5, 6, 7} < isplat((T_int)n);
#endif
}
RF_INLINE vec load_n(const T *p, ptrdiff_t n) {
    return RF_PS(_mm256_maskload)(p, (__m256i)first_lanes(n));
}
RF_INLINE void store_n(T *p, ptrdiff_t n, vec v) {
    RF_PS(_mm256_maskstore)(p, (__m256i)first_lanes(n), v);
}
#else
#if defined(__aarch64__)
#if RF_DOUBLE
RF_INLINE vec fma_(vec a, vec b, vec c) {
    return (vec)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
RF_INLINE vec sqrt_(vec x) { return (vec)vsqrtq_f64((float64x2_t)x); }
#else
RF_INLINE vec fma_(vec a, vec b, vec c) {
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
RF_INLINE vec sqrt_(vec x) { return (vec)vsqrtq_f32((float32x4_t)x); }
#endif
#else
RF_INLINE vec fma_(vec a, vec b, vec c) { return a * b + c; }
RF_INLINE vec sqrt_(vec x) { return RF_PS(_mm_sqrt)(x); }
#endif
/* A comparison with a NaN is false, so x is what stays. */
RF_INLINE vec min_keep(vec limit, vec x) {
    const ivec m = limit < x;
    return (vec)((m & (ivec)limit) | (~m & (ivec)x));
}
RF_INLINE vec max_keep(vec limit, vec x) {
    const ivec m = limit > x;
    return (vec)((m & (ivec)limit) | (~m & (ivec)x));
}
RF_INLINE vec load_n(const T *p, ptrdiff_t n) {
    vec v = {0};
    for (ptrdiff_t i = 0; i < n; i++) v[i] = p[i];
    return v;
}
RF_INLINE void store_n(T *p, ptrdiff_t n, vec v) {
    for (ptrdiff_t i = 0; i < n; i++) p[i] = v[i];
}
#endif

/* Lanes of a (0 to W-1) and of b (W to 2W-1), as the index says. */
#if defined(__clang__)
RF_INLINE vec shuffle(vec a, vec b, ivec index) {
    vec v;
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) v[i] = index[i] < W ? a[index[i]] : b[index[i] - W];
    return v;
}
#else
RF_INLINE vec shuffle(vec a, vec b, ivec index) { return __builtin_shuffle(a, b, index); }
#endif

/* Transposes W rows of W lanes: for s = 1, 2, 4 ... swaps, between rows s apart, the blocks of s
 * lanes off the diagonal. */
RF_INLINE void transpose(vec *rows) {
#pragma GCC unroll 4
    for (int s = 1; s < W; s *= 2) {
        ivec low = {0}, high = {0};
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) {
            low[i] = i & s ? W + i - s : i;
            high[i] = i & s ? W + i : i + s;
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) {
            if (i & s) continue;
            const vec a = rows[i], b = rows[i + s];
            rows[i] = shuffle(a, b, low);
            rows[i + s] = shuffle(a, b, high);
        }
    }
}

/* Lanes of a where the mask is set, of b elsewhere. */
RF_INLINE vec blend(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

/* What a loop over units wants: whole vectors by load and store, the last block by lanes. */
RF_INLINE vec load_lanes(const T *p, ptrdiff_t n) { return n >= W ? load(p) : load_n(p, n); }
RF_INLINE void store_lanes(T *p, ptrdiff_t n, vec v) {
    if (n >= W)
        store(p, v);
    else
        store_n(p, n, v);
}

/* memcpy of n numbers, for rows so short that a call would cost as much. */
RF_INLINE void copy(T *to, const T *from, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i += W) store_lanes(to + i, n - i, load_lanes(from + i, n - i));
}

#endif
