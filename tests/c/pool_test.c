/* pool_test.c: csrc/pool.c by itself: regions, barriers, nesting, fork, signals, the floating-point
 * mode. Knows csrc/pool.h. Compiled with the pool's pthread_create renamed, so that threads can
 * fail to start. Usage: pool_test [regions, default 100000] [nofork]; "time" instead prints what a
 * region costs. */
#if defined(__linux__)
#define _GNU_SOURCE /* sched_setaffinity */
#endif
#include "../../csrc/pool.h"

#include <fenv.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MOST 8

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

static atomic_int threads_allowed = 1000000;

int pool_test_pthread_create(pthread_t *thread, const pthread_attr_t *attributes,
                             void *(*start)(void *), void *arg) {
    if (atomic_fetch_sub(&threads_allowed, 1) <= 0) return 11; /* EAGAIN */
    return pthread_create(thread, attributes, start, arg);
}

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* --- Every worker once, and barriers that hold. Plain memory: TSan sees a barrier that does not.
 */
typedef struct {
    int phases;
    int size;
    int at[MOST];
    int runs[MOST];
} steps;

static void step(void *arg, rf_team *team, int worker) {
    steps *const s = arg;
    const int size = rf_team_size(team);
    if (worker == 0) s->size = size;
    s->runs[worker]++;
    for (int phase = 1; phase <= s->phases; phase++) {
        s->at[worker] = phase;
        rf_team_barrier(team);
        for (int other = 0; other < size; other++) CHECK(s->at[other] == phase);
        rf_team_barrier(team);
    }
}

static int run_steps(int threads, int phases) {
    steps s = {.phases = phases};
    const int ran = rf_pool_run(threads, step, &s);
    CHECK(ran >= 1 && ran <= (threads < 1 ? 1 : threads));
    CHECK(s.size == ran);
    for (int worker = 0; worker < MOST; worker++) {
        CHECK(s.runs[worker] == (worker < ran));
        CHECK(s.at[worker] == (worker < ran ? phases : 0));
    }
    return ran;
}

static void test_sizes(void) {
    for (int threads = -1; threads <= MOST; threads++)
        for (int phases = 0; phases < 20; phases++)
            CHECK(run_steps(threads, phases) == (threads < 1 ? 1 : threads));
}

static void test_many_regions(int regions) {
    for (int i = 0; i < regions; i++) CHECK(run_steps(2 + (i & 1), i % 3) == 2 + (i & 1));
    for (int i = 0; i < regions / 100; i++) CHECK(run_steps(MOST, i % 3) == MOST);
}

static void test_sleepers_wake(void) {
    for (int i = 0; i < 50; i++) {
        const struct timespec pause = {.tv_nsec = (i % 5) * 50000};
        nanosleep(&pause, NULL);
        CHECK(run_steps(1 + i % MOST, 2) == 1 + i % MOST);
    }
}

static void late(void *arg, rf_team *team, int worker) {
    const struct timespec pause = {.tv_nsec =
                                       5000000}; /* past the time that the others stay awake */
    for (int turn = 0; turn < rf_team_size(team); turn++) {
        if (turn == worker) nanosleep(&pause, NULL);
        rf_team_barrier(team);
    }
    if (worker == rf_team_size(team) - 1) nanosleep(&pause, NULL);
    atomic_fetch_add((atomic_int *)arg, 1);
}

static void test_late_workers(void) {
    atomic_int done = 0;
    CHECK(rf_pool_run(4, late, &done) == 4 && atomic_load(&done) == 4);
}

static void limits(void *arg, rf_team *team, int worker) {
    (void)worker;
    atomic_fetch_add((atomic_int *)arg, 1);
    rf_team_barrier(team);
}

static void test_limits(void) {
    atomic_int done = 0;
    const int ran = rf_pool_run(2000000000, limits, &done);
    CHECK(ran > MOST && ran <= 256 && atomic_load(&done) == ran);
}

/* --- Callers at once, and calls inside calls. */
static void nest(void *arg, rf_team *team, int worker) {
    (void)arg, (void)worker;
    const int ran = run_steps(4, 1);
    CHECK(rf_team_size(team) == 1 || ran == 1);
    rf_team_barrier(team);
}

static void *caller(void *arg) {
    for (int i = 0; i < *(int *)arg; i++) {
        run_steps(1 + i % 4, 2);
        if (i % 8 == 0) rf_pool_run(3, nest, NULL);
    }
    return NULL;
}

static void test_many_callers(int regions) {
    pthread_t callers[6];
    int calls = regions / 100 + 10;
    for (int i = 0; i < 6; i++) CHECK(pthread_create(&callers[i], NULL, caller, &calls) == 0);
    caller(&calls);
    for (int i = 0; i < 6; i++) CHECK(pthread_join(callers[i], NULL) == 0);
}

/* --- Threads that cannot be made. */
static void test_no_threads(void) {
    atomic_store(&threads_allowed, 0);
    CHECK(run_steps(MOST, 3) == 1);
    atomic_store(&threads_allowed, 3);
    CHECK(run_steps(MOST, 3) == 4);
    CHECK(run_steps(2, 3) == 2);
    atomic_store(&threads_allowed, 1000000);
    CHECK(run_steps(MOST, 3) == MOST);
}

/* --- Signals: the host's handlers stay out of the workers, its mask stays as it was. */
static void masks(void *arg, rf_team *team, int worker) {
    (void)team;
    sigset_t blocked;
    CHECK(pthread_sigmask(SIG_SETMASK, NULL, &blocked) == 0);
    if (worker > 0) {
        const int ours[] = {SIGINT, SIGTERM, SIGALRM, SIGUSR1, SIGCHLD, SIGPROF};
        for (size_t i = 0; i < sizeof ours / sizeof *ours; i++)
            CHECK(sigismember(&blocked, ours[i]));
        CHECK(!sigismember(&blocked, SIGSEGV) && !sigismember(&blocked, SIGFPE));
        atomic_fetch_add((atomic_int *)arg, 1);
    } else {
        CHECK(!sigismember(&blocked, SIGUSR1) && sigismember(&blocked, SIGUSR2));
    }
}

static void test_signals(void) {
    sigset_t one, before;
    sigemptyset(&one);
    sigaddset(&one, SIGUSR2);
    CHECK(pthread_sigmask(SIG_SETMASK, &one, &before) == 0);
    atomic_int seen = 0;
    CHECK(rf_pool_run(MOST, masks, &seen) == MOST && atomic_load(&seen) == MOST - 1);
    masks(NULL, NULL, 0);
    CHECK(pthread_sigmask(SIG_SETMASK, &before, NULL) == 0);
}

/* --- The floating-point mode. */
#if defined(__x86_64__) || defined(__aarch64__)
static volatile float tiny = 1.17549435e-38f; /* the least normal float */
static volatile float subnormal = 1e-39f, nought = 0, one = 1, two = 2;

static int rounds_up(void) { return one + tiny > 1; } /* fegetround tells of x87 on x86-64 */

static int host_mode(void *context) {
    CHECK(tiny / two > 0 && rounds_up() && fetestexcept(FE_DIVBYZERO));
    return *(int *)context;
}

static void modes(void *arg, rf_team *team, int worker) {
    CHECK(tiny / two == 0);        /* a result */
    CHECK(subnormal * 1e30f == 0); /* and an operand */
    CHECK(!rounds_up());
    CHECK(nought / nought != 0); /* raises "invalid", which the caller must not see */
    rf_team_barrier(team);
    if (worker == 0) {
        CHECK(rf_team_call_host(team, host_mode, &(int){17}) == 17);
        CHECK(tiny / two == 0 && !rounds_up());
    }
    atomic_fetch_add((atomic_int *)arg, 1);
}

static void test_modes(void) {
    CHECK(tiny / two > 0);
    fenv_t before;
    fegetenv(&before);
    for (int threads = 1; threads <= 4; threads++) {
        fesetround(FE_UPWARD);
        feclearexcept(FE_ALL_EXCEPT);
        feraiseexcept(FE_DIVBYZERO);
        atomic_int done = 0;
        CHECK(rf_pool_run(threads, modes, &done) == threads && atomic_load(&done) == threads);
        CHECK(rounds_up());
        CHECK(fetestexcept(FE_DIVBYZERO) && !fetestexcept(FE_INVALID | FE_OVERFLOW));
        CHECK(tiny / two > 0);
    }
    fesetenv(&before);
}
#else
static void test_modes(void) {}
#endif

/* --- Fork. A child that hangs is killed by its own alarm, and the parent sees how it ended. */
static void expect_well(pid_t child) {
    int status;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void child_runs(int by_exit) {
    alarm(30);
    CHECK(run_steps(4, 3) == 4);
    CHECK(run_steps(2, 3) == 2);
#if !defined(__SANITIZE_ADDRESS__) /* whose search for leaks misses the parent's threads */
    if (by_exit) exit(0);
#endif
    (void)by_exit;
    _exit(0);
}

static atomic_int stop;

static void *runs_until_stopped(void *unused) {
    (void)unused;
    while (!atomic_load(&stop)) run_steps(3, 20);
    return NULL;
}

static void test_fork(int forks) {
    pthread_t other;
    atomic_store(&stop, 0);
    CHECK(pthread_create(&other, NULL, runs_until_stopped, NULL) == 0);
    for (int i = 0; i < forks; i++) {
        const struct timespec pause = {.tv_nsec = (i * 7919) % 200000};
        nanosleep(&pause, NULL);
        const pid_t child = fork();
        if (child == 0) child_runs(i % 10 == 0);
        expect_well(child);
    }
    atomic_store(&stop, 1);
    CHECK(pthread_join(other, NULL) == 0);
    CHECK(run_steps(MOST, 3) == MOST);

    const pid_t child = fork(); /* and the grandchild of a child that has run */
    if (child == 0) {
        CHECK(run_steps(3, 3) == 3);
        const pid_t grandchild = fork();
        if (grandchild == 0) child_runs(1);
        expect_well(grandchild);
        child_runs(1);
    }
    expect_well(child);
}

static int forks(void *context) {
    *(pid_t *)context = fork();
    if (*(pid_t *)context == 0) CHECK(run_steps(4, 3) == 4); /* as a signal handler might */
    return 0;
}

static void fork_inside(void *arg, rf_team *team, int worker) {
    rf_team_barrier(team);
    if (worker == 0) rf_team_call_host(team, forks, arg);
    rf_team_barrier(team);
    rf_team_barrier(team);
}

static void test_fork_inside(void) {
    for (int i = 0; i < 20; i++) {
        pid_t child = -1;
        const int ran = rf_pool_run(3, fork_inside, &child);
        if (child == 0) {
            CHECK(ran == 0);
            child_runs(i % 2);
        }
        CHECK(ran == 3);
        expect_well(child);
    }
}

/* --- Cores. */
static void test_cpu_count(void) {
    const int cores = rf_cpu_count();
    CHECK(cores >= 1);
#if defined(__linux__)
    cpu_set_t before, one;
    CHECK(sched_getaffinity(0, sizeof before, &before) == 0 && CPU_COUNT(&before) == cores);
    int core = 0;
    while (!CPU_ISSET(core, &before)) core++;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
    CHECK(rf_cpu_count() == 1);
    CHECK(sched_setaffinity(0, sizeof before, &before) == 0);
    CHECK(rf_cpu_count() == cores);
#endif
}

/* --- What it costs. */
static void nothing(void *arg, rf_team *team, int worker) { (void)arg, (void)team, (void)worker; }

static void barriers(void *arg, rf_team *team, int worker) {
    (void)worker;
    for (int i = 0; i < *(int *)arg; i++) rf_team_barrier(team);
}

static int by_value(const void *a, const void *b) {
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

static void timings(void) {
    enum { ROUNDS = 25, CALLS = 4000 };
    for (int threads = 1; threads <= MOST; threads = threads < 4 ? threads + 1 : 2 * threads) {
        double region[ROUNDS], barrier[ROUNDS];
        int calls = CALLS;
        for (int round = 0; round < ROUNDS; round++) {
            double start = now_s();
            for (int i = 0; i < CALLS; i++) rf_pool_run(threads, nothing, NULL);
            region[round] = (now_s() - start) / CALLS * 1e9;
            start = now_s();
            rf_pool_run(threads, barriers, &calls);
            barrier[round] = (now_s() - start) / CALLS * 1e9;
        }
        qsort(region, ROUNDS, sizeof *region, by_value);
        qsort(barrier, ROUNDS, sizeof *barrier, by_value);
        printf(
            "%d threads on %d cores: region %.0f ns (median; least %.0f), barrier %.0f ns (%.0f)\n",
            threads, rf_cpu_count(), region[ROUNDS / 2], region[0], barrier[ROUNDS / 2],
            barrier[0]);
    }
}

int main(int argc, char **argv) {
    alarm(300);
    if (argc > 1 && strcmp(argv[1], "time") == 0) {
        timings();
        return 0;
    }
    const int regions = argc > 1 ? atoi(argv[1]) : 100000;
    const int may_fork = !(argc > 2 && strcmp(argv[2], "nofork") == 0);
    test_cpu_count();
    test_no_threads();
    test_sizes();
    test_modes();
    test_signals();
    test_many_regions(regions);
    test_sleepers_wake();
    test_late_workers();
    CHECK(rf_pool_run(3, nest, NULL) == 3);
    test_many_callers(regions);
    if (may_fork) {
        test_fork(20 + regions / 200);
        test_fork_inside();
    }
    test_limits();
    printf("pool: all well (%d regions%s)\n", regions, may_fork ? ", with forks" : "");
    return 0;
}
