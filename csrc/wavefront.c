/* wavefront.c: layers one upon another, computed side by side; see wavefront.h.
 * Knows slices of steps, and which of them may run. Slice k of a layer may when slice k of the
 * layer below has, and slice k - 1 of its own. Workers take what may run, from the highest layer
 * down, so that what was just written is read soon; nobody has layers of its own, because there may
 * be more of them than workers. */
#include "wavefront.h"

#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#include "progress.h"

/* Slices of a sequence, about; what one lasts at least, for its call costs a microsecond; and at
 * most, because nobody asks the caller's poll meanwhile. */
#define WAVE_SLICES 16
#define WAVE_LEAST_NS 20e3
#define WAVE_MOST_NS 20e6
#define WAVE_CALL_NS 1e3
/* To wake another worker; and what side by side must gain: a prediction is not much better. */
#define WAVE_WAKE_NS 10e3
#define WAVE_GAIN 0.8
/* Looks for a slice, one after the other, before a worker offers its core to others, and before it
 * sleeps between them. */
#define WAVE_SPINS 1000
#define WAVE_YIELDS 2000
#define WAVE_SLEEP_NS 50000
/* A look as operations between two polls: with its pause, some 50 ns. */
#define WAVE_LOOK_OPERATIONS 1000

/* How far a layer is. Whoever takes it owns its states and the rest of this. */
typedef struct {
    atomic_int taken;
    _Atomic ptrdiff_t done; /* slices */
} wave_layer;

_Static_assert(sizeof(wave_layer) <= RF_WAVE_BYTES, "a line each");

typedef struct {
    rf_wavefront_args *args;
    ptrdiff_t slices;
    stop_flag stop;
} wave_call;

static wave_layer *wave_at(const wave_call *f, int i) {
    return (wave_layer *)((char *)f->args->progress + i * RF_WAVE_BYTES);
}

static ptrdiff_t wave_done(const wave_call *f, int i) {
    return atomic_load_explicit(&wave_at(f, i)->done, memory_order_acquire);
}

static void *wave_offset(const wave_call *f, void *tape, ptrdiff_t numbers) {
    return tape ? (char *)tape + numbers * f->args->kernels->element : NULL;
}

/* Slice k of layer i, alone: without the caller's poll, which only worker 0 may ask, and not in the
 * kernels' floating-point mode. */
static void wave_slice(const wave_call *f, int i, ptrdiff_t k) {
    const rf_wavefront_args *args = f->args;
    rf_forward_args slice = args->layers[i];
    slice.step0 = k * args->steps;
    slice.step1 = k + 1 < f->slices ? slice.step0 + args->steps : slice.shape.T;
    if (k > 0) {
        slice.h_0 = slice.h_n;
        slice.c_0 = slice.c_n;
    }
    slice.tape.gates = wave_offset(f, slice.tape.gates, slice.step0 * args->gates_step);
    slice.tape.h = wave_offset(f, slice.tape.h, slice.step0 * args->h_step);
    slice.tape.c = wave_offset(f, slice.tape.c, slice.step0 * args->c_step);
    slice.run = (rf_run){.threads = 1, .plan = RF_PLAN_SERIAL};
    args->kernels->forward(&slice);
}

/* Runs one slice, if one may run; returns whether all have. */
static int wave_look(const wave_call *f, int *ran) {
    int over = 1;
    *ran = 0;
    for (int i = f->args->n - 1; i >= 0; i--) {
        wave_layer *const layer = wave_at(f, i);
        const ptrdiff_t seen = wave_done(f, i);
        if (seen == f->slices) continue;
        over = 0;
        if (i > 0 && wave_done(f, i - 1) == seen) continue;
        if (atomic_load_explicit(&layer->taken, memory_order_relaxed)) continue;
        if (atomic_exchange_explicit(&layer->taken, 1, memory_order_acquire)) continue;
        /* It may have come further before it was ours. */
        const ptrdiff_t k = wave_done(f, i);
        if (k < f->slices && (i == 0 || wave_done(f, i - 1) > k)) {
            wave_slice(f, i, k);
            atomic_store_explicit(&layer->done, k + 1, memory_order_release);
            *ran = 1;
        }
        atomic_store_explicit(&layer->taken, 0, memory_order_release);
        if (*ran) return 0;
    }
    return over;
}

static void wave_worker(void *arg, rf_team *team, int worker) {
    wave_call *f = arg;
    const int workers = rf_team_size(team);
    progress at = progress_start(&f->stop, team, worker);
    for (int ran, looks = 0; !wave_look(f, &ran);) {
        if (stopped(&at, ran || looks == WAVE_YIELDS ? (ptrdiff_t)RF_POLL_OPERATIONS
                                                     : WAVE_LOOK_OPERATIONS))
            return;
        if (rf_team_size(team) != workers) return; /* a child, forked in poll: it is alone */
        if (ran)
            looks = 0;
        else if (looks < WAVE_SPINS)
            rf_relax();
        else if (looks < WAVE_YIELDS)
            sched_yield();
        else
            nanosleep(&(struct timespec){.tv_nsec = WAVE_SLEEP_NS}, NULL);
        if (looks < WAVE_YIELDS) looks++;
    }
}

ptrdiff_t rf_wavefront_steps(const rf_kernels *kernels, const rf_shape *lowest,
                             const rf_shape *others, int n, const rf_run *run) {
    const ptrdiff_t T = lowest->T;
    const int forced = run->plan == RF_PLAN_WAVEFRONT;
    if ((!forced && run->plan != RF_PLAN_AUTO) || n < 2 || run->threads < 2 || T < 2 ||
        lowest->B < 1 || lowest->directions > 1)
        return 0;
    const rf_run alone = {.threads = 1}, usual = {.threads = run->threads};
    const double low = kernels->forward_step_ns(lowest, &alone);
    const double high = kernels->forward_step_ns(others, &alone);
    const double least = low < high ? low : high, most = low < high ? high : low;
    if (!(least > 0)) return 0; /* sizes that overflow */
    ptrdiff_t steps = (T + WAVE_SLICES - 1) / WAVE_SLICES;
    if (steps * least < WAVE_LEAST_NS) steps = (ptrdiff_t)(WAVE_LEAST_NS / least) + 1;
    if (steps * most > WAVE_MOST_NS) steps = (ptrdiff_t)(WAVE_MOST_NS / most);
    if (steps < 1) return 0;
    if (forced) return steps < T ? steps : (T + 1) / 2;
    if (steps >= T) return 0;
    const int workers = n < run->threads ? n : run->threads;
    const double slices = (double)((T + steps - 1) / steps);
    const double shared = (low + (n - 1) * high) / workers;
    /* The last layer begins n - 1 slices late. */
    const double wave = (shared > most ? shared : most) * (double)(T + (n - 1) * steps) +
                        (slices + n - 1) * WAVE_CALL_NS + WAVE_WAKE_NS;
    const double layers = kernels->forward_step_ns(lowest, &usual) +
                          (n - 1) * kernels->forward_step_ns(others, &usual);
    return wave < WAVE_GAIN * layers * (double)T ? steps : 0;
}

int rf_wavefront(rf_wavefront_args *args) {
    wave_call f = {.args = args};
    const ptrdiff_t T = args->layers[0].shape.T;
    f.slices = (T + args->steps - 1) / args->steps;
    f.stop = stop_flag_make(&args->run);
    for (int i = 0; i < args->n; i++) {
        atomic_init(&wave_at(&f, i)->taken, 0);
        atomic_init(&wave_at(&f, i)->done, 0);
    }
    const int workers = args->n < args->run.threads ? args->n : args->run.threads;
    return run_workers(&args->run, RF_PLAN_WAVEFRONT, workers, wave_worker, &f, &f.stop);
}
