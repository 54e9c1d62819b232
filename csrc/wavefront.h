/* wavefront.h: layers one upon another, computed side by side.
 * Knows a table of kernels and that calls may be cut in slices of their steps; nothing of cells. */
#ifndef RF_WAVEFRONT_H
#define RF_WAVEFRONT_H

#include "kernels.h"

#define RF_WAVE_BYTES 64

typedef struct {
    const rf_kernels *kernels;
    /* [n] All steps of each layer, in one direction, the lowest first. The x of each is the y of
     * the one below; T and B, at least 1, and lengths are those of all. Each has a workspace of its
     * own for one thread; their `run` is not read. */
    rf_forward_args *layers;
    int n;
    ptrdiff_t steps;                      /* of a slice, from rf_wavefront_steps */
    ptrdiff_t gates_step, h_step, c_step; /* numbers of a step in a tape's gates, h and c */
    void *progress;                       /* n * RF_WAVE_BYTES bytes, 64-byte aligned */
    rf_run run;
} rf_wavefront_args;

/* Steps of a slice; 0: the layers are faster one after the other. Shapes of the lowest layer and of
 * the n - 1 others. */
ptrdiff_t rf_wavefront_steps(const rf_kernels *kernels, const rf_shape *lowest,
                             const rf_shape *others, int n, const rf_run *run);

/* What the layers' calls would compute one after the other, to the bit. Nonzero: ended early. */
int rf_wavefront(rf_wavefront_args *args);

#endif
