/* cell.h: what a cell is to the engine: a row of stages, each a product and a pointwise part.
 * Knows vectors and the layout of a block of rows; the pointwise parts beside it are to be read
 * next to reference.py, where each equation stands with its source.
 *
 * A step computes pre-activations z in `slots` vectors per block of units: input product W x into
 * slots [input.slot, +input.n), then stage by stage a product with R and a pointwise part. Stage 0
 * multiplies h; a second stage multiplies m, which the first one made of h (GRU, reset before the
 * product). Backward runs the stages from the last: pointwise gives dz, the product dm or dh.
 *
 * A cell may have weights of single units (peepholes, gains) that its pointwise parts alone read.
 * Their gradients are sums over steps and rows, as a bias's are, so backward writes the terms
 * behind the slots of dz, and they are summed up with it.
 *
 * Normalised cells have slots of their own for W x and for R h, which begin at zero: their parts
 * normalise, and add the biases after it. Such a part is given whole rows, for it needs their sums.
 *
 * A general cell is another one with activations and clips that are arguments of the call. Its tape
 * keeps pre-activations, before they are clipped, where that one's keeps gates: a gate's value does
 * not tell its derivative at a kink, or where it has saturated.
 *
 * Where h is projected (of a cell with one stage), the scan does it: a pointwise part makes m
 * instead of h, and in backward it is given dm for dh, and makes m again. */

#define RF_MAX_GATES 4
#define RF_MAX_SLOTS (2 * RF_MAX_GATES)
#define RF_MAX_STAGES 2

/* Slots that a product adds to, and the parameter gate (block of H rows) that goes into each. */
typedef struct {
    int slot, n;
    int gates[RF_MAX_GATES];
} gate_slots;

/* A vector [n*H] of weights of single units: the sum of which term of dz is the gradient of each of
 * its n blocks; terms are counted on from the slots. */
typedef struct {
    int n;
    int term[RF_MAX_GATES];
} unit_weights;

/* A block of rows and units at one step, forward. Row pointers lead to [H], gates to [Gt][H]. */
typedef struct {
    ptrdiff_t H, rows;
    ptrdiff_t unit0, unit1; /* units [unit0, unit1), unit0 on a vector's border */
    T *z; /* in [rows][unit block][slot][W], from unit 0 on; a stage may write to its own slots */
    ptrdiff_t z_row;
    const T
        *unit_weights; /* in [vector][unit block][W]: what parts read of weights of single units */
    ptrdiff_t unit_weights_row;
    const T *const *h_prev;        /* in */
    const T *const *c_prev;        /* in; may be the same rows as c */
    T *const *h;                   /* out: read by the next step */
    T *const *y;                   /* out: the caller's copy of h */
    T *const *c;                   /* out */
    T *const *gates;               /* out: tape, or NULL */
    T *const *m;                   /* out of stage 0, operand of stage 1 */
    const rf_functions *functions; /* of a general cell */
} forward_block;

/* The same, backward. */
typedef struct {
    ptrdiff_t H, rows;
    ptrdiff_t unit0, unit1;
    const T *const *gates, *const *h_prev, *const *h, *const *c_prev, *const *c; /* in: tape */
    int other_c; /* the tape's c may be another one than the cell made: it was set afterwards */
    const T *unit_weights; /* as forward */
    ptrdiff_t unit_weights_row;
    const T *const *dy; /* in, or NULL: zeros */
    T *const *dh;       /* in: carried from step t+1, without dy; out: carried past the products */
    T *const *dc;       /* in: carried from step t+1; out: carried to step t-1 */
    T *const *dz;       /* out [slot][H], then the terms of gradients of single units' weights */
    T *const *dm;       /* in of stage 0: gradient of m */
    T *const *m;        /* out: m again, for the gradient of its weights; NULL: there is none */
    const rf_functions *functions; /* as forward */
} backward_block;

typedef struct {
    gate_slots recurrent;
    void (*forward)(const forward_block *);
    void (*backward)(const backward_block *);
} cell_stage;

typedef struct {
    int gates, slots, tape_gates, has_c;
    int normalised; /* parts are given whole rows, slots begin at zero; of one stage alone */
    gate_slots input;
    int terms; /* behind the slots of dz */
    unit_weights unit_weights[RF_N_UNIT_WEIGHTS];
    int stages;
    cell_stage stage[RF_MAX_STAGES];
} cell;

/* A loop of a pointwise part over rows r and vectors of units u; n is the number of units left. One
 * loop, not two, so that constants are set up once for all rows. Where an activation needs
 * another's result, it is in a second loop: a core overlaps the latencies of neighbours, and two
 * activations one after the other are more instructions than it looks ahead. A part works on a copy
 * of its block, which no store through a row's pointer can change, as far as a compiler knows. */
/* clang-format off */
#define FOR_UNITS(block)                                                                           \
    for (ptrdiff_t r = 0, u = (block).unit0, n = (block).unit1 - u; n > 0 && r < (block).rows;     \
         n > W ? (u += W, n -= W) : (r++, u = (block).unit0, n = (block).unit1 - u))
/* clang-format on */

/* The pre-activation in a slot; and what replaces it there, between two loops of a part. */
RF_INLINE vec z_slot(const forward_block *b, ptrdiff_t r, ptrdiff_t u, int slots, int slot) {
    return load(b->z + r * b->z_row + u * slots + slot * W);
}
RF_INLINE void z_keep(const forward_block *b, ptrdiff_t r, ptrdiff_t u, int slots, int slot,
                      vec v) {
    store(b->z + r * b->z_row + u * slots + slot * W, v);
}

/* Block `i` of what parts read of weights of single units: of a normalised cell all, of others all
 * but the biases, in the order of rf_unit_weights_id. */
RF_INLINE vec unit_weight(const T *units, ptrdiff_t units_row, int i, ptrdiff_t u) {
    return load(units + i * units_row + u);
}

RF_INLINE vec get(const T *const *rows, ptrdiff_t r, ptrdiff_t u, ptrdiff_t n) {
    return load_lanes(rows[r] + u, n);
}
RF_INLINE void put(T *const *rows, ptrdiff_t r, ptrdiff_t u, ptrdiff_t n, vec v) {
    store_lanes(rows[r] + u, n, v);
}

/* Gradient that reaches h: from the step after, and from y. */
RF_INLINE vec dh_total(const backward_block *b, ptrdiff_t r, ptrdiff_t u, ptrdiff_t n) {
    const vec dh = load(b->dh[r] + u);
    return b->dy ? dh + get(b->dy, r, u, n) : dh;
}

/* Derivatives in terms of the activation's value; (1-s)(1+s) keeps its digits near 1. */
RF_INLINE vec dsigmoid(vec s) { return s * (1 - s); }
RF_INLINE vec dtanh(vec t) { return (1 - t) * (1 + t); }
