/* kernels.h: the argument structs and the table of kernels; the whole interface of csrc.
 * Knows sizes and pointers. Callers (the Cython layer, the C driver) own all memory, check all
 * arguments and overflow of sizes; kernels do not allocate, do not fail and keep no pointer. */
#ifndef RF_KERNELS_H
#define RF_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#define RF_MAX_DIRECTIONS 2
#define RF_MAX_SETTINGS 2

/* Numbers as in rnnfast/cells.py. */
typedef enum {
    RF_RNN_TANH,
    RF_RNN_RELU,
    RF_LSTM,
    RF_GRU,              /* reset after the product with R (PyTorch) */
    RF_GRU_RESET_BEFORE, /* reset before it (ONNX's default) */
    RF_LSTM_PEEPHOLE,
    RF_LSTM_COUPLED, /* forget gate 1 - input gate */
    RF_LSTM_COUPLED_PEEPHOLE,
    RF_RNN_TANH_NORM, /* layer normalisation of W x and of R h, over all gates of a row */
    RF_RNN_RELU_NORM,
    RF_LSTM_NORM,      /* and of c on its way into h */
    RF_LSTM_NORM_CELL, /* and of the c that is carried on */
    RF_GRU_NORM,       /* reset after the product */
    RF_RNN_GENERAL,    /* from here on: any activations and clips, an rf_functions */
    RF_LSTM_GENERAL,
    RF_LSTM_PEEPHOLE_GENERAL,
    RF_LSTM_COUPLED_GENERAL,
    RF_LSTM_COUPLED_PEEPHOLE_GENERAL,
    RF_GRU_GENERAL,
    RF_GRU_RESET_BEFORE_GENERAL,
    RF_N_CELLS
} rf_cell_id;

typedef enum { RF_F32, RF_F64, RF_N_DTYPES } rf_dtype;
/* Who does what. */
typedef enum {
    RF_PLAN_AUTO,       /* one of the others */
    RF_PLAN_SERIAL,     /* one worker all */
    RF_PLAN_BATCH,      /* each some rows of the batch */
    RF_PLAN_UNITS,      /* each some hidden units */
    RF_PLAN_DIRECTIONS, /* each a direction; forward alone, else batch */
    RF_PLAN_WAVEFRONT,  /* several layers, see wavefront.h; in a call of one layer, batch */
    RF_N_PLANS
} rf_plan;
typedef enum { RF_PACK_FORWARD, RF_PACK_BACKWARD } rf_pack_kind;
typedef enum { RF_EXP, RF_TANH, RF_SIGMOID, RF_EXPM1, RF_SOFTPLUS, RF_N_VMATH } rf_vmath_id;

/* ONNX's activations, with its alpha and beta; equations in rnnfast/reference.py. */
typedef enum {
    RF_ACT_SIGMOID,
    RF_ACT_TANH,
    RF_ACT_RELU,
    RF_ACT_AFFINE,
    RF_ACT_LEAKY_RELU,
    RF_ACT_THRESHOLDED_RELU,
    RF_ACT_SCALED_TANH,
    RF_ACT_HARD_SIGMOID,
    RF_ACT_ELU,
    RF_ACT_SOFTSIGN,
    RF_ACT_SOFTPLUS,
    RF_N_ACTIVATIONS
} rf_activation_id;

typedef struct {
    int id; /* rf_activation_id */
    double alpha, beta;
} rf_activation;

/* What a general cell computes with: f of an RNN; f, g of a GRU; f, g, h of an LSTM. What f and g
 * are taken of is held within -clip and clip, the new c of an LSTM within -cell_clip and cell_clip;
 * infinity: no limit. */
typedef struct {
    rf_activation of[3];
    double clip, cell_clip;
} rf_functions;

/* Sizes of one layer. */
typedef struct {
    int cell;       /* rf_cell_id */
    int directions; /* D: 1 or 2 */
    ptrdiff_t T, B, I, H;
    ptrdiff_t P; /* h is projected to so many numbers, fewer than H; 0: it is not, and has H */
    const rf_functions *functions; /* of a general cell, for as long as a call runs */
} rf_shape;

/* A sequence [T, B, N] as a base and two strides in elements; the last stride is 1. Or packed: the
 * rows that run at step 0, those that run at step 1, and so on, one after the other and `row`
 * apart, without padding; row b must be no longer than row b - 1, and not all equally long. */
typedef struct {
    void *data; /* NULL: absent */
    ptrdiff_t step, row;
    const ptrdiff_t *starts; /* [T] rows before those of each step; NULL: not packed */
    /* [B] rows before those of each row of the batch, which lie one step after the other; NULL:
     * they do not. */
    const ptrdiff_t *offsets;
} rf_seq;

/* Vectors of weights of single units: of any cell the biases, the others of cells that have such.
 */
typedef enum {
    RF_BIAS_IH,   /* [G*H] */
    RF_BIAS_HH,   /* [G*H] */
    RF_PEEPHOLE,  /* [p*H] */
    RF_NORM_IH,   /* [G*H] gains of a normalised W x */
    RF_NORM_HH,   /* [G*H] and R h */
    RF_NORM_C,    /* [H] and c */
    RF_NORM_BIAS, /* [H] what is added to a normalised c */
    RF_N_UNIT_WEIGHTS
} rf_unit_weights_id;

/* Parameters of one direction, or their gradients. G gates, in the order of rnnfast/cells.py; N
 * numbers of h, P or H. Biases may be NULL (as parameters: zeros); as gradients each may (not
 * wanted). */
typedef struct {
    void *W;                               /* [G*H, I] */
    void *R;                               /* [G*H, N] */
    void *unit_weights[RF_N_UNIT_WEIGHTS]; /* by rf_unit_weights_id; NULL where the cell has none */
    void *projection;                      /* [P, H], of a shape with P */
} rf_weights;

/* Called by worker 0, now and then; nonzero asks the call to end early, its outputs void. */
typedef int (*rf_poll)(void *context);

/* How to run, and what ran. */
typedef struct {
    int threads;  /* at most this many workers */
    int plan;     /* rf_plan */
    rf_poll poll; /* or NULL */
    void *poll_context;
    int ran_plan;    /* out: any but RF_PLAN_AUTO */
    int ran_threads; /* out: workers that had work */
} rf_run;

/* A call may process a slice of the steps, [step0, step1) of 0..T in the order in which they are
 * processed: a reversed direction begins with each row's last valid step. Its states before are
 * those before step0, its states after those after step1, or after a row's last step if that comes
 * earlier. Slices in a row, each given what the one before it returned, make what one call makes,
 * to the bit; backward's at certain borders alone, see backward_panel_steps. Of the padding of y
 * and dx, a slice zeroes times [step0, step1).
 *
 * Tape of S = step1 - step0 steps, in processing order: slot s of a reversed direction is its
 * (step0 + s)-th processed step. Slots of steps past a row's length are not read, and not written
 * but for slot 0.
 * Gt tape gates, see rnnfast/cells.py. */
typedef struct {
    void *gates; /* [D, S, B, Gt, H]; NULL where Gt = 0, or no tape is kept */
    void *h;     /* [D, S+1, B, N], slot 0 = h_0; NULL: no tape is kept */
    void *c;     /* [D, S+1, B, H], or NULL where the cell has no c */
} rf_tape;

/* Numbers of a state that a step does not make, or not alone: where a byte of `where` is not 0, the
 * state after the step is the value, or, without values, the state before. */
typedef struct {
    rf_seq where;  /* in  bytes, of the shape of all steps' states; data NULL: nowhere */
    rf_seq value;  /* in  likewise, numbers; or data NULL */
    rf_seq dvalue; /* out of backward, gradient by the values, 0 where they do not count; or NULL */
} rf_setting;

/* What happens to the states between two steps beside the cell's equations. Sequences are by time,
 * [T, B, D*N] of h and [T, B, D*H] of c; their strides may be 0. */
typedef struct {
    rf_setting h[RF_MAX_SETTINGS], c[RF_MAX_SETTINGS]; /* the first is made first */
    double hold_h, hold_c; /* before these, without a tape: the share of the state before; or 0 */
    rf_seq keep; /* in  bytes: the products with R see h (and m) where these are not 0; or NULL */
    double keep_scale; /* by which what they see is multiplied */
    rf_seq c_steps; /* out of forward, in of backward: c after each step, its gradient; or NULL */
    /* Backward: what h's gradient of later steps is clipped to, number by number, or to which norm
     * over the numbers of a row; or 0. */
    double clip, clip_norm;
    rf_seq norms; /* out of backward, [T, B, D]: norm of the gradient by h; or data NULL */
} rf_between;

typedef struct {
    rf_shape shape;
    int reverse;              /* bit d: direction d runs from the last valid step to the first */
    ptrdiff_t step0, step1;   /* the slice; 0 and T: all of it */
    rf_seq x;                 /* in  [T, B, I]; if one_hot, [T, B, 1] */
    int one_hot;              /* a row of x is the place of its only 1, all else in it is 0 */
    rf_seq y;                 /* out [T, B, D*N], or data NULL; zeros past a row's length */
    const ptrdiff_t *lengths; /* in  [B], each in 0..T; NULL: all T */
    const ptrdiff_t *times; /* in  [B, T] times of each row's valid steps, ascending, then those of
                             * the others; NULL: the valid ones come first. Needs lengths */
    const rf_between *between;           /* in, or NULL: nothing */
    const void *pack[RF_MAX_DIRECTIONS]; /* in, from pack(RF_PACK_FORWARD) */
    const void *h_0, *c_0;               /* in  [D, B, N], [D, B, H], or NULL: zeros */
    void *h_n, *c_n; /* out, likewise; states at the last valid step. May alias h_0, c_0 */
    rf_tape tape;    /* out */
    void *workspace; /* forward_workspace() bytes, 64-byte aligned */
    rf_run run;
} rf_forward_args;

typedef struct {
    rf_shape shape;
    int reverse;
    ptrdiff_t step0, step1; /* the slice, which must be the tape's; 0 and T: all of it */
    int add_dx;             /* dx is added to, its padding left: it is another direction's */
    int add_grads;          /* grads are added to: they are the later slices' */
    rf_seq x;               /* in  [T, B, I]; the forward call's; data may be NULL if no dW */
    const ptrdiff_t *lengths, *times;
    const rf_between *between;
    const void *pack[RF_MAX_DIRECTIONS]; /* in, from pack(RF_PACK_BACKWARD) */
    rf_tape tape;                        /* in, never written */
    rf_seq dy; /* in  [T, B, D*N], data NULL: zeros; not read past a row's length */
    const void *dh_n,
        *dc_n;         /* in, as h_0, c_0, or NULL: zeros; of rows that end before step0 too */
    rf_seq dx;         /* out [T, B, I], or data NULL; zeros past a row's length */
    void *dh_0, *dc_0; /* out, likewise, or NULL; a row that ends before step0 has its dh_n,
                        * dc_n here. May alias dh_n, dc_n */
    rf_weights grads[RF_MAX_DIRECTIONS]; /* out, each pointer NULL if not wanted; overwritten */
    /* If D = 1, or each NULL: what those gradients are added to once they are complete, or, with
     * `replace`, where they stand instead of what was there; a call that is ended early changes
     * nothing there, and is not polled while it does. `grads` is scratch then. Not for a slice
     * without steps that follows others. Spares a pass over all of them. */
    rf_weights add_to;
    int replace;
    void *workspace; /* backward_workspace() bytes, 64-byte aligned */
    rf_run run;
} rf_backward_args;

/* What a head's o is taken for: the next input itself, or numbers of which a token is chosen, the
 * greatest one's or one drawn from softmax(o / temperature). Numbers as in closed_loop.py. */
typedef enum { RF_VALUE, RF_ARGMAX, RF_SAMPLE, RF_N_CHOICES } rf_choice;

/* One step of a head, the linear map from the h of a stack's last layer to o, and of what follows:
 * a token for each row, and the next input of the stack. */
typedef struct {
    ptrdiff_t B, N, O, I;
    const void *pack; /* in, from head_pack(RF_PACK_FORWARD) */
    void *o;          /* out [B, O], rows o_row apart, or NULL */
    ptrdiff_t o_row;
    int choice;        /* rf_choice */
    ptrdiff_t *tokens; /* out [B], tokens_row apart, each in 0..O-1; or -1 where o has no greatest
                        * number (a NaN is there), or nothing can be drawn (nor where it is
                        * infinite). Not written if RF_VALUE */
    ptrdiff_t tokens_row;
    double temperature; /* RF_SAMPLE: greater than 0 in this precision */
    uint64_t key;       /* RF_SAMPLE: what a row draws depends on key, t and row0 + row alone */
    uint64_t t, row0;
    const void *table; /* in  [O, I] inputs by token; NULL: a token stands for itself, one-hot */
    void *x;           /* out [B, I], rows x_row apart, or NULL: the next input. RF_VALUE: its first
                        * O numbers alone are written. One-hot: [B, 1]. Of token -1 not written */
    ptrdiff_t x_row;
    const uint8_t *own; /* in [B], RF_VALUE: which rows of x are written; NULL: all */
} rf_head;

/* The same backward: what o is to the loss, and h. */
typedef struct {
    ptrdiff_t B, N, O;
    const void *pack; /* in, from head_pack(RF_PACK_BACKWARD) */
    void *d_o;        /* in, out [B, O]: by o as a result; then as the next input, too */
    const void *dx;   /* in  [B, >= O], rows dx_row apart: by the next input; NULL: there is none */
    ptrdiff_t dx_row;
    const uint8_t *own; /* in [B]: which rows of the next input were o; NULL: all */
    void *dh;           /* out [B, N] */
} rf_head_backward;

/* A stack of layers whose output is its own next input, by way of a head, step by step. */
typedef struct {
    /* [n] The lowest first, each as for a call of one step, D = 1. The states before the first step
     * are in h_n and c_n, and those after the last one come there; h_0, c_0, run and, but for the
     * lowest, x are not read. y: for a tape of the layer above, whose x it is, else absent. All may
     * share a workspace. Changed: they are those of the step at hand. */
    rf_forward_args *layers;
    int n;
    ptrdiff_t steps;
    rf_head head; /* as of the first step; x, the second one's */
    /* Numbers from one step to the next: of the lowest layer's x and the head's, of o, tokens, own;
     * of a tape's gates, h (and y) and c. */
    ptrdiff_t x_step, o_step, tokens_step, own_step, gates_step, h_step, c_step;
    void *workspace;                   /* loop_workspace() bytes, 64-byte aligned */
    ptrdiff_t failed_step, failed_row; /* out: where there was no token to choose */
    rf_run run;
} rf_loop_args;

/* The same backward, from the gradient by each step's o as a result to all that reaches it; to dh
 * by the last layer's h through o; to dx, and the initial states. */
typedef struct {
    /* [n] As for backward of one step, the first one's, each with its part of the tape. No
     * gradients of weights: they are an ordinary call's, given dh. What comes from the steps after
     * is in dh_0 and dc_0, and what goes to those before comes there; dh_n, dc_n, dy and run are
     * not read. dx of the lowest is [steps, B, I]; of the others, a step's. */
    const rf_backward_args *layers;
    int n;
    ptrdiff_t steps;
    rf_head_backward head; /* as of the first step; dx is not read */
    ptrdiff_t dx_step, d_o_step, dh_step, own_step, gates_step, h_step, c_step;
    void *workspace; /* loop_workspace() bytes */
    rf_run run;
} rf_loop_backward_args;

/* What a loop returns; if it is not the first, what came out is void: ended early, by poll or a
 * fork in it, or there was no token to choose. */
typedef enum { RF_LOOP_DONE, RF_LOOP_ENDED, RF_LOOP_NO_TOKEN } rf_loop_end;

/* The kernels of one isa and one dtype. Size functions return bytes, or -1 if that overflows. */
typedef struct {
    const char *isa;
    ptrdiff_t element;                                                /* bytes of one number */
    ptrdiff_t (*pack_size)(const rf_shape *shape, rf_pack_kind kind); /* one direction */
    int (*pack)(const rf_shape *shape, rf_pack_kind kind, const rf_weights *weights, void *out,
                rf_run *run); /* nonzero: ended early, by poll or a fork in it; so below */
    ptrdiff_t (*forward_workspace)(const rf_shape *shape, int threads);
    int (*forward)(rf_forward_args *args);
    /* What a step of all rows is thought to take, with the plan that a call would run. */
    double (*forward_step_ns)(const rf_shape *shape, const rf_run *run);
    ptrdiff_t (*backward_workspace)(const rf_shape *shape, int threads);
    int (*backward)(rf_backward_args *args);
    /* Borders of backward's slices lie at a multiple of so many steps before the end of the longest
     * row; with two directions, which add to one dx, all slices of the first come first, so that
     * each is given to calls of its own, with D = 1. */
    ptrdiff_t (*backward_panel_steps)(const rf_shape *shape);
    /* weight [O, N], bias [O] or NULL. */
    ptrdiff_t (*head_pack_size)(ptrdiff_t N, ptrdiff_t O, rf_pack_kind kind);
    int (*head_pack)(ptrdiff_t N, ptrdiff_t O, rf_pack_kind kind, const void *weight,
                     const void *bias, void *out, rf_run *run);
    ptrdiff_t (*loop_workspace)(int n, ptrdiff_t B, ptrdiff_t N, ptrdiff_t O);
    rf_loop_end (*loop)(rf_loop_args *args);
    rf_loop_end (*loop_backward)(rf_loop_backward_args *args);
    void (*vmath)(rf_vmath_id f, ptrdiff_t n, const void *in, void *out);
    /* Multiplies and adds in registers alone, on `threads` workers; returns the operations done:
     * what the benchmarks time as the machine's peak. */
    double (*multiply_add)(ptrdiff_t rounds, int threads);
    /* Reads `rounds` times, on `threads` workers, each its own `bytes` (a multiple of 1 KiB) of
     * data; returns the bytes read: what the benchmarks time as a cache's bandwidth. */
    double (*read)(const void *data, ptrdiff_t bytes, ptrdiff_t rounds, int threads);
    /* out = in * mask / (1 - p) over [T, B, N]; the mask depends on (key, t, b, unit) alone. */
    int (*dropout)(ptrdiff_t T, ptrdiff_t B, ptrdiff_t N, rf_seq in, rf_seq out, double p,
                   uint64_t key, rf_run *run);
    /* The mask itself, or its opposite, as bytes of 0 and 1. */
    int (*dropout_mask)(ptrdiff_t T, ptrdiff_t B, ptrdiff_t N, rf_seq out, int opposite, double p,
                        uint64_t key, rf_run *run);
} rf_kernels;

/* dispatch.c. Isas compiled in, weakest first, NULL-terminated; and the kernels of one, or NULL if
 * there is no such isa here or this CPU cannot run it. "auto" is the best this CPU runs. */
extern const char *const rf_isas[];
const rf_kernels *rf_find_kernels(const char *isa, rf_dtype dtype);

#endif
