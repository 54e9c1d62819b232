/* The float64 kernels for AVX2 with FMA. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define RF_BYTES 32
#define RF_DOUBLE 1
#define RF_ISA avx2
#include "../engine.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
