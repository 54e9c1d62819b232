/* driver.c: the kernels of csrc as a plain C library, over every isa, precision, cell and
 * structure. Knows csrc/kernels.h. Every buffer is its own allocation of exactly its size, for ASan
 * and valgrind; what a kernel must not read is NaN (and undefined to valgrind), inputs are compared
 * with a copy. Forward is checked against the loops below, in double; float64 gradients against
 * differences of those loops, float32 gradients against float64 ones; all threads, plans, layouts
 * and slices of the steps, bit for bit. Usage: driver [quick] [tables] [small] [large] [concurrent]
 * [poll] [waves] [loops] [isa ...]; of the parts and of the isas all that there are, if none is
 * named. */
#include "../../csrc/kernels.h"
#include "../../csrc/wavefront.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#if defined(__has_include)
#if __has_include(<valgrind/memcheck.h>)
#include <valgrind/memcheck.h>
#endif
#endif
#ifndef VALGRIND_MAKE_MEM_UNDEFINED
#define VALGRIND_MAKE_MEM_UNDEFINED(address, bytes) ((void)(address), (void)(bytes))
#define VALGRIND_MAKE_MEM_DEFINED(address, bytes) ((void)(address), (void)(bytes))
#endif

enum { ALIGN = 64, MAX_RUN_BUFFERS = 140, MAX_SLICES = 16 };

#define NORMS(n, ...) {[RF_NORM_IH] = n, [RF_NORM_HH] = n, ##__VA_ARGS__}
static const struct {
    const char *name;
    int gates, tape_gates, has_c;
    int units[RF_N_UNIT_WEIGHTS]; /* blocks of H of each vector besides the biases */
} cells[RF_N_CELLS] = {
    [RF_RNN_TANH] = {"rnn_tanh", 1, 0, 0, {0}},
    [RF_RNN_RELU] = {"rnn_relu", 1, 0, 0, {0}},
    [RF_LSTM] = {"lstm", 4, 4, 1, {0}},
    [RF_GRU] = {"gru", 3, 4, 0, {0}},
    [RF_GRU_RESET_BEFORE] = {"gru_reset_before", 3, 3, 0, {0}},
    [RF_LSTM_PEEPHOLE] = {"lstm_peephole", 4, 4, 1, {[RF_PEEPHOLE] = 3}},
    [RF_LSTM_COUPLED] = {"lstm_coupled", 3, 3, 1, {0}},
    [RF_LSTM_COUPLED_PEEPHOLE] = {"lstm_coupled_peephole", 3, 3, 1, {[RF_PEEPHOLE] = 2}},
    [RF_RNN_TANH_NORM] = {"rnn_tanh_norm", 1, 2, 0, NORMS(1)},
    [RF_RNN_RELU_NORM] = {"rnn_relu_norm", 1, 2, 0, NORMS(1)},
    [RF_LSTM_NORM] = {"lstm_norm", 4, 8, 1, NORMS(4, [RF_NORM_C] = 1, [RF_NORM_BIAS] = 1)},
    [RF_LSTM_NORM_CELL] = {"lstm_norm_cell", 4, 8, 1,
                           NORMS(4, [RF_NORM_C] = 1, [RF_NORM_BIAS] = 1)},
    [RF_GRU_NORM] = {"gru_norm", 3, 6, 0, NORMS(3)},
    [RF_RNN_GENERAL] = {"rnn_general", 1, 1, 0, {0}},
    [RF_LSTM_GENERAL] = {"lstm_general", 4, 4, 1, {0}},
    [RF_LSTM_PEEPHOLE_GENERAL] = {"lstm_peephole_general", 4, 4, 1, {[RF_PEEPHOLE] = 3}},
    [RF_LSTM_COUPLED_GENERAL] = {"lstm_coupled_general", 3, 3, 1, {0}},
    [RF_LSTM_COUPLED_PEEPHOLE_GENERAL] =
        {"lstm_coupled_peephole_general", 3, 3, 1, {[RF_PEEPHOLE] = 2}},
    [RF_GRU_GENERAL] = {"gru_general", 3, 4, 0, {0}},
    [RF_GRU_RESET_BEFORE_GENERAL] = {"gru_reset_before_general", 3, 3, 0, {0}},
};

/* Of general cells: without kinks but for the clips, which no number reaches, so that differences
 * are derivatives. */
static const rf_functions functions = {
    {{RF_ACT_SIGMOID, 0, 0}, {RF_ACT_SCALED_TANH, 0.875, 0.75}, {RF_ACT_SOFTPLUS, 0, 0}},
    8,
    8,
};

/* Arrays of a problem, each dense, all directions together. Parameters, in the order of their
 * gradients. */
enum {
    X,
    H_0,
    C_0,
    W_IH,
    W_HH,
    UNITS, /* by rf_unit_weights_id */
    PROJECTION = UNITS + RF_N_UNIT_WEIGHTS,
    N_PARAMS
};
/* What a run yields. */
enum {
    Y,
    H_N,
    C_N,
    GATES,
    H_TAPE,
    C_TAPE,
    DX,
    DH_0,
    DC_0,
    DW_IH,
    DW_HH,
    DUNITS,
    DPROJECTION = DUNITS + RF_N_UNIT_WEIGHTS,
    N_RESULTS
};
enum { N_WEIGHTS = N_RESULTS - DW_IH };
static const char *const result_names[] = {
    "y",  "h_n",   "c_n",   "gates", "h_tape", "c_tape", "dx",   "dh_0", "dc_0", "dW",
    "dR", "db_ih", "db_hh", "dP",    "dg_ih",  "dg_hh",  "dg_c", "db_c", "dW_hr"};

typedef struct {
    rf_shape shape;
    int reverse;
    const char *lengths_kind;
    ptrdiff_t *lengths; /* [B] or NULL */
    double *param[N_PARAMS];
    double *seed[3]; /* dy, dh_n, dc_n: the loss is the sum of their products with y, h_n, c_n */
    const double
        *h_tape; /* h at the parameters themselves, or NULL: which relus are open near there */
} problem;

typedef struct {
    double *a[N_RESULTS]; /* NULL: not asked for */
    int plan, threads;
} result;

/* What varies between runs of one problem without touching the bits of what comes out. */
typedef struct {
    int threads, plan;
    int x_layout, y_layout,
        odd;           /* see layout_of; odd: data off by one element from any alignment */
    int inference;     /* no tape, and no backward */
    int alias;         /* h_n over h_0 */
    unsigned unwanted; /* bit a: do not ask for result a */
} variant;

static atomic_long n_runs;
static long n_problems;

/* --- Numbers --------------------------------------------------------------------------------- */

static uint64_t random_state;

static uint64_t random_bits(void) { /* splitmix64, Steele et al. 2014 */
    uint64_t z = (random_state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static ptrdiff_t random_below(ptrdiff_t n) { return (ptrdiff_t)(random_bits() % (uint64_t)n); }

static void *must(void *p) {
    if (p == NULL) {
        fprintf(stderr, "driver: out of memory\n");
        exit(2);
    }
    return p;
}

static double *numbers(ptrdiff_t n) { return must(calloc((size_t)n + 1, sizeof(double))); }

/* Uniform in +-scale, and a float, so that both precisions are given the same problem. */
static double *random_numbers(ptrdiff_t n, double scale) {
    double *a = numbers(n);
    for (ptrdiff_t i = 0; i < n; i++)
        a[i] = (float)(scale * ((double)(random_bits() >> 11) * 0x1p-52 - 1)) + 0.0; /* no -0 */
    return a;
}

static ptrdiff_t length_of(const problem *p, ptrdiff_t b) {
    return p->lengths ? p->lengths[b] : p->shape.T;
}

/* Numbers of h. */
static ptrdiff_t h_size(const problem *p) { return p->shape.P ? p->shape.P : p->shape.H; }

static int is_bias(int id) { return id == RF_BIAS_IH || id == RF_BIAS_HH || id == RF_NORM_BIAS; }

static ptrdiff_t param_count(const problem *p, int param) {
    const rf_shape *s = &p->shape;
    const ptrdiff_t D = s->directions, rows = D * cells[s->cell].gates * s->H;
    switch (param) {
    case X:
        return s->T * s->B * s->I;
    case H_0:
        return D * s->B * h_size(p);
    case C_0:
        return cells[s->cell].has_c ? D * s->B * s->H : 0;
    case W_IH:
        return rows * s->I;
    case W_HH:
        return rows * h_size(p);
    case PROJECTION:
        return D * s->P * s->H;
    case UNITS + RF_BIAS_IH:
    case UNITS + RF_BIAS_HH:
        return rows;
    default:
        return D * cells[s->cell].units[param - UNITS] * s->H;
    }
}

static ptrdiff_t result_count(const problem *p, int r) {
    const rf_shape *s = &p->shape;
    const ptrdiff_t D = s->directions;
    switch (r) {
    case Y:
        return s->T * s->B * D * h_size(p);
    case H_N:
        return D * s->B * h_size(p);
    case C_N:
        return param_count(p, C_0);
    case GATES:
        return D * s->T * s->B * cells[s->cell].tape_gates * s->H;
    case H_TAPE:
        return D * (s->T + 1) * s->B * h_size(p);
    case C_TAPE:
        return cells[s->cell].has_c ? D * (s->T + 1) * s->B * s->H : 0;
    default:
        return param_count(p, r - DX);
    }
}

static void result_free(result *r) {
    for (int i = 0; i < N_RESULTS; i++) free(r->a[i]);
}

/* --- The truth ------------------------------------------------------------------------------- */

/* Nobody looks for faults in the loops that most of the time is spent in. */
#define NO_SANITIZE __attribute__((no_sanitize("address", "thread", "undefined")))

NO_SANITIZE static double sigmoid(double z) { return 1 / (1 + exp(-z)); }
NO_SANITIZE static double softplus(double z) { return log1p(exp(z)); }

/* One of `functions`. */
NO_SANITIZE static double act(int which, double z) {
    const double limit = which < 2 ? functions.clip : INFINITY, x = fmin(fmax(z, -limit), limit);
    const rf_activation *a = &functions.of[which];
    switch (a->id) {
    case RF_ACT_SIGMOID:
        return sigmoid(x);
    case RF_ACT_SCALED_TANH:
        return a->alpha * tanh(a->beta * x);
    case RF_ACT_SOFTPLUS:
        return softplus(x);
    }
    return NAN;
}

NO_SANITIZE static double dot(const double *a, const double *b, ptrdiff_t n) {
    double sum = 0;
    for (ptrdiff_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* A direction's vector of weights of single units. */
static const double *units_of(const problem *p, int id, int d) {
    return p->param[UNITS + id] + d * (param_count(p, UNITS + id) / p->shape.directions);
}

NO_SANITIZE static void naive_project(const problem *p, int d, const double *m, double *h) {
    const ptrdiff_t P = p->shape.P, H = p->shape.H;
    for (ptrdiff_t j = 0; j < P; j++) h[j] = dot(p->param[PROJECTION] + (d * P + j) * H, m, H);
}

/* v [n] normalised, in place. */
NO_SANITIZE static void normalise(double *v, ptrdiff_t n) {
    double mean = 0, var = 0;
    for (ptrdiff_t i = 0; i < n; i++) mean += v[i] / (double)n;
    for (ptrdiff_t i = 0; i < n; i++) var += (v[i] - mean) * (v[i] - mean) / (double)n;
    for (ptrdiff_t i = 0; i < n; i++) v[i] = (v[i] - mean) / sqrt(var + 1e-5);
}

/* As naive_step, of the normalised cells. */
NO_SANITIZE
static void naive_norm_step(const problem *p, int d, const double *x, const double *h0,
                            const double *c0, double *gates, double *h, double *c,
                            const double *open) {
    const int cell = p->shape.cell, carried = cell == RF_LSTM_NORM_CELL;
    const ptrdiff_t I = p->shape.I, H = p->shape.H, N = h_size(p), rows = cells[cell].gates * H;
    double *z[2] = {numbers(rows), numbers(rows)}, *out = numbers(H);
    for (int of_h = 0; of_h < 2; of_h++) {
        const ptrdiff_t n = of_h ? N : I;
        const double *weights = p->param[of_h ? W_HH : W_IH] + d * rows * n;
        const double *bias = units_of(p, of_h ? RF_BIAS_HH : RF_BIAS_IH, d);
        const double *gain = units_of(p, of_h ? RF_NORM_HH : RF_NORM_IH, d);
        for (ptrdiff_t i = 0; i < rows; i++)
            gates[of_h * rows + i] = z[of_h][i] = dot(weights + i * n, of_h ? h0 : x, n);
        normalise(z[of_h], rows);
        for (ptrdiff_t i = 0; i < rows; i++) z[of_h][i] = gain[i] * z[of_h][i] + bias[i];
    }
#define Z(g) (z[0][(g) * H + u] + z[1][(g) * H + u])
    for (ptrdiff_t u = 0; u < H; u++) {
        if (cell == RF_RNN_TANH_NORM) {
            h[u] = tanh(Z(0));
        } else if (cell == RF_RNN_RELU_NORM) {
            h[u] = (open ? open[u] : Z(0)) > 0 ? Z(0) : 0;
        } else if (cell == RF_GRU_NORM) {
            const double r = sigmoid(Z(0)), update = sigmoid(Z(1));
            const double n = tanh(z[0][2 * H + u] + r * z[1][2 * H + u]);
            h[u] = (1 - update) * n + update * h0[u];
        } else {
            c[u] = out[u] = sigmoid(Z(1)) * c0[u] + sigmoid(Z(0)) * tanh(Z(2));
        }
    }
    if (cells[cell].has_c) {
        const double *gain = units_of(p, RF_NORM_C, d), *bias = units_of(p, RF_NORM_BIAS, d);
        normalise(out, H);
        for (ptrdiff_t u = 0; u < H; u++) {
            out[u] = gain[u] * out[u] + bias[u];
            if (carried) c[u] = out[u];
            h[u] = sigmoid(Z(3)) * tanh(out[u]);
        }
    }
#undef Z
    free(z[0]);
    free(z[1]);
    free(out);
}

/* One row, one step: gates [Gt, H], h [N] and c [H] of what came before. The equations are those of
 * rnnfast/reference.py. m [H] is scratch, of what a projected h is made of, too; a relu is open
 * where `open` [H] is positive, if it is given. */
NO_SANITIZE
static void naive_step(const problem *p, int d, const double *x, const double *h0, const double *c0,
                       double *gates, double *h_out, double *c, double *m, const double *open) {
    const ptrdiff_t I = p->shape.I, H = p->shape.H, N = h_size(p),
                    rows = cells[p->shape.cell].gates * H;
    const double *W = p->param[W_IH] + d * rows * I, *R = p->param[W_HH] + d * rows * N;
    const double *b_ih = units_of(p, RF_BIAS_IH, d), *b_hh = units_of(p, RF_BIAS_HH, d);
    const double *P = units_of(p, RF_PEEPHOLE, d);
    double *const h = p->shape.P ? m : h_out;
    if (cells[p->shape.cell].units[RF_NORM_IH]) {
        naive_norm_step(p, d, x, h0, c0, gates, h, c, open);
        naive_project(p, d, m, h_out);
        return;
    }
#define AX(g, u) (dot(W + ((g) * H + (u)) * I, x, I) + b_ih[(g) * H + (u)])
#define AH(g, u, v) (dot(R + ((g) * H + (u)) * N, v, N) + b_hh[(g) * H + (u)])
    if (p->shape.cell == RF_GRU_RESET_BEFORE || p->shape.cell == RF_GRU_RESET_BEFORE_GENERAL)
        for (ptrdiff_t u = 0; u < H; u++) {
            const double z = AX(0, u) + AH(0, u, h0);
            m[u] = h0[u] * (p->shape.cell == RF_GRU_RESET_BEFORE ? sigmoid(z) : act(0, z));
        }
    for (ptrdiff_t u = 0; u < H; u++) {
        double gate[4] = {0};
        switch (p->shape.cell) {
        case RF_RNN_TANH:
            h[u] = tanh(AX(0, u) + AH(0, u, h0));
            break;
        case RF_RNN_RELU: {
            const double z = AX(0, u) + AH(0, u, h0);
            h[u] = (open ? open[u] : z) > 0 ? z : 0;
            break;
        }
        case RF_LSTM:
            for (int g = 0; g < 4; g++) {
                const double z = AX(g, u) + AH(g, u, h0);
                gate[g] = g == 2 ? tanh(z) : sigmoid(z);
            }
            c[u] = gate[1] * c0[u] + gate[0] * gate[2];
            h[u] = gate[3] * tanh(c[u]);
            break;
        case RF_LSTM_PEEPHOLE:
            gate[0] = sigmoid(AX(0, u) + AH(0, u, h0) + P[u] * c0[u]);
            gate[1] = sigmoid(AX(1, u) + AH(1, u, h0) + P[H + u] * c0[u]);
            gate[2] = tanh(AX(2, u) + AH(2, u, h0));
            c[u] = gate[1] * c0[u] + gate[0] * gate[2];
            gate[3] = sigmoid(AX(3, u) + AH(3, u, h0) + P[2 * H + u] * c[u]);
            h[u] = gate[3] * tanh(c[u]);
            break;
        case RF_LSTM_COUPLED:
        case RF_LSTM_COUPLED_PEEPHOLE: {
            const int sees = p->shape.cell == RF_LSTM_COUPLED_PEEPHOLE;
            gate[0] = sigmoid(AX(0, u) + AH(0, u, h0) + (sees ? P[u] * c0[u] : 0));
            gate[1] = tanh(AX(1, u) + AH(1, u, h0));
            c[u] = (1 - gate[0]) * c0[u] + gate[0] * gate[1];
            gate[2] = sigmoid(AX(2, u) + AH(2, u, h0) + (sees ? P[H + u] * c[u] : 0));
            h[u] = gate[2] * tanh(c[u]);
            break;
        }
        case RF_GRU:
            gate[0] = sigmoid(AX(0, u) + AH(0, u, h0));
            gate[1] = sigmoid(AX(1, u) + AH(1, u, h0));
            gate[3] = AH(2, u, h0);
            gate[2] = tanh(AX(2, u) + gate[0] * gate[3]);
            h[u] = (1 - gate[1]) * gate[2] + gate[1] * h0[u];
            break;
        case RF_GRU_RESET_BEFORE:
            gate[0] = sigmoid(AX(0, u) + AH(0, u, h0));
            gate[1] = sigmoid(AX(1, u) + AH(1, u, h0));
            gate[2] = tanh(AX(2, u) + AH(2, u, m));
            h[u] = (1 - gate[1]) * gate[2] + gate[1] * h0[u];
            break;
        case RF_RNN_GENERAL:
            gate[0] = AX(0, u) + AH(0, u, h0);
            h[u] = act(0, gate[0]);
            break;
        case RF_LSTM_GENERAL:
        case RF_LSTM_PEEPHOLE_GENERAL:
        case RF_LSTM_COUPLED_GENERAL:
        case RF_LSTM_COUPLED_PEEPHOLE_GENERAL: {
            const int n = cells[p->shape.cell].gates,
                      sees = cells[p->shape.cell].units[RF_PEEPHOLE];
            for (int g = 0; g < n; g++) gate[g] = AX(g, u) + AH(g, u, h0);
            for (int g = 0; g < sees - 1; g++) gate[g] += P[g * H + u] * c0[u];
            const double i = act(0, gate[0]), f = n == 3 ? 1 - i : act(0, gate[1]);
            const double all = f * c0[u] + i * act(1, gate[n - 2]);
            c[u] = fmin(fmax(all, -functions.cell_clip), functions.cell_clip);
            if (sees) gate[n - 1] += P[(sees - 1) * H + u] * c[u];
            h[u] = act(0, gate[n - 1]) * act(2, c[u]);
            break;
        }
        case RF_GRU_GENERAL:
        case RF_GRU_RESET_BEFORE_GENERAL: {
            const int after = p->shape.cell == RF_GRU_GENERAL;
            gate[0] = AX(0, u) + AH(0, u, h0);
            gate[1] = AX(1, u) + AH(1, u, h0);
            gate[3] = after ? AH(2, u, h0) : 0;
            gate[2] = AX(2, u) + (after ? act(0, gate[0]) * gate[3] : AH(2, u, m));
            h[u] = (1 - act(0, gate[1])) * act(1, gate[2]) + act(0, gate[1]) * h0[u];
            break;
        }
        }
        for (int g = 0; g < cells[p->shape.cell].tape_gates; g++) gates[g * H + u] = gate[g];
    }
    naive_project(p, d, m, h_out);
#undef AX
#undef AH
}

static result naive_forward(const problem *p) {
    const rf_shape *s = &p->shape;
    const ptrdiff_t T = s->T, B = s->B, H = s->H, N = h_size(p), D = s->directions;
    const ptrdiff_t GtH = cells[s->cell].tape_gates * H;
    const int has_c = cells[s->cell].has_c;
    result r = {{0}, 0, 0};
    for (int i = Y; i <= C_TAPE; i++)
        if (result_count(p, i) || i == Y || i == H_N) r.a[i] = numbers(result_count(p, i));
    double *m = numbers(H), *none = numbers(H);
    for (int d = 0; d < D; d++)
        for (ptrdiff_t b = 0; b < B; b++) {
            const ptrdiff_t n = length_of(p, b);
            double *h = r.a[H_TAPE] + (d * (T + 1) * B + b) * N, *c = none;
            memcpy(h, p->param[H_0] + (d * B + b) * N, (size_t)N * sizeof(double));
            if (has_c) {
                c = r.a[C_TAPE] + (d * (T + 1) * B + b) * H;
                memcpy(c, p->param[C_0] + (d * B + b) * H, (size_t)H * sizeof(double));
            }
            for (ptrdiff_t step = 0; step < n; step++) {
                const ptrdiff_t t = p->reverse >> d & 1 ? n - 1 - step : step;
                double *gates = GtH ? r.a[GATES] + ((d * T + step) * B + b) * GtH : NULL;
                double *c_new = has_c ? c + B * H : none;
                const double *open = p->h_tape ? p->h_tape + (h + B * N - r.a[H_TAPE]) : NULL;
                naive_step(p, d, p->param[X] + (t * B + b) * s->I, h, c, gates, h + B * N, c_new, m,
                           open);
                h += B * N;
                c = c_new;
                memcpy(r.a[Y] + ((t * B + b) * D + d) * N, h, (size_t)N * sizeof(double));
            }
            memcpy(r.a[H_N] + (d * B + b) * N, h, (size_t)N * sizeof(double));
            if (has_c) memcpy(r.a[C_N] + (d * B + b) * H, c, (size_t)H * sizeof(double));
        }
    free(m);
    free(none);
    return r;
}

static double loss(const problem *p) {
    result r = naive_forward(p);
    double sum = 0;
    for (int i = 0; i < 3; i++)
        if (r.a[i]) sum += dot(p->seed[i], r.a[i], result_count(p, i));
    result_free(&r);
    return sum;
}

/* --- Complaints ------------------------------------------------------------------------------ */

typedef struct {
    char text[400];
} place;

static place describe(const problem *p, const rf_kernels *k, const variant *v) {
    place w;
    const rf_shape *s = &p->shape;
    snprintf(
        w.text, sizeof w.text,
        "%s %s %s T=%td B=%td I=%td H=%td P=%td D=%d reverse=%d lengths=%s; threads=%d plan=%d "
        "layouts=%d,%d odd=%d inference=%d alias=%d unwanted=%x",
        cells[s->cell].name, k->isa, k->element == 4 ? "f32" : "f64", s->T, s->B, s->I, s->H, s->P,
        s->directions, p->reverse, p->lengths_kind, v->threads, v->plan, v->x_layout, v->y_layout,
        v->odd, v->inference, v->alias, v->unwanted);
    return w;
}

static void fail(const char *where, const char *what) {
    fprintf(stderr, "driver: %s\n  in %s\n", what, where);
    abort();
}

/* Relative L2 distance of a block from the truth. A block whose own norm is small is measured by
 * what its numbers could have been: sums of terms of order one, hence the floor. */
static void check_block(const char *where, const char *name, const double *got, const double *truth,
                        ptrdiff_t n, double tolerance, double floor) {
    double error = 0, norm = 0, worst = -1;
    ptrdiff_t at = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        const double e = fabs(got[i] - truth[i]);
        error += e * e;
        norm += truth[i] * truth[i];
        if (!(e <= worst)) {
            worst = e;
            at = i;
        }
    }
    norm = fmax(sqrt(norm), floor * sqrt((double)n));
    if (n == 0 || sqrt(error) <= tolerance * norm) return;
    char what[300];
    snprintf(what, sizeof what,
             "%s: relative error %.3g, tolerated %.3g; worst at %td: got %.17g, should be %.17g",
             name, sqrt(error) / norm, tolerance, at, got[at], truth[at]);
    fail(where, what);
}

static void check_result(const char *where, const problem *p, int r, const double *got,
                         const double *truth, double tolerance) {
    const ptrdiff_t n = result_count(p, r),
                    blocks = (r == Y || r == DX) && p->shape.T ? p->shape.T : 1;
    for (ptrdiff_t i = 0; i < blocks; i++)
        check_block(where, result_names[r], got + i * (n / blocks), truth + i * (n / blocks),
                    n / blocks, tolerance, 0.1);
}

/* A zero's sign is let be: a null pointer for dy spares adding zeros, which would make +0 of -0. */
static void check_same_bits(const char *where, const problem *p, const result *got,
                            const result *ref) {
    for (int r = 0; r < N_RESULTS; r++) {
        if (!got->a[r]) continue;
        for (ptrdiff_t i = 0; i < result_count(p, r); i++) {
            const double a = got->a[r][i], b = ref->a[r][i];
            if (memcmp(&a, &b, sizeof a) && !(a == 0 && b == 0)) {
                char what[300];
                snprintf(what, sizeof what,
                         "%s[%td]: %a, but %a with one thread, dense arrays, in one call",
                         result_names[r], i, a, b);
                fail(where, what);
            }
        }
    }
}

/* --- Buffers of one run ---------------------------------------------------------------------- */

typedef struct {
    const char *name;
    char *base, *data, *copy; /* copy: of an input, or NULL */
    size_t bytes;
} buffer;

typedef struct {
    const char *where;
    ptrdiff_t element;
    int odd;
    int n;
    buffer buffers[MAX_RUN_BUFFERS];
} run_buffers;

/* All bits set: NaN in both precisions, and an index or size that cannot be. */
static void poison(void *data, size_t bytes) {
    memset(data, 0xff, bytes);
    VALGRIND_MAKE_MEM_UNDEFINED(data, bytes);
}

static buffer *allocate(run_buffers *run, const char *name, ptrdiff_t bytes, int align) {
    if (bytes < 0) fail(run->where, "a size function says that a small problem overflows");
    buffer *b = &run->buffers[run->n++];
    const size_t before = run->odd && !align ? (size_t)run->element : 0;
    *b = (buffer){.name = name, .bytes = (size_t)bytes};
    if (align) {
        void *p = NULL;
        if (posix_memalign(&p, ALIGN, (size_t)bytes)) must(NULL);
        b->base = p;
    } else {
        b->base = must(malloc((size_t)bytes + before + (bytes == 0)));
    }
    b->data = b->base + before;
    poison(b->data, b->bytes);
    return b;
}

static double get_number(const run_buffers *run, const void *data, ptrdiff_t i) {
    return run->element == 4 ? (double)((const float *)data)[i] : ((const double *)data)[i];
}

static void put_number(const run_buffers *run, void *data, ptrdiff_t i, double value) {
    if (run->element == 4)
        ((float *)data)[i] = (float)value;
    else
        ((double *)data)[i] = value;
}

static void protect(buffer *b) {
    b->copy = must(malloc(b->bytes + 1));
    memcpy(b->copy, b->data, b->bytes);
}

static void *dense_in(run_buffers *run, const char *name, const double *values, ptrdiff_t n) {
    buffer *b = allocate(run, name, n * run->element, 0);
    for (ptrdiff_t i = 0; i < n; i++) put_number(run, b->data, i, values[i]);
    protect(b);
    return b->data;
}

static void *dense_out(run_buffers *run, const char *name, ptrdiff_t n) {
    return allocate(run, name, n * run->element, 0)->data;
}

static double *dense_result(const run_buffers *run, const void *data, ptrdiff_t n) {
    double *a = numbers(n);
    for (ptrdiff_t i = 0; i < n; i++) a[i] = get_number(run, data, i);
    return a;
}

/* Layouts of [T, B, N]: 0 dense, 1 batch first, 2 with gaps. Returns the elements spanned. */
static ptrdiff_t layout_of(int layout, ptrdiff_t T, ptrdiff_t B, ptrdiff_t N, rf_seq *seq) {
    seq->row = layout == 1 ? T * N : layout == 2 ? N + 3 : N;
    seq->step = layout == 1 ? N : layout == 2 ? B * seq->row + 5 : B * N;
    return T && B && N ? (T - 1) * seq->step + (B - 1) * seq->row + N : 0;
}

/* The values of a row's valid steps; the rest stays poisoned. */
static rf_seq seq_in(run_buffers *run, const char *name, const problem *p, int layout, ptrdiff_t N,
                     const double *values) {
    rf_seq seq = {0};
    buffer *b =
        allocate(run, name, layout_of(layout, p->shape.T, p->shape.B, N, &seq) * run->element, 0);
    seq.data = b->data;
    for (ptrdiff_t row = 0; row < p->shape.B; row++)
        for (ptrdiff_t t = 0; t < length_of(p, row); t++)
            for (ptrdiff_t i = 0; i < N; i++)
                put_number(run, seq.data, t * seq.step + row * seq.row + i,
                           values[(t * p->shape.B + row) * N + i]);
    protect(b);
    return seq;
}

static rf_seq seq_out(run_buffers *run, const char *name, const problem *p, int layout,
                      ptrdiff_t N) {
    rf_seq seq = {0};
    seq.data =
        allocate(run, name, layout_of(layout, p->shape.T, p->shape.B, N, &seq) * run->element, 0)
            ->data;
    return seq;
}

/* Reads a sequence out, and looks that nothing between its rows was touched. */
static double *seq_result(run_buffers *run, const problem *p, const rf_seq *seq, ptrdiff_t N) {
    const ptrdiff_t T = p->shape.T, B = p->shape.B;
    double *a = numbers(T * B * N);
    const buffer *b = run->buffers;
    while (b->data != seq->data) b++;
    for (ptrdiff_t t = 0; t < T; t++)
        for (ptrdiff_t row = 0; row < B; row++) {
            char *data = (char *)seq->data + (t * seq->step + row * seq->row) * run->element;
            for (ptrdiff_t i = 0; i < N; i++) a[(t * B + row) * N + i] = get_number(run, data, i);
            memset(data, 0xff, (size_t)(N * run->element));
        }
    VALGRIND_MAKE_MEM_DEFINED(b->data, b->bytes);
    for (size_t i = 0; i < b->bytes; i++)
        if ((unsigned char)b->data[i] != 0xff)
            fail(run->where, "written between the rows of a sequence");
    return a;
}

/* Slots of the tape past a row's length must be as they were; they are zero in the result. */
static double *tape_result(run_buffers *run, const problem *p, void *data, int r, ptrdiff_t N) {
    const ptrdiff_t D = p->shape.directions, B = p->shape.B, n = result_count(p, r);
    double *a = numbers(n);
    if (n == 0) return a;
    const ptrdiff_t slots = n / (D * B * N), initial = r == GATES ? 0 : 1;
    for (ptrdiff_t i = 0; i < D * slots * B; i++) {
        const ptrdiff_t slot = i / B % slots, b = i % B;
        char *row = (char *)data + i * N * run->element;
        if (slot < length_of(p, b) + initial) {
            for (ptrdiff_t u = 0; u < N; u++) a[i * N + u] = get_number(run, row, u);
        } else {
            VALGRIND_MAKE_MEM_DEFINED(row, N * run->element);
            for (ptrdiff_t j = 0; j < N * run->element; j++)
                if ((unsigned char)row[j] != 0xff)
                    fail(run->where, "written to the tape past a row's length");
            poison(row, (size_t)(N * run->element));
        }
    }
    return a;
}

static void check_inputs(const run_buffers *run) {
    for (int i = 0; i < run->n; i++) {
        const buffer *b = &run->buffers[i];
        if (!b->copy) continue;
        VALGRIND_MAKE_MEM_DEFINED(b->data, b->bytes);
        VALGRIND_MAKE_MEM_DEFINED(b->copy, b->bytes);
        if (memcmp(b->data, b->copy, b->bytes)) {
            char what[100];
            snprintf(what, sizeof what, "%s, an input, was written", b->name);
            fail(run->where, what);
        }
    }
}

static void release(run_buffers *run) {
    for (int i = 0; i < run->n; i++) {
        free(run->buffers[i].base);
        free(run->buffers[i].copy);
    }
}

/* --- One run: pack, forward, pack, backward -------------------------------------------------- */

static int is_zero(const double *a, ptrdiff_t n) {
    for (ptrdiff_t i = 0; i < n; i++)
        if (a[i] != 0) return 0;
    return 1;
}

/* A null pointer instead of zeros, if so asked. */
static void *zero_or_in(run_buffers *run, const char *name, const double *values, ptrdiff_t n,
                        int zeros_as_null) {
    return zeros_as_null && is_zero(values, n) ? NULL : dense_in(run, name, values, n);
}

/* Where the weights, or their gradients, of a direction stand, in the order of the parameters. */
static void weights_of(rf_weights *w, void **at[N_WEIGHTS]) {
    at[0] = &w->W;
    at[1] = &w->R;
    for (int i = 0; i < RF_N_UNIT_WEIGHTS; i++) at[2 + i] = &w->unit_weights[i];
    at[N_WEIGHTS - 1] = &w->projection;
}

static const void *run_pack(run_buffers *run, const problem *p, const rf_kernels *k,
                            rf_pack_kind kind, int d, int zeros_as_null) {
    const rf_shape *s = &p->shape;
    rf_weights weights = {0};
    void **in[N_WEIGHTS];
    weights_of(&weights, in);
    for (int i = 0; i < N_WEIGHTS; i++) {
        const ptrdiff_t n = param_count(p, W_IH + i) / s->directions;
        if (n)
            *in[i] = zero_or_in(run, result_names[DW_IH + i] + 1, p->param[W_IH + i] + d * n, n,
                                is_bias(W_IH + i - UNITS) && zeros_as_null);
    }
    buffer *b = allocate(run, "pack", k->pack_size(s, kind), 1);
    rf_run pack_run = {.threads = 3};
    k->pack(s, kind, &weights, b->data, &pack_run);
    protect(b);
    return b->data;
}

static void check_ran(const char *where, const variant *v, const rf_run *run) {
    const int serial = run->ran_plan == RF_PLAN_SERIAL;
    const int shared = run->ran_plan == RF_PLAN_BATCH || run->ran_plan == RF_PLAN_UNITS ||
                       run->ran_plan == RF_PLAN_DIRECTIONS;
    if ((!serial && !shared) || run->ran_threads < 1 || run->ran_threads > v->threads ||
        (serial && run->ran_threads != 1) || (v->plan == RF_PLAN_SERIAL && !serial))
        fail(where, "the plan or the threads that ran are none that were allowed");
}

static result run_kernels(const problem *p, const rf_kernels *k, const variant *v,
                          int zeros_as_null) {
    const rf_shape *s = &p->shape;
    const ptrdiff_t D = s->directions, H = s->H, N = h_size(p);
    const ptrdiff_t h_states = D * s->B * N, c_states = D * s->B * H;
    const int has_c = cells[s->cell].has_c, Gt = cells[s->cell].tape_gates;
    const place at = describe(p, k, v);
    const char *const where = at.text;
    run_buffers run = {.where = where, .element = k->element, .odd = v->odd};
    result r = {{0}, 0, 0};
    n_runs++;
#define WANTED(name) (!(v->unwanted >> (name) & 1))
#define STATE(name, values, n) zero_or_in(&run, name, values, n, zeros_as_null)

    ptrdiff_t *lengths = NULL;
    if (p->lengths) {
        const size_t bytes = (size_t)s->B * sizeof *lengths;
        buffer *b = &run.buffers[run.n++];
        *b =
            (buffer){.name = "lengths", .bytes = bytes, .base = must(malloc(bytes + (bytes == 0)))};
        b->data = b->base;
        memcpy(b->data, p->lengths, bytes);
        protect(b);
        lengths = (ptrdiff_t *)b->data;
    }

    rf_forward_args f = {.shape = *s, .reverse = p->reverse, .step1 = s->T, .lengths = lengths};
    f.run = (rf_run){.threads = v->threads, .plan = v->plan};
    f.x = seq_in(&run, "x", p, v->x_layout, s->I, p->param[X]);
    f.y = seq_out(&run, "y", p, v->y_layout, D * N);
    for (int d = 0; d < D; d++) f.pack[d] = run_pack(&run, p, k, RF_PACK_FORWARD, d, zeros_as_null);
    f.h_0 = STATE("h_0", p->param[H_0], h_states);
    f.h_n = dense_out(&run, "h_n", h_states);
    if (has_c) {
        f.c_0 = STATE("c_0", p->param[C_0], c_states);
        f.c_n = dense_out(&run, "c_n", c_states);
    }
    if (v->alias && f.h_0 && (f.c_0 || !has_c)) {
        memcpy(f.h_n, f.h_0, (size_t)(h_states * k->element));
        f.h_0 = f.h_n;
        if (has_c) {
            memcpy(f.c_n, f.c_0, (size_t)(c_states * k->element));
            f.c_0 = f.c_n;
        }
    }
    if (!v->inference) {
        if (Gt) f.tape.gates = dense_out(&run, "gates", result_count(p, GATES));
        f.tape.h = dense_out(&run, "h_tape", result_count(p, H_TAPE));
        if (has_c) f.tape.c = dense_out(&run, "c_tape", result_count(p, C_TAPE));
    }
    f.workspace = allocate(&run, "workspace", k->forward_workspace(s, v->threads), 1)->data;
    if (k->forward(&f)) fail(where, "forward says that poll asked it to end; there is no poll");
    check_ran(where, v, &f.run);
    r.plan = f.run.ran_plan;
    r.threads = f.run.ran_threads;
    r.a[Y] = seq_result(&run, p, &f.y, D * N);
    r.a[H_N] = dense_result(&run, f.h_n, h_states);
    if (has_c) r.a[C_N] = dense_result(&run, f.c_n, c_states);
    if (v->inference) {
        check_inputs(&run);
        release(&run);
        return r;
    }
    if (Gt) r.a[GATES] = tape_result(&run, p, f.tape.gates, GATES, Gt * H);
    r.a[H_TAPE] = tape_result(&run, p, f.tape.h, H_TAPE, N);
    if (has_c) r.a[C_TAPE] = tape_result(&run, p, f.tape.c, C_TAPE, H);
    for (int i = 0; i < run.n; i++) {
        buffer *b = &run.buffers[i];
        if (b->data == f.tape.gates || b->data == f.tape.h || b->data == f.tape.c) protect(b);
    }

    rf_backward_args g = {
        .shape = *s, .reverse = p->reverse, .step1 = s->T, .lengths = lengths, .tape = f.tape};
    g.run = (rf_run){.threads = v->threads, .plan = v->plan};
    if (WANTED(DW_IH)) g.x = f.x;
    for (int d = 0; d < D; d++)
        g.pack[d] = run_pack(&run, p, k, RF_PACK_BACKWARD, d, zeros_as_null);
    if (!zeros_as_null || !is_zero(p->seed[0], result_count(p, Y)))
        g.dy = seq_in(&run, "dy", p, v->y_layout, D * N, p->seed[0]);
    g.dh_n = STATE("dh_n", p->seed[1], h_states);
    if (has_c) g.dc_n = STATE("dc_n", p->seed[2], c_states);
    if (WANTED(DX)) g.dx = seq_out(&run, "dx", p, v->x_layout, s->I);
    if (WANTED(DH_0)) g.dh_0 = dense_out(&run, "dh_0", h_states);
    if (has_c && WANTED(DC_0)) g.dc_0 = dense_out(&run, "dc_0", c_states);
    for (int d = 0; d < D; d++) {
        void **out[N_WEIGHTS];
        weights_of(&g.grads[d], out);
        for (int i = 0; i < N_WEIGHTS; i++)
            if (WANTED(DW_IH + i) && result_count(p, DW_IH + i))
                *out[i] = dense_out(&run, result_names[DW_IH + i], result_count(p, DW_IH + i) / D);
    }
    g.workspace = allocate(&run, "workspace", k->backward_workspace(s, v->threads), 1)->data;
    if (k->backward(&g)) fail(where, "backward says that poll asked it to end; there is no poll");
    check_ran(where, v, &g.run);
    if (g.run.ran_threads > r.threads) r.threads = g.run.ran_threads;

    if (WANTED(DX)) r.a[DX] = seq_result(&run, p, &g.dx, s->I);
    if (WANTED(DH_0)) r.a[DH_0] = dense_result(&run, g.dh_0, h_states);
    if (has_c && WANTED(DC_0)) r.a[DC_0] = dense_result(&run, g.dc_0, c_states);
    for (int i = 0; i < N_WEIGHTS; i++) {
        if (!WANTED(DW_IH + i) || !result_count(p, DW_IH + i)) continue;
        const ptrdiff_t n = result_count(p, DW_IH + i) / D;
        r.a[DW_IH + i] = numbers(n * D);
        for (int d = 0; d < D; d++) {
            void **from[N_WEIGHTS];
            weights_of(&g.grads[d], from);
            for (ptrdiff_t j = 0; j < n; j++)
                r.a[DW_IH + i][d * n + j] = get_number(&run, *from[i], j);
        }
    }
    check_inputs(&run);
    release(&run);
    return r;
#undef WANTED
#undef STATE
}

/* --- The same in slices of the steps --------------------------------------------------------- */

static char *offset(const run_buffers *run, void *data, ptrdiff_t elements) {
    return data ? (char *)data + elements * run->element : NULL;
}

/* Direction by direction: forward in slices that keep nothing but the states between them; then,
 * from the last slice to the first, forward again with a tape and no y, and backward. */
static result run_sliced(const problem *p, const rf_kernels *k, const variant *v) {
    const rf_shape *s = &p->shape;
    const ptrdiff_t D = s->directions, H = s->H, N = h_size(p), h_states = s->B * N,
                    c_states = s->B * H, panel = k->backward_panel_steps(s);
    const int has_c = cells[s->cell].has_c, Gt = cells[s->cell].tape_gates;
    const place at = describe(p, k, v);
    run_buffers run = {.where = at.text, .element = k->element, .odd = v->odd};
    result r = {{0}, 0, 0};
    rf_shape one = *s;
    one.directions = 1;
    n_runs++;

    ptrdiff_t end = p->lengths ? 0 : s->T, border[MAX_SLICES + 2], n = 0;
    for (ptrdiff_t b = 0; b < s->B; b++) end = length_of(p, b) > end ? length_of(p, b) : end;
    border[n++] = s->T; /* past the longest row there is padding alone */
    for (; end > 0 && n <= MAX_SLICES; end -= panel * (1 + random_below(2))) border[n++] = end;
    border[n] = 0;

    const rf_seq x = seq_in(&run, "x", p, v->x_layout, s->I, p->param[X]);
    const rf_seq y = seq_out(&run, "y", p, v->y_layout, D * N);
    const rf_seq dy = seq_in(&run, "dy", p, v->y_layout, D * N, p->seed[0]);
    const rf_seq dx = seq_out(&run, "dx", p, v->x_layout, s->I);
    char *h_n = dense_out(&run, "h_n", D * h_states), *c_n = dense_out(&run, "c_n", D * c_states);
    char *dh = dense_out(&run, "dh", D * h_states), *dc = dense_out(&run, "dc", D * c_states);
    char *grads[N_WEIGHTS];
    for (int i = 0; i < N_WEIGHTS; i++)
        grads[i] = dense_out(&run, result_names[DW_IH + i], result_count(p, DW_IH + i));
    for (int d = 0; d < D; d++) {
        const ptrdiff_t h_own = d * h_states, c_own = d * c_states;
        rf_forward_args f = {.shape = one, .reverse = p->reverse >> d & 1, .lengths = p->lengths};
        f.run = (rf_run){.threads = v->threads, .plan = v->plan};
        f.pack[0] = run_pack(&run, p, k, RF_PACK_FORWARD, d, 1);
        f.x = x;
        f.workspace = allocate(&run, "workspace", k->forward_workspace(&one, v->threads), 1)->data;
        char *h[MAX_SLICES + 2], *c[MAX_SLICES + 2] = {NULL};
        h[n] = dense_in(&run, "h_0", p->param[H_0] + h_own, h_states);
        if (has_c) c[n] = dense_in(&run, "c_0", p->param[C_0] + c_own, c_states);
        for (ptrdiff_t i = n - 1; i >= 0; i--) {
            h[i] = i ? dense_out(&run, "h", h_states) : offset(&run, h_n, h_own);
            if (has_c) c[i] = i ? dense_out(&run, "c", c_states) : offset(&run, c_n, c_own);
            f.step0 = border[i + 1];
            f.step1 = border[i];
            f.y = y;
            f.y.data = offset(&run, y.data, d * N);
            f.h_0 = h[i + 1];
            f.c_0 = c[i + 1];
            f.h_n = h[i];
            f.c_n = c[i];
            if (k->forward(&f)) fail(at.text, "forward ended a slice early");
        }

        rf_backward_args g = {.shape = one, .reverse = f.reverse, .lengths = p->lengths};
        g.run = f.run;
        g.pack[0] = run_pack(&run, p, k, RF_PACK_BACKWARD, d, 1);
        g.x = x;
        g.dy = dy;
        g.dy.data = offset(&run, dy.data, d * N);
        g.dx = dx;
        g.add_dx = d;
        void **out[N_WEIGHTS];
        weights_of(&g.grads[0], out);
        for (int i = 0; i < N_WEIGHTS; i++)
            *out[i] = offset(&run, grads[i], d * (result_count(p, DW_IH + i) / D));
        g.workspace = allocate(&run, "workspace", k->backward_workspace(&one, v->threads), 1)->data;
        g.dh_n = dense_in(&run, "dh_n", p->seed[1] + h_own, h_states);
        if (has_c) g.dc_n = dense_in(&run, "dc_n", p->seed[2] + c_own, c_states);
        g.dh_0 = offset(&run, dh, h_own);
        if (has_c) g.dc_0 = offset(&run, dc, c_own);
        f.y.data = NULL;
        f.h_n = dense_out(&run, "h again", h_states);
        f.c_n = dense_out(&run, "c again", c_states);
        for (ptrdiff_t i = 0; i < n; i++) {
            run_buffers slice = {.where = at.text, .element = k->element, .odd = v->odd};
            const ptrdiff_t steps = border[i] - border[i + 1];
            if (Gt) f.tape.gates = dense_out(&slice, "gates", steps * c_states * Gt);
            f.tape.h = dense_out(&slice, "h_tape", (steps + 1) * h_states);
            if (has_c) f.tape.c = dense_out(&slice, "c_tape", (steps + 1) * c_states);
            g.step0 = f.step0 = border[i + 1];
            g.step1 = f.step1 = border[i];
            f.h_0 = h[i + 1];
            f.c_0 = c[i + 1];
            g.tape = f.tape;
            if (k->forward(&f) || k->backward(&g)) fail(at.text, "a slice was ended early");
            g.add_grads = 1;
            g.dh_n = g.dh_0;
            g.dc_n = g.dc_0;
            release(&slice);
        }
        check_ran(at.text, v, &g.run);
    }
    r.a[Y] = seq_result(&run, p, &y, D * N);
    r.a[DX] = seq_result(&run, p, &dx, s->I);
    r.a[H_N] = dense_result(&run, h_n, D * h_states);
    r.a[DH_0] = dense_result(&run, dh, D * h_states);
    if (has_c) r.a[C_N] = dense_result(&run, c_n, D * c_states);
    if (has_c) r.a[DC_0] = dense_result(&run, dc, D * c_states);
    for (int i = 0; i < N_WEIGHTS; i++)
        r.a[DW_IH + i] = dense_result(&run, grads[i], result_count(p, DW_IH + i));
    check_inputs(&run);
    release(&run);
    return r;
}

/* --- One problem ----------------------------------------------------------------------------- */

enum { NO_LENGTHS, UNEVEN, WITH_ZEROS, N_LENGTHS };
static const char *const lengths_names[] = {"none", "uneven", "with zeros"};

enum { N_WALKS = 3 };
static const struct {
    int directions, reverse;
} walks[N_WALKS] = {{1, 0}, {1, 1}, {2, 2}};

/* What h is projected to, in half of the problems where it may be: something below H. */
static ptrdiff_t some_projection(int cell, ptrdiff_t H) {
    return cells[cell].has_c && H > 1 && n_problems % 2 ? 1 + random_below(H - 1) : 0;
}

/* Normalised products have a spread of some sqrt(1e-5), which is added to their variance: of larger
 * ones of few inputs or units most of a gradient lies along the product, and is lost. */
static double spread_of(int cell, int param) {
    return cells[cell].units[RF_NORM_IH] && (param == W_IH || param == W_HH) ? 3e-3 : 1;
}

static problem make_problem(int cell, int walk, const ptrdiff_t size[4], ptrdiff_t P, int lengths) {
    problem p = {
        .shape = {cell, walks[walk].directions, size[0], size[1], size[2], size[3], P, &functions},
        .reverse = walks[walk].reverse};
    const rf_shape *s = &p.shape;
    random_state = (uint64_t)++n_problems * 1000003; /* draws that no neighbour's are like */
    p.lengths_kind = lengths_names[lengths];
    if (lengths != NO_LENGTHS) {
        p.lengths = must(malloc((size_t)(s->B + 1) * sizeof *p.lengths));
        for (ptrdiff_t b = 0; b < s->B; b++)
            p.lengths[b] = lengths == WITH_ZEROS && b % 2 == 0 ? 0 : random_below(s->T + 1);
        if (lengths == UNEVEN && s->B > 1) p.lengths[s->B / 2] = s->T;
    }
    /* Every third problem has no initial states, every fourth no biases, every fifth no dy, no
     * dh_n, no dc_n: zeros, which some runs are given as a null pointer. */
    for (int i = 0; i < N_PARAMS; i++) {
        const double scale = i == W_IH   ? spread_of(cell, i) * 1.5 / sqrt((double)s->I + 1)
                             : i == W_HH ? spread_of(cell, i) * 1.5 / sqrt((double)h_size(&p) + 1)
                             : i == PROJECTION ? 1.5 / sqrt((double)s->H + 1)
                                               : 1;
        const int zeros = ((i == H_0 || i == C_0) && n_problems % 3 == 0) ||
                          (i >= UNITS && is_bias(i - UNITS) && n_problems % 4 == 0);
        p.param[i] = random_numbers(param_count(&p, i), zeros ? 0 : scale);
    }
    for (int i = 0; i < 3; i++)
        p.seed[i] = random_numbers(result_count(&p, i), n_problems % 5 == i ? 0 : 1);
    return p;
}

static void free_problem(problem *p) {
    free(p->lengths);
    for (int i = 0; i < N_PARAMS; i++) free(p->param[i]);
    for (int i = 0; i < 3; i++) free(p->seed[i]);
}

/* Derivative of the loss along random signs, over the parameters in `which` (bits), by a difference
 * of fourth order; the same along the gradients. Relus stay open or shut, for a step might cross a
 * kink. */
static void check_gradient(const char *where, problem *p, const result *r, unsigned which) {
    static const double weights[] = {1. / 12, -2. / 3, 2. / 3, -1. / 12}, at[] = {-2, -1, 1, 2};
    double *was[N_PARAMS] = {0}, *sign[N_PARAMS] = {0};
    double along = 0, norm = 0, count = 0, difference = 0;
    for (int i = 0; i < N_PARAMS; i++) {
        if (!(which >> i & 1)) continue;
        const ptrdiff_t n = param_count(p, i);
        was[i] = p->param[i];
        sign[i] = numbers(n);
        for (ptrdiff_t j = 0; j < n; j++)
            sign[i][j] = (random_bits() >> 63 ? 1 : -1) * spread_of(p->shape.cell, i);
        if (n) {
            along += dot(sign[i], r->a[DX + i], n);
            norm += dot(r->a[DX + i], r->a[DX + i], n);
        }
        count += (double)n;
    }
    /* A normalisation of few numbers bends more. */
    const double step = (cells[p->shape.cell].units[RF_NORM_IH] ? 5e-5 : 3e-4) / sqrt(count + 1);
    for (int k = 0; k < 4; k++) {
        for (int i = 0; i < N_PARAMS; i++) {
            if (!was[i]) continue;
            const ptrdiff_t n = param_count(p, i);
            p->param[i] = numbers(n);
            for (ptrdiff_t j = 0; j < n; j++)
                p->param[i][j] = was[i][j] + at[k] * step * sign[i][j];
        }
        difference += weights[k] * loss(p) / step;
        for (int i = 0; i < N_PARAMS; i++)
            if (was[i]) {
                free(p->param[i]);
                p->param[i] = was[i];
            }
    }
    /* The loss is a sum of so many terms below one, each wrong by a few roundings. */
    const double terms = 1 + sqrt((double)(result_count(p, Y) + result_count(p, H_N)));
    const double tolerance = 1e-8 * sqrt(norm) + 2e-15 * terms / step;
    if (!(fabs(difference - along) <= tolerance)) {
        char what[200];
        snprintf(what, sizeof what,
                 "gradients of parameters %x: %.12g along random signs, a difference gives %.12g "
                 "(tolerated: %.3g off)",
                 which, along, difference, tolerance);
        fail(where, what);
    }
    for (int i = 0; i < N_PARAMS; i++) free(sign[i]);
}

static void check_padding(const char *where, const problem *p, const result *r) {
    const ptrdiff_t n[] = {p->shape.directions * h_size(p), p->shape.I};
    const int which[] = {Y, DX};
    for (int i = 0; i < 2; i++)
        for (ptrdiff_t b = 0; b < p->shape.B; b++)
            for (ptrdiff_t t = length_of(p, b); t < p->shape.T; t++)
                for (ptrdiff_t j = 0; j < n[i]; j++)
                    if (r->a[which[i]][(t * p->shape.B + b) * n[i] + j] != 0)
                        fail(where, "y or dx is not zero past a row's length");
}

static const char *isas[8]; /* to run */
static int n_isas;

/* One thread against the truth on each isa, and other threads, plans and layouts against one
 * thread. */
static void check_problem(problem *p, int each_gradient, const int *threads, int n_threads) {
    static const double forward_tolerance[] = {5e-6, 1e-13}, backward_tolerance[] = {1e-5, 1e-12};
    static const unsigned weights = ((1u << N_WEIGHTS) - 1) << DW_IH;
    result truth = naive_forward(p), first = {{0}, 0, 0};
    p->h_tape = truth.a[H_TAPE];
    for (int dtype = RF_N_DTYPES - 1; dtype >= 0; dtype--)
        for (int i = 0; i < n_isas; i++) {
            const rf_kernels *k = rf_find_kernels(isas[i], (rf_dtype)dtype);
            const variant plain = {.threads = 1, .plan = RF_PLAN_AUTO};
            const place at = describe(p, k, &plain);
            const char *const where = at.text;
            result r = run_kernels(p, k, &plain, 0);
            for (int a = Y; a <= C_TAPE; a++)
                if (r.a[a]) check_result(where, p, a, r.a[a], truth.a[a], forward_tolerance[dtype]);
            check_padding(where, p, &r);
            if (first.a[Y]) {
                for (int a = DX; a < N_RESULTS; a++)
                    if (r.a[a])
                        check_result(where, p, a, r.a[a], first.a[a], backward_tolerance[dtype]);
            } else {
                for (int a = X; a < N_PARAMS && each_gradient; a++)
                    check_gradient(where, p, &r, 1u << a);
                check_gradient(where, p, &r, (1u << N_PARAMS) - 1);
            }
            for (int j = 0; j < n_threads; j++) {
                const variant v = {
                    .threads = threads[j],
                    .plan = (const int[]){RF_PLAN_BATCH, RF_PLAN_UNITS, RF_PLAN_SERIAL,
                                          RF_PLAN_AUTO, RF_PLAN_DIRECTIONS}[random_below(5)],
                    .x_layout = (int)random_below(3),
                    .y_layout = (int)random_below(3),
                    .odd = (int)random_below(2),
                    .inference = random_below(4) == 0,
                    .alias = (int)random_below(2),
                    .unwanted =
                        (const unsigned[]){0, weights, (~0u << DX) & ~weights,
                                           ~0u << DX & (unsigned)random_bits()}[random_below(4)],
                };
                result other = run_kernels(p, k, &v, 1);
                check_same_bits(describe(p, k, &v).text, p, &other, &r);
                result_free(&other);
            }
            const variant sliced = {.threads = 1 + (int)random_below(3),
                                    .plan = (const int[]){RF_PLAN_BATCH, RF_PLAN_UNITS,
                                                          RF_PLAN_DIRECTIONS}[random_below(3)],
                                    .x_layout = (int)random_below(3),
                                    .y_layout = (int)random_below(3),
                                    .odd = (int)random_below(2)};
            result slices = run_sliced(p, k, &sliced);
            check_same_bits(describe(p, k, &sliced).text, p, &slices, &r);
            result_free(&slices);
            if (first.a[Y])
                result_free(&r);
            else
                first = r;
        }
    p->h_tape = NULL;
    result_free(&truth);
    result_free(&first);
}

/* Thinned out if quick, without the differences. */
static void check_small(int quick) {
    static const ptrdiff_t sizes[4][3] = {{0, 1, 7}, {1, 5}, {1, 9}, {1, 3, 17}}; /* T B I H */
    static const int threads[] = {1, 2, 3, 7};
    for (int cell = 0; cell < RF_N_CELLS; cell++)
        for (int walk = 0; walk < N_WALKS; walk++)
            for (int lengths = 0; lengths < N_LENGTHS; lengths++)
                for (int i = 0; i < 3 * 2 * 2 * 3; i++) {
                    const ptrdiff_t size[4] = {sizes[0][i % 3], sizes[1][i / 3 % 2],
                                               sizes[2][i / 6 % 2], sizes[3][i / 12]};
                    if (quick && (i + walk + lengths + cell) % 7) continue;
                    problem p =
                        make_problem(cell, walk, size, some_projection(cell, size[3]), lengths);
                    check_problem(&p, !quick, threads, 4);
                    free_problem(&p);
                }
}

/* Sizes beyond the chunks of steps, the panels of sums, the blocks of rows and the groups of units;
 * and no steps, or one row, of more than a group. */
static void check_large(int quick) {
    static const ptrdiff_t sizes[][4] = {{40, 33, 130, 67}, {3, 300, 5, 40}, {260, 2, 270, 24},
                                         {2, 7, 20, 290},   {300, 1, 1, 1},  {9, 100, 3, 65},
                                         {0, 1, 5, 70},     {7, 1, 9, 140}};
    const int n_sizes = (int)(sizeof sizes / sizeof *sizes);
    static const int threads[] = {2, 3, 7};
    for (int cell = 0, i = 0; cell < RF_N_CELLS; cell++)
        for (int walk = 0; walk < N_WALKS; walk++)
            for (int lengths = 0; lengths < N_LENGTHS; lengths++, i++) {
                if (quick && i % 3) continue;
                const ptrdiff_t *const size = sizes[(i + cell) % n_sizes];
                problem p = make_problem(cell, walk, size, some_projection(cell, size[3]), lengths);
                check_problem(&p, 0, threads, 3);
                free_problem(&p);
            }
}

/* --- Callers at once ------------------------------------------------------------------------- */

typedef struct {
    const problem *p;
    const rf_kernels *k;
    const result *alone;
} concurrent;

static void *call_often(void *arg) {
    const concurrent *c = arg;
    for (int i = 0; i < 10; i++) {
        const variant v = {
            .threads = 4, .plan = i % 2 ? RF_PLAN_BATCH : RF_PLAN_UNITS, .inference = i % 3 == 0};
        result r = run_kernels(c->p, c->k, &v, 1);
        check_same_bits(describe(c->p, c->k, &v).text, c->p, &r, c->alone);
        result_free(&r);
    }
    return NULL;
}

static void check_concurrent(void) {
    static const ptrdiff_t size[4] = {20, 13, 9, 70};
    for (int cell = 0; cell < RF_N_CELLS; cell++) {
        problem p = make_problem(cell, N_WALKS - 1, size, some_projection(cell, size[3]), UNEVEN);
        const rf_kernels *k = rf_find_kernels(isas[n_isas - 1], (rf_dtype)(cell % RF_N_DTYPES));
        result alone = run_kernels(&p, k, &(variant){.threads = 1}, 1);
        concurrent c = {&p, k, &alone};
        pthread_t callers[4];
        for (int i = 0; i < 4; i++)
            if (pthread_create(&callers[i], NULL, call_often, &c))
                fail("threads", "cannot make one");
        for (int i = 0; i < 4; i++) pthread_join(callers[i], NULL);
        result_free(&alone);
        free_problem(&p);
    }
}

/* --- Ending a long call ---------------------------------------------------------------------- */

typedef struct {
    pthread_t caller;
    int polls, end_at; /* 0: never */
} poller;

static int poll_count(void *context) {
    poller *p = context;
    if (!pthread_equal(pthread_self(), p->caller)) fail("poll", "called by another thread");
    return ++p->polls == p->end_at;
}

/* A call of a second or so, of zeros: polled now and then, and ended at the third poll. */
static void check_poll(void) {
    const rf_shape s = {RF_LSTM, 1, 6000, 8, 32, 128, 0, NULL};
    const rf_kernels *k = rf_find_kernels(isas[0], RF_F32);
    const size_t states = (size_t)(s.B * s.H), rows = (size_t)(4 * s.H),
                 steps = (size_t)(s.T * s.B);
    float *x = must(calloc(steps * (size_t)s.I, 4)), *y = must(calloc(steps * (size_t)s.H, 4));
    float *gates = must(calloc(steps * rows, 4)), *dx = must(calloc(steps * (size_t)s.I, 4));
    float *h = must(calloc((steps + (size_t)s.B) * (size_t)s.H, 4));
    float *c = must(calloc((steps + (size_t)s.B) * (size_t)s.H, 4));
    float *state = must(calloc(2 * states, 4));
    float *weights = must(calloc(rows * (size_t)(s.I + s.H), 4));
    const rf_weights w = {weights, weights + rows * (size_t)s.I, {NULL}, NULL};
    for (int threads = 1; threads <= 4; threads += 3) {
        void *pack[2], *workspace[2];
        const ptrdiff_t bytes[] = {k->forward_workspace(&s, threads),
                                   k->backward_workspace(&s, threads)};
        for (int kind = 0; kind < 2; kind++) {
            pack[kind] = NULL;
            if (posix_memalign(&pack[kind], ALIGN, (size_t)k->pack_size(&s, (rf_pack_kind)kind)) ||
                posix_memalign(&workspace[kind], ALIGN, (size_t)bytes[kind]))
                must(NULL);
            rf_run pack_run = {.threads = 1};
            k->pack(&s, (rf_pack_kind)kind, &w, pack[kind], &pack_run);
        }
        poller p = {.caller = pthread_self()};
        const rf_run run = {
            .threads = threads, .plan = RF_PLAN_BATCH, .poll = poll_count, .poll_context = &p};
        rf_forward_args f = {.shape = s,
                             .step1 = s.T,
                             .x = {x, s.B * s.I, s.I},
                             .y = {y, s.B * s.H, s.H},
                             .pack = {pack[0]},
                             .h_n = state,
                             .c_n = state + states,
                             .tape = {gates, h, c},
                             .workspace = workspace[0],
                             .run = run};
        rf_backward_args g = {.shape = s,
                              .step1 = s.T,
                              .x = f.x,
                              .dy = f.y,
                              .dx = {dx, s.B * s.I, s.I},
                              .pack = {pack[1]},
                              .tape = f.tape,
                              .grads = {{.W = weights, .R = w.R}},
                              .workspace = workspace[1],
                              .run = run};
        const char *where = threads == 1 ? "one thread" : "four threads";
        if (k->forward(&f)) fail(where, "forward ended, though poll never asked");
        if (p.polls < 3) fail(where, "a long forward called poll less than three times");
        for (int end_at = 1; end_at <= 3; end_at += 2) {
            p.polls = 0;
            p.end_at = end_at;
            if (!k->forward(&f)) fail(where, "forward ran on, though poll asked it to end");
            if (p.polls != end_at) fail(where, "forward called poll again after it asked to end");
            p.polls = 0;
            if (!k->backward(&g)) fail(where, "backward ran on, though poll asked it to end");
            if (p.polls != end_at) fail(where, "backward called poll again after it asked to end");
        }
        for (int kind = 0; kind < 2; kind++) {
            free(pack[kind]);
            free(workspace[kind]);
        }
    }
    float *const all[] = {x, y, gates, dx, h, c, state, weights};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* --- Layers side by side --------------------------------------------------------------------- */

enum { MAX_LAYERS = 5 };

/* A stack's calls, with what each writes poisoned; the buffers of what comes out, in `out`. */
static void stack_calls(run_buffers *run, const problem *bottom, const problem *above, int n,
                        const rf_kernels *k, int tape, rf_forward_args *layers, buffer **out,
                        int *n_out) {
    const ptrdiff_t B = bottom->shape.B, H = bottom->shape.H, N = h_size(bottom);
    const int has_c = cells[bottom->shape.cell].has_c, Gt = cells[bottom->shape.cell].tape_gates;
    *n_out = 0;
#define OUT(name, numbers) (out[(*n_out)++] = allocate(run, name, (numbers) * k->element, 0))->data
    for (int i = 0; i < n; i++) {
        const problem *p = i == 0 ? bottom : above;
        const rf_shape *s = &p->shape;
        rf_forward_args *f = &layers[i];
        *f = (rf_forward_args){.shape = *s, .step1 = s->T, .lengths = bottom->lengths};
        f->x = i == 0 ? seq_in(run, "x", p, 0, s->I, p->param[X]) : layers[i - 1].y;
        f->y = (rf_seq){.data = OUT("y", s->T * B * N), .step = B * N, .row = N};
        f->pack[0] = run_pack(run, p, k, RF_PACK_FORWARD, 0, 1);
        f->h_0 = i % 2 ? NULL : dense_in(run, "h_0", p->param[H_0], B * N);
        f->h_n = OUT("h_n", B * N);
        if (has_c) {
            f->c_0 = i % 2 ? dense_in(run, "c_0", p->param[C_0], B * H) : NULL;
            f->c_n = OUT("c_n", B * H);
        }
        if (tape) {
            if (Gt) f->tape.gates = OUT("gates", s->T * B * Gt * H);
            f->tape.h = OUT("h_tape", (s->T + 1) * B * N);
            if (has_c) f->tape.c = OUT("c_tape", (s->T + 1) * B * H);
            for (int j = 0; j < *n_out; j++) memset(out[j]->data, 0, out[j]->bytes);
        }
        f->workspace = allocate(run, "workspace", k->forward_workspace(s, 1), 1)->data;
        f->run = (rf_run){.threads = 1};
    }
#undef OUT
}

/* Of random sizes: the bits of one layer after the other, for any slices and threads. */
static void check_waves(void) {
    for (int round = 0; round < 60 * n_isas; round++) {
        random_state = 1000 + (uint64_t)round;
        const rf_kernels *k = rf_find_kernels(isas[round % n_isas], (rf_dtype)(round / n_isas % 2));
        const int cell = (int)random_below(RF_N_CELLS), n = 2 + (int)random_below(MAX_LAYERS - 1);
        const ptrdiff_t T = 1 + random_below(40), B = 1 + random_below(3), H = 1 + random_below(40);
        /* A slice begins with the states of all rows, also those past their lengths, whose slots of
         * the tape mean nothing and so are not compared. */
        const int lengths = random_below(2) ? UNEVEN : NO_LENGTHS;
        const int tape = lengths == NO_LENGTHS && random_below(2);
        const ptrdiff_t P = cells[cell].has_c && H > 1 && round % 3 ? 1 + random_below(H - 1) : 0;
        const ptrdiff_t N = P ? P : H;
        problem bottom =
            make_problem(cell, 0, (ptrdiff_t[]){T, B, 1 + random_below(9), H}, P, lengths);
        problem above = make_problem(cell, 0, (ptrdiff_t[]){T, B, N, H}, P, lengths);
        run_buffers one = {.where = "waves", .element = k->element}, many = one;
        rf_forward_args apart[MAX_LAYERS], together[MAX_LAYERS];
        buffer *want[6 * MAX_LAYERS], *got[6 * MAX_LAYERS];
        int n_want, n_got;
        stack_calls(&one, &bottom, &above, n, k, tape, apart, want, &n_want);
        for (int i = 0; i < n; i++)
            if (k->forward(&apart[i])) fail("waves", "forward ended");
        stack_calls(&many, &bottom, &above, n, k, tape, together, got, &n_got);
        const int Gt = cells[cell].tape_gates;
        rf_wavefront_args w = {.kernels = k,
                               .layers = together,
                               .n = n,
                               .steps = 1 + random_below(T),
                               .gates_step = B * Gt * H,
                               .h_step = B * N,
                               .c_step = B * H,
                               .progress = allocate(&many, "progress", n * RF_WAVE_BYTES, 1)->data,
                               .run = {.threads = 1 + (int)random_below(5)}};
        if (rf_wavefront(&w)) fail("waves", "ended early, without a poll");
        for (int i = 0; i < n_want; i++)
            if (memcmp(want[i]->data, got[i]->data, want[i]->bytes))
                fail("waves", "layers side by side have other bits than one after the other");
        check_inputs(&one);
        check_inputs(&many);
        release(&one);
        release(&many);
        free_problem(&bottom);
        free_problem(&above);
        n_runs++;
    }
}

/* --- The closed loop ------------------------------------------------------------------------- */

enum { LOOP_LAYERS = 2 };

/* A loop's own results, each a buffer, in the order in which they are compared. */
typedef struct {
    buffer *all[40];
    int n;
    buffer *x, *o, *tokens, *h[LOOP_LAYERS], *gates[LOOP_LAYERS], *h_tape[LOOP_LAYERS],
        *c_tape[LOOP_LAYERS], *state[LOOP_LAYERS][2], *dx, *d_o, *dh, *d_state[LOOP_LAYERS][2];
} loop_results;

typedef struct {
    int n, choice, one_hot;
    ptrdiff_t O;
    problem layer[LOOP_LAYERS];
    double *weight, *bias, *table, *x, *d_o;
    uint8_t *own;
} loop_problem;

static buffer *loop_out(run_buffers *run, loop_results *r, const char *name, ptrdiff_t n) {
    return r->all[r->n++] = allocate(run, name, n * run->element, 0);
}

static buffer *loop_in_out(run_buffers *run, loop_results *r, const char *name,
                           const double *values, ptrdiff_t n) {
    buffer *b = loop_out(run, r, name, n);
    for (ptrdiff_t i = 0; i < n; i++) put_number(run, b->data, i, values[i]);
    return b;
}

/* Forward; of values also backward. */
static loop_results run_loop(run_buffers *run, const loop_problem *q, const rf_kernels *k,
                             int threads, int plan) {
    const rf_shape *s = &q->layer[0].shape;
    const ptrdiff_t T = s->T, B = s->B, H = s->H, N = h_size(&q->layer[0]), O = q->O, I = s->I;
    const int Gt = cells[s->cell].tape_gates, has_c = cells[s->cell].has_c;
    const int values = q->choice == RF_VALUE, width = q->one_hot ? 1 : (int)I;
    rf_run how = {.threads = threads, .plan = plan};
    loop_results r = {.n = 0};
    rf_forward_args layers[LOOP_LAYERS];
    rf_backward_args back[LOOP_LAYERS];
    for (int i = 0; i < q->n; i++) {
        const problem *p = &q->layer[i];
        rf_shape one = p->shape;
        one.T = 1;
        r.state[i][0] = loop_in_out(run, &r, "h", p->param[H_0], B * N);
        if (has_c) r.state[i][1] = loop_in_out(run, &r, "c", p->param[C_0], B * H);
        rf_forward_args *f = &layers[i];
        *f = (rf_forward_args){.shape = one, .step1 = 1, .one_hot = i == 0 && q->one_hot};
        f->pack[0] = run_pack(run, p, k, RF_PACK_FORWARD, 0, 1);
        f->h_n = r.state[i][0]->data;
        f->c_n = has_c ? r.state[i][1]->data : NULL;
        f->x.row = f->y.row = N;
        f->workspace = allocate(run, "workspace", k->forward_workspace(&one, threads), 1)->data;
        if (!values) continue;
        if (Gt) f->tape.gates = (r.gates[i] = loop_out(run, &r, "gates", T * B * Gt * H))->data;
        f->tape.h = (r.h_tape[i] = loop_out(run, &r, "h_tape", (T + 1) * B * N))->data;
        if (has_c) f->tape.c = (r.c_tape[i] = loop_out(run, &r, "c_tape", (T + 1) * B * H))->data;
        if (i + 1 < q->n) f->y.data = (r.h[i] = loop_out(run, &r, "y", T * B * N))->data;
    }
    r.x = loop_in_out(run, &r, "x", q->x, (values ? T : 1) * B * width);
    layers[0].x = (rf_seq){.data = r.x->data, .row = width};
    r.o = loop_out(run, &r, "o", T * B * O);
    void *weight = dense_in(run, "head", q->weight, O * N);
    void *bias = q->bias ? dense_in(run, "head bias", q->bias, O) : NULL;
    void *pack[2];
    for (int kind = 0; kind < 2; kind++) {
        buffer *b = allocate(run, "head pack", k->head_pack_size(N, O, (rf_pack_kind)kind), 1);
        k->head_pack(N, O, (rf_pack_kind)kind, weight, bias, pack[kind] = b->data, &how);
        protect(b);
    }
    buffer *own = NULL;
    if (q->own) {
        own = allocate(run, "own", T * B, 0);
        memcpy(own->data, q->own, own->bytes);
        protect(own);
    }
    rf_loop_args f = {.layers = layers, .n = q->n, .steps = T, .run = how};
    f.x_step = values ? B * I : 0;
    f.o_step = B * O;
    f.tokens_step = f.own_step = B;
    f.gates_step = B * Gt * H;
    f.h_step = B * N;
    f.c_step = B * H;
    f.workspace = allocate(run, "loop", k->loop_workspace(q->n, B, N, O), 1)->data;
    f.head = (rf_head){.B = B,
                       .N = N,
                       .O = O,
                       .I = I,
                       .pack = pack[0],
                       .o = r.o->data,
                       .o_row = O,
                       .choice = q->choice,
                       .temperature = 0.8,
                       .key = 17,
                       .x = (char *)r.x->data + f.x_step * k->element,
                       .x_row = width};
    if (!values) {
        r.tokens = r.all[r.n++] = allocate(run, "tokens", T * B * (ptrdiff_t)sizeof(ptrdiff_t), 1);
        f.head.tokens = (ptrdiff_t *)(void *)r.tokens->data;
        f.head.tokens_row = 1;
        if (q->table) f.head.table = dense_in(run, "table", q->table, O * I);
    }
    if (own) f.head.own = (uint8_t *)own->data + B;
    if (k->loop(&f) != RF_LOOP_DONE) fail(run->where, "the loop ended early");
    n_runs++;
    if (!values) return r;

    r.d_o = loop_in_out(run, &r, "d_o", q->d_o, T * B * O);
    r.dx = loop_out(run, &r, "dx", T * B * I);
    r.dh = loop_out(run, &r, "dh", T * B * N);
    for (int i = 0; i < q->n; i++) {
        const problem *p = &q->layer[i];
        rf_backward_args *g = &back[i];
        *g = (rf_backward_args){.shape = layers[i].shape, .step1 = 1};
        g->pack[0] = run_pack(run, p, k, RF_PACK_BACKWARD, 0, 1);
        r.d_state[i][0] = loop_in_out(run, &r, "dh_0", p->seed[1], B * N);
        g->dh_0 = r.d_state[i][0]->data;
        if (has_c) {
            r.d_state[i][1] = loop_in_out(run, &r, "dc_0", p->seed[2], B * H);
            g->dc_0 = r.d_state[i][1]->data;
        }
        g->tape.gates = Gt ? r.gates[i]->data : NULL;
        g->tape.h = r.h_tape[i]->data;
        g->tape.c = has_c ? r.c_tape[i]->data : NULL;
        g->dx.data = i == 0 ? (void *)r.dx->data : dense_out(run, "dx of a step", B * N);
        g->dx.row = i == 0 ? I : N;
        g->workspace =
            allocate(run, "workspace", k->backward_workspace(&g->shape, threads), 1)->data;
    }
    rf_loop_backward_args g = {.layers = back, .n = q->n, .steps = T, .run = how};
    g.dx_step = B * I;
    g.d_o_step = B * O;
    g.dh_step = f.h_step;
    g.own_step = B;
    g.gates_step = f.gates_step;
    g.h_step = f.h_step;
    g.c_step = f.c_step;
    g.workspace = f.workspace;
    g.head = (rf_head_backward){
        .B = B, .N = N, .O = O, .pack = pack[1], .d_o = r.d_o->data, .dx_row = I, .dh = r.dh->data};
    if (own) g.head.own = (uint8_t *)own->data + B;
    if (k->loop_backward(&g) != RF_LOOP_DONE) fail(run->where, "the loop back ended early");
    return r;
}

/* One row of o from the h that the tape has, and what became of both. */
static void check_loop_values(const run_buffers *run, const loop_problem *q,
                              const loop_results *r) {
    const rf_shape *s = &q->layer[0].shape;
    const ptrdiff_t T = s->T, B = s->B, I = s->I, N = h_size(&q->layer[0]), O = q->O;
    const double tolerance = run->element == 4 ? 1e-5 : 1e-13;
    double *want = numbers(O + N), *got = numbers(O + N);
    for (ptrdiff_t t = 0; t < T; t++)
        for (ptrdiff_t b = 0; b < B; b++) {
            const ptrdiff_t row = t * B + b;
            const int fed_back = t + 1 < T && (!q->own || q->own[row + B]);
            for (ptrdiff_t j = 0; j < O; j++) {
                want[j] = q->bias ? q->bias[j] : 0;
                for (ptrdiff_t i = 0; i < N; i++)
                    want[j] += q->weight[j * N + i] *
                               get_number(run, r->h_tape[q->n - 1]->data, (row + B) * N + i);
                got[j] = get_number(run, r->o->data, row * O + j);
                const double next = t + 1 < T ? get_number(run, r->x->data, (row + B) * I + j) : 0;
                if (t + 1 < T && next != (fed_back ? got[j] : q->x[(row + B) * I + j]))
                    fail(run->where, "an input is not the output before");
            }
            check_block(run->where, "o", got, want, O, tolerance, 0.1);
            for (ptrdiff_t j = 0; j < O; j++) {
                want[j] = q->d_o[row * O + j];
                if (fed_back) want[j] += get_number(run, r->dx->data, (row + B) * I + j);
                got[j] = get_number(run, r->d_o->data, row * O + j);
            }
            check_block(run->where, "d_o", got, want, O, tolerance, 0.1);
            for (ptrdiff_t i = 0; i < N; i++) {
                want[O + i] = 0;
                for (ptrdiff_t j = 0; j < O; j++) want[O + i] += got[j] * q->weight[j * N + i];
                got[O + i] = get_number(run, r->dh->data, row * N + i);
            }
            check_block(run->where, "dh", got + O, want + O, N, tolerance, 0.1);
        }
    free(want);
    free(got);
}

/* Layer by layer over all steps, now that all inputs are known: the same bits. */
static void check_loop_layers(run_buffers *run, const loop_problem *q, const rf_kernels *k,
                              const loop_results *r) {
    const rf_shape *s = &q->layer[0].shape;
    const ptrdiff_t T = s->T, B = s->B, H = s->H, N = h_size(&q->layer[0]);
    const int has_c = cells[s->cell].has_c;
#define SAME(buffer, other, bytes)                                                                 \
    if (memcmp(buffer, other, bytes)) fail(run->where, "a loop has other bits than its layers")
    for (int i = 0; i < q->n; i++) {
        const problem *p = &q->layer[i];
        rf_forward_args f = {.shape = p->shape, .step1 = T, .run = {.threads = 1}};
        f.pack[0] = run_pack(run, p, k, RF_PACK_FORWARD, 0, 1);
        f.x = (rf_seq){
            .data = i ? r->h[i - 1]->data : r->x->data, .step = B * p->shape.I, .row = p->shape.I};
        f.y = (rf_seq){.data = dense_out(run, "y", T * B * N), .step = B * N, .row = N};
        f.h_0 = dense_in(run, "h_0", p->param[H_0], B * N);
        f.h_n = dense_out(run, "h_n", B * N);
        if (has_c) {
            f.c_0 = dense_in(run, "c_0", p->param[C_0], B * H);
            f.c_n = dense_out(run, "c_n", B * H);
        }
        f.workspace = allocate(run, "workspace", k->forward_workspace(&f.shape, 1), 1)->data;
        k->forward(&f);
        SAME(f.y.data, r->h_tape[i]->data + B * N * k->element, T * B * N * k->element);
        if (i + 1 < q->n) SAME(f.y.data, r->h[i]->data, r->h[i]->bytes);
        SAME(f.h_n, r->state[i][0]->data, r->state[i][0]->bytes);
        if (has_c) SAME(f.c_n, r->state[i][1]->data, r->state[i][1]->bytes);
    }
    void *dy = r->dh->data;
    for (int i = q->n - 1; i >= 0; i--) {
        const problem *p = &q->layer[i];
        rf_backward_args g = {.shape = p->shape, .step1 = T, .run = {.threads = 1}};
        g.pack[0] = run_pack(run, p, k, RF_PACK_BACKWARD, 0, 1);
        g.tape = (rf_tape){cells[s->cell].tape_gates ? r->gates[i]->data : NULL, r->h_tape[i]->data,
                           has_c ? r->c_tape[i]->data : NULL};
        g.dy = (rf_seq){.data = dy, .step = B * N, .row = N};
        g.dx = (rf_seq){.data = dense_out(run, "dx", T * B * p->shape.I),
                        .step = B * p->shape.I,
                        .row = p->shape.I};
        g.dh_n = dense_in(run, "dh_n", p->seed[1], B * N);
        g.dh_0 = dense_out(run, "dh_0", B * N);
        if (has_c) {
            g.dc_n = dense_in(run, "dc_n", p->seed[2], B * H);
            g.dc_0 = dense_out(run, "dc_0", B * H);
        }
        g.workspace = allocate(run, "workspace", k->backward_workspace(&g.shape, 1), 1)->data;
        k->backward(&g);
        SAME(g.dh_0, r->d_state[i][0]->data, r->d_state[i][0]->bytes);
        if (has_c) SAME(g.dc_0, r->d_state[i][1]->data, r->d_state[i][1]->bytes);
        if (i == 0) SAME(g.dx.data, r->dx->data, r->dx->bytes);
        dy = g.dx.data;
    }
#undef SAME
}

/* Each token is a greatest logit's, or, drawn, one at all; the last input left is its own. */
static void check_loop_tokens(const run_buffers *run, const loop_problem *q,
                              const loop_results *r) {
    const rf_shape *s = &q->layer[0].shape;
    const ptrdiff_t T = s->T, B = s->B, I = s->I, O = q->O;
    for (ptrdiff_t row = 0; row < T * B; row++) {
        const ptrdiff_t token = ((ptrdiff_t *)(void *)r->tokens->data)[row];
        if (token < 0 || token >= O) fail(run->where, "a token is none");
        const double chosen = get_number(run, r->o->data, row * O + token);
        for (ptrdiff_t j = 0; j < O && q->choice == RF_ARGMAX; j++) {
            const double o = get_number(run, r->o->data, row * O + j);
            if (o > chosen || (j < token && o == chosen))
                fail(run->where, "a token is not the first of the greatest");
        }
        const ptrdiff_t b = row - (T - 2) * B; /* of the last step's input */
        for (ptrdiff_t i = 0; 0 <= b && b < B && i < (q->one_hot ? 1 : I); i++)
            if (get_number(run, r->x->data, b * (q->one_hot ? 1 : I) + i) !=
                (q->one_hot ? (double)token : q->table[token * I + i]))
                fail(run->where, "an input is not that of the token before");
    }
}

static void check_loops(void) {
    for (int round = 0; round < 120 * n_isas; round++) {
        const rf_kernels *k = rf_find_kernels(isas[round % n_isas], (rf_dtype)(round / n_isas % 2));
        const int kind = round / n_isas / 2 % 4; /* values twice as often */
        random_state = 2000 + (uint64_t)round;
        loop_problem q = {.n = 1 + (int)random_below(LOOP_LAYERS),
                          .choice = kind < 2    ? RF_VALUE
                                    : kind == 2 ? RF_ARGMAX
                                                : RF_SAMPLE};
        const int cell = (int)random_below(RF_N_CELLS);
        const ptrdiff_t T = 1 + random_below(7), B = 1 + random_below(7), H = 1 + random_below(70);
        const ptrdiff_t P =
            cells[cell].has_c && H > 1 && random_below(2) ? 1 + random_below(H - 1) : 0;
        q.O = 1 + random_below(round % 3 ? 20 : 150);
        q.one_hot = kind >= 2 && random_below(2);
        const ptrdiff_t I = q.one_hot  ? q.O
                            : kind < 2 ? q.O + random_below(2) * random_below(9)
                                       : 1 + random_below(20);
        const ptrdiff_t N = P ? P : H;
        const int some_own = kind == 1, with_bias = random_below(4) > 0;
        for (int i = 0; i < q.n; i++)
            q.layer[i] = make_problem(cell, 0, (ptrdiff_t[]){T, B, i ? N : I, H}, P, NO_LENGTHS);
        q.weight = random_numbers(q.O * N, 1.5 / sqrt((double)N));
        q.bias = with_bias ? random_numbers(q.O, 1) : NULL;
        q.table = kind >= 2 && !q.one_hot ? random_numbers(q.O * I, 1) : NULL;
        q.x = random_numbers(T * B * I, 1);
        for (ptrdiff_t b = 0; q.one_hot && b < B; b++) q.x[b] = (double)random_below(q.O);
        q.d_o = random_numbers(T * B * q.O, 1);
        if (some_own) {
            q.own = must(malloc((size_t)(T * B)));
            for (ptrdiff_t i = 0; i < T * B; i++) q.own[i] = (uint8_t)random_below(2);
        }
        run_buffers one = {.where = "loops", .element = k->element, .odd = round & 1};
        const loop_results want = run_loop(&one, &q, k, 1, RF_PLAN_AUTO);
        if (q.choice == RF_VALUE) {
            run_buffers apart = {.where = "loops", .element = k->element};
            check_loop_values(&one, &q, &want);
            check_loop_layers(&apart, &q, k, &want);
            check_inputs(&apart);
            release(&apart);
        } else {
            check_loop_tokens(&one, &q, &want);
        }
        for (int plan = 0; plan < RF_PLAN_DIRECTIONS; plan++) {
            run_buffers many = {.where = "loops", .element = k->element};
            const loop_results got = run_loop(&many, &q, k, 2 + plan, plan);
            for (int i = 0; i < want.n; i++)
                if (memcmp(want.all[i]->data, got.all[i]->data, want.all[i]->bytes))
                    fail("loops", "threads or a plan change a loop's bits");
            check_inputs(&many);
            release(&many);
        }
        check_inputs(&one);
        release(&one);
        for (int i = 0; i < q.n; i++) free_problem(&q.layer[i]);
        double *const all[] = {q.weight, q.bias, q.table, q.x, q.d_o};
        for (int i = 0; i < 5; i++) free(all[i]);
        free(q.own);
    }
}

/* --- The rest of the table ------------------------------------------------------------------- */

static void check_sizes(const rf_kernels *k) {
    const ptrdiff_t huge[] = {PTRDIFF_MAX, PTRDIFF_MAX / 2, PTRDIFF_MAX / 4 + 1, PTRDIFF_MAX / 64};
    for (int i = 0; i < 4; i++)
        for (int kind = 0; kind < 2; kind++) {
            const rf_shape wide = {RF_LSTM, 1, 1, 1, 1, huge[i], 0, NULL},
                           deep = {RF_LSTM, 1, 1, 1, huge[i], 1, 0, NULL};
            const rf_shape narrow = {RF_LSTM, 1, 1, 1, 1, huge[i], huge[i] / 2, NULL};
            const rf_shape many = {RF_LSTM, 1, 1, huge[i], 1, 1, 0, NULL},
                           long_ = {RF_LSTM, 1, huge[i], 1, 1, 1, 0, NULL};
            if (k->pack_size(&wide, (rf_pack_kind)kind) != -1 ||
                k->pack_size(&deep, (rf_pack_kind)kind) != -1 ||
                k->pack_size(&narrow, (rf_pack_kind)kind) != -1)
                fail(k->isa, "pack_size does not see that a size overflows");
            ptrdiff_t (*const workspace)(const rf_shape *, int) =
                kind ? k->backward_workspace : k->forward_workspace;
            if (k->head_pack_size(huge[i], 64, (rf_pack_kind)kind) != -1 ||
                k->head_pack_size(64, huge[i], (rf_pack_kind)kind) != -1 ||
                k->loop_workspace(1, huge[i], 64, 64) != -1 ||
                k->loop_workspace(1, 1, 64, huge[i]) != -1)
                fail(k->isa, "a head's size does not see that it overflows");
            if (workspace(&wide, 2) != -1 || workspace(&deep, 2) != -1 || workspace(&many, 2) != -1)
                fail(k->isa, "a workspace does not see that a size overflows");
            const rf_shape shorter = {RF_LSTM, 1, 1000000, 1, 1, 1, 0, NULL};
            if (workspace(&long_, 2) != workspace(&shorter, 2))
                fail(k->isa, "a workspace grows with the number of steps");
        }
}

static double expm1_below(double x) { return expm1(fmin(x, 0)); }

static void check_vmath(const rf_kernels *k, int dtype) {
    double (*const truth[])(double) = {exp, tanh, sigmoid, expm1_below, softplus};
    for (int f = 0; f < RF_N_VMATH; f++)
        for (ptrdiff_t n = 0; n < 40; n++) {
            run_buffers run = {.where = k->isa, .element = k->element, .odd = n & 1};
            random_state = (uint64_t)n;
            double *x = random_numbers(n, 9), *y = numbers(n);
            for (ptrdiff_t i = 0; i < n; i++) y[i] = truth[f](x[i]);
            const void *in = dense_in(&run, "in", x, n);
            void *out = dense_out(&run, "out", n);
            k->vmath((rf_vmath_id)f, n, in, out);
            double *got = dense_result(&run, out, n);
            for (ptrdiff_t i = 0; i < n; i++)
                check_block(k->isa, "vmath", got + i, y + i, 1, dtype == RF_F32 ? 3e-7 : 1e-15, 0);
            check_inputs(&run);
            release(&run);
            free(x);
            free(y);
            free(got);
        }
}

/* Kept or dropped, scaled; as many as p says; the same mask for each part of a batch by itself. */
static void check_dropout(const rf_kernels *k) {
    const problem p = {.shape = {RF_LSTM, 1, 9, 40, 1, 1, 0, NULL}};
    const ptrdiff_t T = 9, B = 40, N = 31;
    random_state = 1;
    double *x = random_numbers(T * B * N, 1);
    for (int i = 0; i < 3; i++) {
        const double rate = 0.25 * i;
        run_buffers run = {.where = k->isa, .element = k->element, .odd = i & 1};
        rf_run dropout_run = {.threads = 1 + i};
        rf_seq in = seq_in(&run, "in", &p, i, N, x), out = seq_out(&run, "out", &p, 2 - i, N);
        k->dropout(T, B, N, in, out, rate, 12345, &dropout_run);
        double *y = seq_result(&run, &p, &out, N), dropped = 0;
        for (ptrdiff_t j = 0; j < T * B * N; j++) {
            if (y[j] == 0 && x[j] != 0)
                dropped++;
            else
                check_block(k->isa, "dropout", &y[j], &(double){x[j] / (1 - rate)}, 1, 2e-7, 0);
        }
        const double n = (double)(T * B * N), sigma = sqrt(n * rate * (1 - rate));
        if (fabs(dropped - n * rate) > 5 * sigma) fail(k->isa, "dropout drops too many or too few");
        check_inputs(&run);
        release(&run);
        free(y);
    }
    free(x);
}

static void check_tables(void) {
    if (rf_find_kernels("sse17", RF_F32) || rf_find_kernels("", RF_F32) ||
        rf_find_kernels(NULL, RF_F32) || rf_find_kernels("base", RF_N_DTYPES))
        fail("rf_find_kernels", "answers for what there is not");
    const rf_kernels *best = NULL;
    for (int i = 0; rf_isas[i]; i++)
        for (int dtype = 0; dtype < RF_N_DTYPES; dtype++) {
            const rf_kernels *k = rf_find_kernels(rf_isas[i], (rf_dtype)dtype);
            if (k == NULL) continue;
            if (strcmp(k->isa, rf_isas[i]) || k->element != (dtype == RF_F32 ? 4 : 8))
                fail(rf_isas[i], "its table says that it is another");
            check_sizes(k);
            check_vmath(k, dtype);
            check_dropout(k);
            if (dtype == RF_F32) best = k;
        }
    if (best == NULL || rf_find_kernels("auto", RF_F32) != best)
        fail("auto", "is not the best isa");
}

int main(int argc, char **argv) {
    static const char *const parts[] = {"tables", "small", "large", "concurrent",
                                        "poll",   "waves", "loops"};
    unsigned which = 0;
    int quick = 0;
    alarm(1800); /* a hang ends */
    for (int i = 1; i < argc; i++) {
        const unsigned before = which;
        for (int j = 0; j < 7; j++)
            if (strcmp(argv[i], parts[j]) == 0) which |= 1u << j;
        if (strcmp(argv[i], "quick") == 0) {
            quick = 1;
        } else if (which == before) {
            if (!rf_find_kernels(argv[i], RF_F32)) {
                fprintf(stderr, "driver: %s is neither a part nor an isa of this CPU\n", argv[i]);
                return 2;
            }
            isas[n_isas++] = argv[i];
        }
    }
    if (which == 0) which = ~0u;
    for (int i = 0, all = n_isas == 0; all && rf_isas[i]; i++)
        if (rf_find_kernels(rf_isas[i], RF_F32)) isas[n_isas++] = rf_isas[i];

    if (which & 1) check_tables();
    if (which & 2) check_small(quick);
    if (which & 4) check_large(quick);
    if (which & 8) check_concurrent();
    if (which & 16) check_poll();
    if (which & 32) check_waves();
    if (which & 64) check_loops();
    printf("kernels: all well; %ld problems, %ld runs on", n_problems, atomic_load(&n_runs));
    for (int i = 0; i < n_isas; i++) printf(" %s", isas[i]);
    printf("\n");
    return 0;
}
