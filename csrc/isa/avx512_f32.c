/* The float32 kernels for AVX-512 with FMA. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,fma"))),    \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,fma")
#endif
#define RF_BYTES 64
#define RF_DOUBLE 0
#define RF_ISA avx512
#include "../engine.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
