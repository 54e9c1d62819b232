/* pool.c: the workers, the barrier, and the floating-point mode they run in.
 * Knows POSIX threads, C11 atomics and how GNU OpenMP starts a region; nothing of what the workers
 * compute.
 * Leaves to its callers how many workers a call deserves, and which part is whose. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* sched_getaffinity */
#endif

#include "pool.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdalign.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

/* A core's cache line; on the machines where it is 128 bytes, two of these share one. */
#define LINE 64

#define MAX_WORKERS 256

/* Kernels keep less than 16 KiB on the stack, even under ASan; the rest is for the thread-local
 * storage of the host's libraries, which glibc takes from the stack. Pages that nobody touches cost
 * address space alone. */
#define STACK_BYTES (512 * 1024)

/* How long a thread waits, from the start of the wait. It spins for SPIN_NS (not at all in a team
 * larger than the number of cores: whoever it waits for may need this one), then gives the core
 * away by sched_yield, and at last sleeps. An idle worker has a short time until then, to be gone
 * when the host computes something else; it is longer than what Python needs between two calls.
 * At a barrier the others are known to be on their way, and to be woken costs tens of us. */
#define SPIN_NS 2000
#define IDLE_NS 100000
#define BARRIER_NS 1000000

/* --- Floating-point mode ---------------------------------------------------------------------
 * Of the kernels: round to nearest, no traps, denormals count as zero. */
#if defined(__x86_64__)
typedef unsigned fp_mode;
static inline fp_mode fp_get(void) { return _mm_getcsr(); }
static inline void fp_set(fp_mode mode) { _mm_setcsr(mode); }
#define FP_KERNEL 0x9fc0u /* MXCSR: FTZ, all six exceptions masked, DAZ */
#elif defined(__aarch64__)
typedef struct {
    uint64_t control, status;
} fp_mode;
static inline fp_mode fp_get(void) {
    fp_mode mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode.control)::"memory");
    __asm__ volatile("mrs %0, fpsr" : "=r"(mode.status)::"memory");
    return mode;
}
static inline void fp_set(fp_mode mode) {
    __asm__ volatile("msr fpcr, %0" ::"r"(mode.control) : "memory");
    __asm__ volatile("msr fpsr, %0" ::"r"(mode.status) : "memory");
}
#define FP_KERNEL ((fp_mode){UINT64_C(1) << 24, 0}) /* FPCR: FZ */
#else
typedef int fp_mode; /* no such mode known here: denormals are slow, and right */
static inline fp_mode fp_get(void) { return 0; }
static inline void fp_set(fp_mode mode) { (void)mode; }
#define FP_KERNEL 0
#endif

/* --- Waiting --------------------------------------------------------------------------------- */

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Opens once after another; threads wait for the next time. */
typedef struct {
    alignas(LINE) atomic_uint opened; /* how many times, modulo 2^32 */
    atomic_int sleepers;
    pthread_mutex_t mutex; /* of the condition; guards no data */
    pthread_cond_t changed;
} gate;

#define GATE_INITIALIZER {.mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER}

/* Either the opener sees the sleeper's count or the sleeper sees the opening: hence the sequential
 * consistency of these four accesses. A sleeper that was counted holds the mutex until it waits. */
static void gate_open(gate *g) {
    atomic_fetch_add(&g->opened, 1);
    if (atomic_load(&g->sleepers) == 0) return;
    pthread_mutex_lock(&g->mutex);
    pthread_cond_broadcast(&g->changed);
    pthread_mutex_unlock(&g->mutex);
}

static void gate_sleep(gate *g, unsigned seen) {
    pthread_mutex_lock(&g->mutex);
    atomic_fetch_add(&g->sleepers, 1);
    while (atomic_load(&g->opened) == seen) pthread_cond_wait(&g->changed, &g->mutex);
    atomic_fetch_sub(&g->sleepers, 1);
    pthread_mutex_unlock(&g->mutex);
}

static inline int gate_moved(gate *g, unsigned seen) {
    return atomic_load_explicit(&g->opened, memory_order_acquire) != seen;
}

/* Returns once the gate has opened since it had opened `seen` times. */
static void gate_wait(gate *g, unsigned seen, int64_t spin_ns, int64_t awake_ns) {
    int64_t start = 0, waited = 0;
    while (waited < awake_ns) {
        if (waited < spin_ns) {
            /* The clock is read seldom: 32 pauses are 0.3 to 1.5 us. */
            for (int i = 0; i < 32; i++) {
                if (gate_moved(g, seen)) return;
                rf_relax();
            }
        } else {
            if (gate_moved(g, seen)) return;
            sched_yield();
        }
        const int64_t now = now_ns();
        if (start == 0) start = now;
        waited = now - start;
    }
    gate_sleep(g, seen);
}

/* --- The team and its barrier ---------------------------------------------------------------- */

struct rf_team {
    int size;
    int64_t spin_ns;
    fp_mode host_mode;                /* worker 0's, outside the region */
    alignas(LINE) atomic_int missing; /* workers that the barrier waits for */
    gate passed;
};

int rf_team_size(const rf_team *team) { return team->size; }

/* True for the last worker of the team to arrive. The others touch nothing of the team after it. */
static int arrive(rf_team *team) {
    const int size = team->size;
    if (atomic_fetch_sub_explicit(&team->missing, 1, memory_order_acq_rel) != 1) return 0;
    atomic_store_explicit(&team->missing, size, memory_order_relaxed);
    gate_open(&team->passed);
    return 1;
}

void rf_team_barrier(rf_team *team) {
    if (team->size == 1) return;
    const unsigned seen = atomic_load_explicit(&team->passed.opened, memory_order_relaxed);
    if (!arrive(team)) gate_wait(&team->passed, seen, team->spin_ns, BARRIER_NS);
}

int rf_team_call_host(rf_team *team, int (*call)(void *), void *context) {
    fp_set(team->host_mode);
    const int answer = call(context);
    team->host_mode = fp_get();
    fp_set(FP_KERNEL);
    return answer;
}

/* --- The pool -------------------------------------------------------------------------------- */

/* Worker n sleeps at start[n] between regions. A worker exists until the process ends: detached,
 * and holding nothing then. */
static struct {
    atomic_int busy; /* taken by the caller whose region this is; the rest is that caller's */
    int usable;      /* fork is watched */
    int workers;     /* that exist, worker 0 (any caller) included */
    int cores;
    unsigned forks; /* between this process and the one that loaded the library */
    void (*work)(void *arg, rf_team *team, int worker);
    void *arg;
    rf_team team;
    gate start[MAX_WORKERS];
    rf_host_threads host; /* whose threads are the workers; all NULL: our own */
    atomic_uint regions;  /* of the host's, whose team has its size */
    jmp_buf out;          /* of a region of the host's, for a child that forked in it */
} pool;

static const gate closed_gate = GATE_INITIALIZER;

static void *worker_main(void *number) {
    const int worker = (int)(intptr_t)number;
    int64_t spin_ns = SPIN_NS;
    fp_set(FP_KERNEL);
    for (unsigned regions = 0;; regions++) {
        gate_wait(&pool.start[worker], regions, spin_ns, IDLE_NS);
        spin_ns = pool.team.spin_ns;
        pool.work(pool.arg, &pool.team, worker);
        arrive(&pool.team);
    }
    return NULL;
}

static int make_thread(int worker) {
    pthread_t thread;
    pthread_attr_t attributes;
    if (pthread_attr_init(&attributes)) return 0;
    size_t usual_stack;
    void *const number = (void *)(intptr_t)worker;
    pthread_attr_getstacksize(&attributes, &usual_stack);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    int error = pthread_create(&thread, &attributes, worker_main, number);
    if (error == EINVAL) { /* a host with more thread-local storage than that */
        pthread_attr_setstacksize(&attributes, usual_stack);
        error = pthread_create(&thread, &attributes, worker_main, number);
    }
    pthread_attr_destroy(&attributes);
    return error == 0;
}

/* Makes the missing ones of `threads` workers; there may be fewer of them afterwards. The host's
 * signal handlers run in the host's threads: workers are born with its signals blocked, those aside
 * that tell of a worker's own fault. */
static void grow(int threads) {
    sigset_t blocked, previous;
    sigfillset(&blocked);
    const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS};
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&blocked, faults[i]);
    pool.cores = rf_cpu_count();
    if (pthread_sigmask(SIG_SETMASK, &blocked, &previous)) return;
    while (pool.workers < threads) {
        pool.start[pool.workers] = closed_gate;
        if (!make_thread(pool.workers)) break;
        pool.workers++;
    }
    pthread_sigmask(SIG_SETMASK, &previous, NULL);
}

/* In the child of a fork only the thread that forked lives on, and the pool may have been in any
 * state. If that thread is in a region (its poll forked), size 1 lets it through the barriers. */
static void after_fork_in_child(void) {
    pool.forks++;
    pool.workers = 1;
    pool.team.size = 1;
    pool.team.passed = closed_gate;
    pool.host =
        (rf_host_threads){NULL, NULL, NULL}; /* its threads have gone, and it may not know */
    atomic_store(&pool.busy, 0);
}

__attribute__((constructor)) static void pool_load(void) {
    pool.workers = 1;
    pool.usable = pthread_atfork(NULL, NULL, after_fork_in_child) == 0;
}

static int run_alone(void (*work)(void *arg, rf_team *team, int worker), void *arg) {
    rf_team team;
    team.size = 1;
    team.host_mode = fp_get();
    fp_set(FP_KERNEL);
    work(arg, &team, 0);
    fp_set(team.host_mode);
    return 1;
}

int rf_pool_use(const rf_host_threads *host) {
    int idle = 0;
    if (!atomic_compare_exchange_strong(&pool.busy, &idle, 1)) return 0;
    pool.host = *host;
    pool.cores = rf_cpu_count();
    atomic_store(&pool.busy, 0);
    return 1;
}

/* One thread of the host's in a region of ours. How many there are, it decides as it starts them.
 */
static void host_worker(void *before) {
    const unsigned region = *(const unsigned *)before + 1;
    const unsigned forks = pool.forks;
    const int worker = pool.host.thread();
    rf_team *const team = &pool.team;
    if (worker == 0) {
        team->size = pool.host.threads();
        team->spin_ns = team->size <= pool.cores ? SPIN_NS : 0;
        atomic_store_explicit(&team->missing, team->size, memory_order_relaxed);
        atomic_store_explicit(&pool.regions, region, memory_order_release);
    }
    while (atomic_load_explicit(&pool.regions, memory_order_acquire) != region) sched_yield();
    const fp_mode mode = fp_get();
    if (worker == 0) team->host_mode = mode;
    fp_set(FP_KERNEL);
    pool.work(pool.arg, team, worker);
    fp_set(worker == 0 ? team->host_mode : mode);
    /* In a child, which has no other workers, the host would wait for them to its end. */
    if (worker == 0 && pool.forks != forks) longjmp(pool.out, 1);
}

/* A region on the host's threads; returns as rf_pool_run. */
static int run_on_host(int threads) {
    const unsigned before = atomic_load_explicit(&pool.regions, memory_order_relaxed);
    if (setjmp(pool.out)) return 0;
    pool.host.parallel(host_worker, (void *)&before, (unsigned)threads, 0);
    const int ran = pool.team.size;
    pool.team.size = 1;
    atomic_store_explicit(&pool.busy, 0, memory_order_release);
    return ran;
}

int rf_pool_run(int threads, void (*work)(void *arg, rf_team *team, int worker), void *arg) {
    if (threads <= 1 || !pool.usable) return run_alone(work, arg);
    int idle = 0;
    if (!atomic_compare_exchange_strong_explicit(&pool.busy, &idle, 1, memory_order_acquire,
                                                 memory_order_relaxed))
        return run_alone(work, arg);

    if (threads > MAX_WORKERS) threads = MAX_WORKERS;
    if (pool.host.parallel) {
        pool.work = work;
        pool.arg = arg;
        return run_on_host(threads);
    }
    if (threads > pool.workers) grow(threads);
    if (threads > pool.workers) threads = pool.workers;
    if (threads == 1) {
        atomic_store_explicit(&pool.busy, 0, memory_order_release);
        return run_alone(work, arg);
    }

    const unsigned forks = pool.forks;
    rf_team *const team = &pool.team;
    team->size = threads;
    team->spin_ns = threads <= pool.cores ? SPIN_NS : 0;
    atomic_store_explicit(&team->missing, threads, memory_order_relaxed);
    pool.work = work;
    pool.arg = arg;
    for (int worker = 1; worker < threads; worker++) gate_open(&pool.start[worker]);

    team->host_mode = fp_get();
    fp_set(FP_KERNEL);
    work(arg, team, 0);
    rf_team_barrier(team);
    fp_set(team->host_mode);
    if (pool.forks != forks) return 0;
    /* What a caller that forked in its region finds after further regions in the child. */
    team->size = 1;
    atomic_store_explicit(&pool.busy, 0, memory_order_release);
    return threads;
}

/* A cgroup's quota is not looked at: it is a share of time and no set of cores, it can change at
 * any moment, and short calls are well served by all cores of a process that is otherwise idle. */
int rf_cpu_count(void) {
#if defined(__linux__)
    for (int most = 1024; most <= 1024 * 1024; most *= 2) {
        cpu_set_t *const set = CPU_ALLOC(most);
        if (set == NULL) break;
        const size_t bytes = CPU_ALLOC_SIZE(most);
        const int found = sched_getaffinity(0, bytes, set) == 0 ? CPU_COUNT_S(bytes, set) : 0;
        CPU_FREE(set);
        if (found > 0) return found;
    }
#endif
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int)online : 1;
}
