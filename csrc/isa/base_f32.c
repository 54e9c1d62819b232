/* The float32 kernels for 16-byte vectors: SSE2 on x86-64, NEON on aarch64. */
#define RF_BYTES 16
#define RF_DOUBLE 0
#define RF_ISA base
#include "../engine.inc"
