/* dropout.h: the counter-based generator of dropout masks, and of what is drawn in a closed loop;
 * see `dropout_mask` and `uniform` in reference.py.
 * An element's fate is a function of (key, t, b, unit) alone, so it is the same for any number of
 * threads, any plan and any split of the batch. */
#ifndef RF_DROPOUT_H
#define RF_DROPOUT_H

#include <stdint.h>

/* The finaliser of splitmix64 (Steele, Lea and Flood 2014) over the next counter. */
static inline uint64_t dropout_mix(uint64_t z) {
    z += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94D049BB133111EB);
    return z ^ (z >> 31);
}

static inline uint64_t dropout_row(uint64_t key, uint64_t t, uint64_t b) {
    return dropout_mix(key + (t << 32 | b));
}

/* p in units of 2^-53, rounded up. */
static inline uint64_t dropout_limit(double p) {
    const double limit = p * 0x1p53;
    const uint64_t whole = (uint64_t)limit;
    return whole + ((double)whole < limit);
}

/* Keeps if a uniform number in [0, 1) of 53 bits is not below p. */
static inline int dropout_keeps(uint64_t row, uint64_t unit, uint64_t limit) {
    return dropout_mix(row + unit) >> 11 >= limit;
}

/* A number of 53 bits in [0, 1). */
static inline double dropout_uniform(uint64_t row, uint64_t unit) {
    return (double)(dropout_mix(row + unit) >> 11) * 0x1p-53;
}

#endif
