/* plan.h: how many workers a call gets; knows sizes, and what workers cost. */
#ifndef RF_PLAN_H
#define RF_PLAN_H

#include "kernels.h"

/* Operations worth a worker: some 10 us of one core, against 1 us to start a waiting worker and 10
 * us to wake a sleeping one. */
#define RF_WORKER_OPERATIONS 1e6
/* Numbers copied or drawn that are worth as much. */
#define RF_WORKER_NUMBERS (64 * 1024)

/* Workers for one call of so many steps and `passes` times the forward products (backward takes 2,
 * and 1 to recompute and to wait). No more than rows: a worker owns whole rows. */
static inline int plan_workers(const rf_shape *s, ptrdiff_t steps, const rf_run *run, int passes) {
    ptrdiff_t most = run->threads < s->B ? run->threads : s->B;
    if (run->plan == RF_PLAN_AUTO) {
        /* 4 gates, and an activation counted as 50 operations. */
        const double row = 4.0 * (double)s->H * (2.0 * (double)(s->I + s->H) + 50.0);
        const double all = passes * row * (double)steps * (double)s->B * s->directions;
        if (all < RF_WORKER_OPERATIONS * (double)most)
            most = (ptrdiff_t)(all / RF_WORKER_OPERATIONS);
    }
    return run->plan == RF_PLAN_SERIAL || most < 1 ? 1 : (int)most;
}

/* Workers for a pass over so many numbers. */
static inline int plan_pass(ptrdiff_t numbers, const rf_run *run) {
    const ptrdiff_t most = numbers / RF_WORKER_NUMBERS;
    if (run->plan == RF_PLAN_SERIAL || most < 1) return 1;
    return most < run->threads ? (int)most : run->threads;
}

#endif
