/* dispatch.c: which kernels this CPU runs.
 * Knows the names of the tables that csrc/isa/ defines, and what each isa asks of a CPU.
 * Leaves the choice among them, and the environment, to the caller. */
#include "kernels.h"

#include <string.h>

extern const rf_kernels rf_kernels_base_f32, rf_kernels_base_f64;

static int always(void) { return 1; }

#if defined(__x86_64__)
extern const rf_kernels rf_kernels_avx2_f32, rf_kernels_avx2_f64;
extern const rf_kernels rf_kernels_avx512_f32, rf_kernels_avx512_f64;

/* The builtins ask the operating system too, by XGETBV, whether it keeps the wide registers. */
static int has_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
}
#endif

/* Weakest first, as in rf_isas. */
static const struct {
    int (*runs_here)(void);
    const rf_kernels *kernels[RF_N_DTYPES];
} tables[] = {
    {always, {&rf_kernels_base_f32, &rf_kernels_base_f64}},
#if defined(__x86_64__)
    {has_avx2, {&rf_kernels_avx2_f32, &rf_kernels_avx2_f64}},
    {has_avx512, {&rf_kernels_avx512_f32, &rf_kernels_avx512_f64}},
#endif
};

#define N_ISAS ((int)(sizeof tables / sizeof *tables))

const char *const rf_isas[] = {
    "base",
#if defined(__x86_64__)
    "avx2",
    "avx512",
#endif
    NULL,
};

_Static_assert(sizeof rf_isas / sizeof *rf_isas == N_ISAS + 1, "a name for each table, and NULL");

const rf_kernels *rf_find_kernels(const char *isa, rf_dtype dtype) {
    if (isa == NULL || (unsigned)dtype >= RF_N_DTYPES) return NULL;
    const int best = strcmp(isa, "auto") == 0;
    for (int i = N_ISAS - 1; i >= 0; i--)
        if ((best || strcmp(isa, rf_isas[i]) == 0) && tables[i].runs_here())
            return tables[i].kernels[dtype];
    return NULL;
}
