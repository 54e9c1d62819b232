/* pool.h: worker threads and the barrier between steps.
 * Knows threads, nothing of what they compute. One pool per process, made on first use, remade
 * after fork. */
#ifndef RF_POOL_H
#define RF_POOL_H

typedef struct rf_team rf_team; /* the workers of one region */

/* Runs work(arg, team, worker) on workers 0..n-1, worker 0 being the caller, and returns n when all
 * are done. 1 <= n <= threads; n is less than `threads` when the pool is busy with another caller's
 * region (then n = 1), when a thread could not be made, and above 256: so work must read
 * rf_team_size(). Returns 0 in one case: work was void, because the caller itself forked in it (a
 * signal handler run by poll may) and this is the child, which has no other workers. Denormals are
 * flushed inside, and the caller's floating-point mode is restored after. */
int rf_pool_run(int threads, void (*work)(void *arg, rf_team *team, int worker), void *arg);

int rf_team_size(const rf_team *team);

/* Returns once all workers of the team have called it: spins, then yields, then sleeps. What they
 * wrote before it is seen by all after it. */
void rf_team_barrier(rf_team *team);

/* For worker 0 only: call(context) in the floating-point mode of rf_pool_run's caller, as code of
 * the host (a poll that runs Python's signal handlers) must see it; returns its answer. */
int rf_team_call_host(rf_team *team, int (*call)(void *), void *context);

/* Another runtime's threads, as GNU OpenMP's, and whoever speaks its language, starts and counts
 * them: GOMP_parallel, omp_get_thread_num and omp_get_num_threads. */
typedef struct {
    void (*parallel)(void (*work)(void *), void *data, unsigned threads, unsigned flags);
    int (*thread)(void);
    int (*threads)(void);
} rf_host_threads;

/* From now on regions run on the host's threads, until a fork, or on our own if all are NULL. In a
 * program whose other parts compute with such threads, these spin between their regions, and would
 * fight with ours for the cores. Returns 0, with nothing done, while a region runs. */
int rf_pool_use(const rf_host_threads *host);

/* A pause of a thread that spins, some 10 to 50 ns. */
static inline void rf_relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory"); /* `yield` is no more than a nop on most cores */
#endif
}

/* Cores that this process may run on, at least 1. */
int rf_cpu_count(void);

#endif
