/* plan.h: how many workers a call gets; knows sizes, and what workers cost. */
#ifndef RF_PLAN_H
#define RF_PLAN_H

#include "kernels.h"

/* Operations worth a worker: some 10 us of one core, against 1 us to start a waiting worker and 10
 * us to wake a sleeping one. */
#define RF_WORKER_OPERATIONS 1e6
/* Numbers copied or drawn that are worth as much. */
#define RF_WORKER_NUMBERS (64 * 1024)

/* Costs of a step, in ns: a core's products per ns, bytes per ns that it reads from its own cache
 * of so many bytes and from what all cores share, and a barrier. */
#define RF_CORE_OPERATIONS 100.0
#define RF_CORE_BYTES (1024.0 * 1024.0)
#define RF_OWN_BANDWIDTH 60.0
#define RF_SHARED_BANDWIDTH 20.0
#define RF_BARRIER_NS 500.0
/* Rows at most of a call whose units are shared out: each worker keeps pointers to all rows. */
#define RF_UNITS_MOST_ROWS 512

/* How a call's work is shared out. */
typedef struct {
    int plan; /* rf_plan, but not auto */
    int workers;
    double step_ns; /* of a step of all rows and directions */
} layer_plan;

static inline double plan_step_ns(double operations, double bytes, int waits) {
    const double compute = operations / RF_CORE_OPERATIONS;
    const double read =
        bytes / (bytes < 0.9 * RF_CORE_BYTES ? RF_OWN_BANDWIDTH : RF_SHARED_BANDWIDTH);
    return compute + 0.5 * read + waits * RF_BARRIER_NS; /* half of the reading is hidden */
}

/* Blocks of the worker that has most, where whole groups of blocks are shared out, the last group
 * may be incomplete, and the last workers have one more than the others. */
static inline ptrdiff_t plan_largest(ptrdiff_t blocks, ptrdiff_t group, int workers) {
    const ptrdiff_t groups = (blocks + group - 1) / group, more = groups % workers;
    const ptrdiff_t fewer = groups / workers * group, missing = groups * group - blocks;
    if (more != 1) return more ? fewer + group : fewer;
    return fewer + group - missing > fewer ? fewer + group - missing : fewer;
}

/* For a call of so many steps and `passes` times the forward products (backward takes 2, and 1 to
 * recompute and to wait): with one worker for each 1e6 operations at most, rows are shared out or,
 * where a step is faster so, units, in groups of so many of their blocks, or the directions, of
 * which `sides` may run side by side. `waits`: barriers of a step of units; `bytes`: of the weights
 * that a step reads. */
static inline layer_plan plan_layer(const rf_shape *s, ptrdiff_t steps, const rf_run *run,
                                    int passes, ptrdiff_t blocks, ptrdiff_t group, int sides,
                                    int waits, double bytes) {
    const int threads = run->threads, D = s->directions;
    const ptrdiff_t groups = (blocks + group - 1) / group;
    const int by_rows = (int)(s->B < threads ? s->B : threads);
    const int by_units = (int)(groups < threads ? groups : threads);
    const int by_sides = sides < threads ? sides : threads;
    /* 4 gates, and an activation counted as 50 operations. */
    const ptrdiff_t h_size = s->P ? s->P : s->H;
    const double row = 4.0 * (double)s->H * (2.0 * (double)(s->I + h_size) + 50.0) +
                       2.0 * (double)s->P * (double)s->H;
    const double step = row * (double)s->B, all = passes * step * (double)steps * D;
    const double most_rows = by_rows > 1 ? (double)((s->B + by_rows - 1) / by_rows) : (double)s->B;
    const layer_plan serial = {RF_PLAN_SERIAL, 1, D * plan_step_ns(step, bytes, 0)};
    layer_plan plan = {RF_PLAN_BATCH, by_rows, D * plan_step_ns(row * most_rows, bytes, 0)};
    /* A worker goes through as many bytes as one alone would, but of one direction. */
    const layer_plan directions = {RF_PLAN_DIRECTIONS, by_sides, serial.step_ns / by_sides};
    const int automatic = run->plan == RF_PLAN_AUTO;
    if (by_sides > 1 &&
        (run->plan == RF_PLAN_DIRECTIONS || (automatic && directions.step_ns <= plan.step_ns)))
        plan = directions;
    if (by_units > 1 && s->B <= RF_UNITS_MOST_ROWS) {
        const double share = (double)plan_largest(blocks, group, by_units) / (double)blocks;
        const layer_plan units = {RF_PLAN_UNITS, by_units,
                                  D * plan_step_ns(step * share, bytes * share, waits)};
        /* Where it is a close thing, workers that need not wait for each other are better off. */
        if (run->plan == RF_PLAN_UNITS || (automatic && units.step_ns < 0.9 * plan.step_ns))
            plan = units;
    }
    if (automatic && all < RF_WORKER_OPERATIONS * plan.workers) {
        plan.step_ns *= plan.workers;
        plan.workers = (int)(all / RF_WORKER_OPERATIONS);
        if (plan.workers > 1) plan.step_ns /= plan.workers;
    }
    return run->plan == RF_PLAN_SERIAL || plan.workers <= 1 ? serial : plan;
}

/* Workers for a pass over so many numbers. */
static inline int plan_pass(ptrdiff_t numbers, const rf_run *run) {
    const ptrdiff_t most = numbers / RF_WORKER_NUMBERS;
    if (run->plan == RF_PLAN_SERIAL || most < 1) return 1;
    return most < run->threads ? (int)most : run->threads;
}

#endif
