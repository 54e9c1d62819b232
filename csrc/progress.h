/* progress.h: lets a long call be ended from outside; knows time and the caller's poll, nothing
 * else. Worker 0 counts the operations ahead of it and asks the caller's poll every
 * RF_POLL_SECONDS; once that says stop, every worker runs through the rest of its loops (and
 * barriers) without computing. */
#ifndef RF_PROGRESS_H
#define RF_PROGRESS_H

#include <stdatomic.h>
#include <stddef.h>
#include <time.h>

#include "kernels.h"
#include "pool.h"

#define RF_POLL_SECONDS 0.02
/* Operations between two looks at the clock (some 30 ns): below 10 ms even at 1 GFLOP/s. */
#define RF_POLL_OPERATIONS 1e7

typedef struct {
    _Atomic int stop;
    rf_poll poll;
    void *context;
} stop_flag;

typedef struct {
    stop_flag *flag;
    rf_team *team;
    int polls; /* this worker asks */
    double operations, next_poll;
} progress;

static inline double progress_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static inline stop_flag stop_flag_make(const rf_run *run) {
    return (stop_flag){.poll = run->poll, .context = run->poll_context};
}

/* Runs the workers of a call and notes what ran; nonzero if the call was ended early. */
static inline int run_workers(rf_run *run, int plan, int threads,
                              void (*work)(void *, rf_team *, int), void *call, stop_flag *flag) {
    run->ran_threads = rf_pool_run(threads, work, call);
    run->ran_plan = run->ran_threads > 1 ? plan : RF_PLAN_SERIAL;
    return atomic_load(&flag->stop) || run->ran_threads == 0;
}

static inline progress progress_start(stop_flag *flag, rf_team *team, int worker) {
    return (progress){.flag = flag, .team = team, .polls = worker == 0 && flag->poll};
}

/* Whether to skip what comes next, which takes about that many operations. */
static inline int stopped(progress *at, ptrdiff_t operations) {
    if (atomic_load_explicit(&at->flag->stop, memory_order_relaxed)) return 1;
    if (!at->polls) return 0;
    at->operations += (double)operations;
    if (at->operations < RF_POLL_OPERATIONS) return 0;
    at->operations = 0;
    const double now = progress_clock();
    if (now < at->next_poll) return 0;
    const int first = at->next_poll == 0;
    at->next_poll = now + RF_POLL_SECONDS;
    if (first || !rf_team_call_host(at->team, at->flag->poll, at->flag->context)) return 0;
    atomic_store_explicit(&at->flag->stop, 1, memory_order_relaxed);
    return 1;
}

#endif
