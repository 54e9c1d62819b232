# cython: language_level=3, binding=False, embedsignature=False
"""The compiled layer: arrays -> pointers -> struct -> nogil call; no maths, no checks.

Knows the buffer protocol, and csrc/kernels.h as _kernels.pxd mirrors it. Trusts its arguments:
`checks` and `layer` have looked at them. Signatures and shapes stand in _kernels.pyi.
"""

from libc.math cimport INFINITY
from libc.stdint cimport uint8_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memset


CHOICES = ("value", "argmax", "sample")
FORWARD = RF_PACK_FORWARD
BACKWARD = RF_PACK_BACKWARD
PLANS = ("auto", "serial", "batch", "units", "directions", "wavefront")
ACTIVATIONS = (
    "sigmoid", "tanh", "relu", "affine", "leakyrelu", "thresholdedrelu", "scaledtanh",
    "hardsigmoid", "elu", "softsign", "softplus",
)


cdef tuple _isas():
    cdef list names = []
    cdef int i = 0
    while rf_isas[i] != NULL:
        names.append((<bytes>rf_isas[i]).decode())
        i += 1
    return tuple(names)


ISAS = _isas()

# The kernels of packs made from now on, by dtype.
cdef const rf_kernels *current[2]
current[0] = rf_find_kernels("auto", RF_F32)
current[1] = rf_find_kernels("auto", RF_F64)


def isa():
    return (<bytes>current[0].isa).decode()


def set_isa(str name):
    cdef bytes encoded = name.encode()
    cdef const rf_kernels *f32 = rf_find_kernels(encoded, RF_F32)
    cdef const rf_kernels *f64 = rf_find_kernels(encoded, RF_F64)
    if f32 == NULL or f64 == NULL:
        return False
    current[0] = f32
    current[1] = f64
    return True


def cpu_count():
    return rf_cpu_count()


def use_threads(uintptr_t parallel, uintptr_t thread, uintptr_t threads):
    cdef rf_host_threads host
    memcpy(<void *>&host.parallel, &parallel, sizeof(parallel))
    memcpy(<void *>&host.thread, &thread, sizeof(thread))
    memcpy(<void *>&host.threads, &threads, sizeof(threads))
    return rf_pool_use(&host) != 0


cdef int poll(void *context) noexcept with gil:
    return rf_check_signals() != 0


# ---- buffers and memory ---------------------------------------------------------------------------

cdef enum:
    # Of one call: 12 arrays, 20 gradients, 4 of a light tape, 10 to add to, 4 starts; of what happens
    # between steps 3 of each of 4 settings, and 3 others.
    MOST_VIEWS = 66


cdef struct Views:
    Py_buffer view[MOST_VIEWS]
    int n
    Py_ssize_t T, B  # of the sequence that was taken first


cdef inline void begin(Views *views) noexcept nogil:
    views.n = 0
    views.T = views.B = -1


cdef int take(Views *views, object array, int flags, void **out) except -1:
    """Address of an array, whose buffer stays taken until `release`; NULL for None, and an int is
    an address itself, of what the caller keeps."""
    if array is None:
        out[0] = NULL
        return 0
    if type(array) is int:
        out[0] = <void *><uintptr_t>array
        return 0
    if views.n == MOST_VIEWS:
        raise SystemError("a call takes more arrays than there is room for")
    PyObject_GetBuffer(array, &views.view[views.n], PyBUF_STRIDES | flags)
    out[0] = views.view[views.n].buf
    views.n += 1
    return 0


cdef class Packed:
    """A sequence whose rows lie packed without padding, step after step, or row after row."""

    cdef readonly object data
    cdef readonly object starts
    cdef readonly tuple shape
    cdef readonly bint by_rows

    def __init__(self, data, starts, tuple shape, bint by_rows=False):
        self.data = data
        self.starts = starts
        self.shape = shape
        self.by_rows = by_rows

    @property
    def dtype(self):
        return self.data.dtype


cdef int take_seq(Views *views, object array, int flags, rf_seq *out) except -1:
    """A sequence, or None. After the first one all must have its steps and rows: an array's shape can
    be assigned to, at any moment, by whoever else holds it."""
    cdef Py_buffer *view
    cdef Py_ssize_t T, B
    out.starts = out.offsets = NULL
    if array is None:
        out.data = NULL
        return 0
    if type(array) is Packed:
        if (<Packed>array).by_rows:
            take(views, (<Packed>array).starts, 0, <void **>&out.offsets)
        else:
            take(views, (<Packed>array).starts, 0, <void **>&out.starts)
        T, B, _ = (<Packed>array).shape
        take(views, (<Packed>array).data, flags, &out.data)
        view = &views.view[views.n - 1]
        out.row = view.strides[0] // view.itemsize
        out.step = 0
    else:
        take(views, array, flags, &out.data)
        view = &views.view[views.n - 1]
        T, B = view.shape[0], view.shape[1]
        out.step = view.strides[0] // view.itemsize
        out.row = view.strides[1] // view.itemsize
    if views.T < 0:
        views.T, views.B = T, B
    elif T != views.T or B != views.B:
        raise ValueError(
            f"an array was reshaped during the call: got [{T}, {B}, ...] beside an x of "
            f"[{views.T}, {views.B}, ...]")
    return 0


cdef void release(Views *views) noexcept:
    cdef int i
    for i in range(views.n):
        PyBuffer_Release(&views.view[i])


cdef rf_block allocate(Py_ssize_t size) except *:
    """At least `size` bytes, 64-byte aligned; size -1 stands for one that overflowed."""
    cdef rf_block block
    if size < 0:
        raise MemoryError("the size of the workspace overflows")
    block = rf_block_take(size)
    if block.data == NULL:
        raise MemoryError(f"cannot allocate {size} bytes of workspace")
    rf_poison(block.data, size)
    return block


cdef class Memory:
    """A block of memory that arrays may lie in; kept for the next one when the last of them goes."""

    cdef rf_block block
    cdef Py_ssize_t nbytes

    def __init__(self, Py_ssize_t nbytes):
        if self.block.data != NULL:
            raise ValueError("Memory: __init__ may be called once")
        self.block = allocate(nbytes)
        self.nbytes = nbytes

    def __dealloc__(self):
        rf_block_give(self.block)

    def __getbuffer__(self, Py_buffer *view, int flags):
        PyBuffer_FillInfo(view, self, self.block.data, self.nbytes, 0, flags)


def release_memory():
    return rf_blocks_release()


cdef inline Py_ssize_t most_of(Py_ssize_t a, Py_ssize_t b) noexcept:
    """The larger of two sizes; -1, an overflow, stays."""
    return -1 if a < 0 or b < 0 else max(a, b)


cdef inline Py_ssize_t sum_of(Py_ssize_t a, Py_ssize_t b) noexcept:
    return -1 if a < 0 or b < 0 or a > PY_SSIZE_T_MAX - b else a + b


cdef inline Py_ssize_t whole_lines(Py_ssize_t a) noexcept:
    """A size rounded up to cache lines; -1, an overflow, stays."""
    return -1 if a < 0 or a > PY_SSIZE_T_MAX - 63 else (a + 63) // 64 * 64


cdef inline void set_run(rf_run *run, int threads, int plan) noexcept:
    run.threads = threads
    run.plan = plan
    run.poll = poll
    run.poll_context = NULL


# ---- packs ----------------------------------------------------------------------------------------

cdef class Pack:
    """Weights of one layer, re-laid for the kernels of one isa; owns its memory."""

    cdef const rf_kernels *kernels
    cdef rf_shape shape
    cdef rf_functions numbers  # of the functions, which the shape points to
    cdef rf_block memory
    cdef const void *direction[2]
    cdef readonly int kind
    cdef readonly Py_ssize_t nbytes
    cdef readonly object functions

    def __cinit__(self):
        self.kernels = current[0]

    def __dealloc__(self):
        rf_block_give(self.memory)

    def __deepcopy__(self, memo):
        return self  # it never changes

    def __reduce__(self):
        raise TypeError("a pack cannot be pickled: it is for this machine's kernels alone")

    @property
    def isa(self):
        return (<bytes>self.kernels.isa).decode()

    @property
    def dtype(self):
        return "f" if self.kernels.element == 4 else "d"

    @property
    def cell(self):
        return self.shape.cell

    @property
    def input_size(self):
        return self.shape.I

    @property
    def hidden_size(self):
        return self.shape.H

    @property
    def proj_size(self):
        return self.shape.P

    @property
    def directions(self):
        return self.shape.directions


cdef inline int take_weights(Views *views, tuple given, int flags, rf_weights *out) except -1:
    """One direction's weights or gradients, as cells.PARAMETERS orders them; what is left out at the
    end is None."""
    cdef Py_ssize_t i, n = len(given)
    cdef object none = None
    take(views, given[0], flags, &out.W)
    take(views, given[1], flags, &out.R)
    for i in range(7):
        take(views, given[2 + i] if 2 + i < n else none, flags, &out.unit_weights[i])
    return take(views, given[9] if n > 9 else none, flags, &out.projection)


cdef int take_functions(functions, rf_functions *out) except -1:
    cdef int i
    activations, clip, cell_clip = functions
    for i in range(len(activations)):
        name, *parameters = (activations[i],) if type(activations[i]) is str else activations[i]
        out.of[i].id = ACTIVATIONS.index(name)
        out.of[i].alpha, out.of[i].beta = (*parameters, 0, 0)[:2]
    out.clip = INFINITY if clip is None else clip
    out.cell_clip = INFINITY if cell_clip is None else cell_clip
    return 0


def pack(
    int cell, tuple weights, int kind, int threads, int plan, tuple sizes=None,
    functions=None,
):
    cdef Pack self = Pack.__new__(Pack)
    cdef Views views
    cdef rf_weights w[2]
    cdef rf_run run
    cdef Py_ssize_t size
    cdef int d, failed = 0
    cdef char *at
    begin(&views)
    try:
        if sizes is not None:
            self.shape.I, self.shape.H, self.shape.P, size = sizes
            self.kernels = current[size == 8]
        for d in range(len(weights)):
            take_weights(&views, weights[d], 0, &w[d])
            if d == 0 and sizes is None:  # W, R first; a projection, if there is one, last
                self.kernels = current[views.view[0].itemsize == 8]
                self.shape.I = views.view[0].shape[1]
                self.shape.H = views.view[1].shape[1]
                if w[0].projection != NULL:
                    self.shape.P = self.shape.H
                    self.shape.H = views.view[views.n - 1].shape[1]
        self.shape.cell = cell
        self.shape.directions = len(weights)
        self.kind = kind
        if functions is not None:
            self.functions = functions
            take_functions(functions, &self.numbers)
            self.shape.functions = &self.numbers
        size = self.kernels.pack_size(&self.shape, <rf_pack_kind>kind)
        if size > PY_SSIZE_T_MAX // 2 - 64:
            size = -1
        elif size >= 0:
            size = (size + 63) // 64 * 64
            self.nbytes = size * self.shape.directions
        self.memory = allocate(self.nbytes if size >= 0 else -1)
        at = <char *>self.memory.data
        set_run(&run, threads, plan)
        with nogil:
            for d in range(self.shape.directions):
                self.direction[d] = at + d * size
                failed |= self.kernels.pack(
                    &self.shape, <rf_pack_kind>kind, &w[d], at + d * size, &run)
        rf_propagate(failed)
    finally:
        release(&views)
    return self


# ---- a layer through time -------------------------------------------------------------------------

cdef inline Py_ssize_t h_size(const rf_shape *s) noexcept nogil:
    """Numbers of h: those that it is projected to, or one of each unit."""
    return s.P if s.P else s.H


cdef inline int reversed_bits(Pack pack, bint reverse) noexcept:
    return 2 if pack.shape.directions == 2 else <int>reverse


def panel_steps(Pack pack, Py_ssize_t B):
    cdef rf_shape shape = pack.shape
    shape.B = B
    return pack.kernels.backward_panel_steps(&shape)


def workspace(Pack pack, Py_ssize_t T, Py_ssize_t B, int threads):
    cdef rf_shape shape = pack.shape
    shape.T, shape.B = T, B
    if pack.kind == RF_PACK_FORWARD:
        return pack.kernels.forward_workspace(&shape, threads)
    return pack.kernels.backward_workspace(&shape, threads)


# Slices of a light tape are cut from the end, where backward begins: the first may be shorter.

cdef inline Py_ssize_t slices_of(Py_ssize_t T, Py_ssize_t steps) noexcept nogil:
    return max(1, (T + steps - 1) // steps)


cdef inline Py_ssize_t slice_start(
    Py_ssize_t T, Py_ssize_t steps, Py_ssize_t slices, Py_ssize_t k
) noexcept nogil:
    return max(0, T - (slices - k) * steps)


cdef inline int poll_between(double *next_poll) noexcept nogil:
    """Between slices, which may each end before the engine asks for the first time."""
    cdef double now = progress_clock()
    if now < next_poll[0]:
        return 0
    next_poll[0] = now + RF_POLL_SECONDS
    return poll(NULL)


cdef inline void note_ran(rf_run *most, rf_run *run) noexcept nogil:
    """Of several calls, what ran in the one with most threads."""
    if run.ran_threads > most.ran_threads:
        most[0] = run[0]


cdef inline void copy_or_clear(void *to, const void *from_, size_t bytes) noexcept nogil:
    if from_ != NULL:
        memcpy(to, from_, bytes)
    else:
        memset(to, 0, bytes)


cdef int take_settings(Views *views, tuple settings, tuple gradients, rf_setting *out) except -1:
    cdef int i
    cdef tuple setting
    for i in range(len(settings)):
        setting = settings[i]
        take_seq(views, setting[0], 0, &out[i].where)
        take_seq(views, setting[1], 0, &out[i].value)
        if gradients is not None:
            take_seq(views, gradients[i], PyBUF_WRITABLE, &out[i].dvalue)
    return 0


cdef int take_between(Views *views, between, received, rf_between *out) except -1:
    """What happens between steps: a `between.Between`, of a backward call with a `Received`, either
    may be None."""
    memset(out, 0, sizeof(out[0]))
    if between is not None:
        take_settings(views, between.h, None if received is None else received.h, out.h)
        take_settings(views, between.c, None if received is None else received.c, out.c)
        out.hold_h, out.hold_c = between.hold
        take_seq(views, between.keep, 0, &out.keep)
        out.keep_scale = between.keep_scale
    if received is not None:
        take_seq(views, received.dc_steps, 0, &out.c_steps)
        take_seq(views, received.norms, PyBUF_WRITABLE, &out.norms)
        out.clip, out.clip_norm = received.clip, received.clip_norm
    return 0


cdef inline void shift(rf_seq *seq, Py_ssize_t bytes) noexcept nogil:
    if seq.data != NULL:
        seq.data = <char *>seq.data + bytes


cdef rf_between of_direction(
    const rf_between *both, const rf_shape *s, int d, Py_ssize_t element
) noexcept nogil:
    """What happens between the steps of one direction."""
    cdef rf_between one = both[0]
    cdef Py_ssize_t h = d * h_size(s), c = d * s.H
    cdef int i
    for i in range(2):
        shift(&one.h[i].where, h)
        shift(&one.h[i].value, h * element)
        shift(&one.h[i].dvalue, h * element)
        shift(&one.c[i].where, c)
        shift(&one.c[i].value, c * element)
        shift(&one.c[i].dvalue, c * element)
    shift(&one.keep, h)
    shift(&one.c_steps, c * element)
    shift(&one.norms, d * element)
    return one


cdef int forward_slices(
    const rf_kernels *kernels, rf_forward_args *args, char *h, char *c, Py_ssize_t steps
) noexcept nogil:
    """Forward without a tape, but for the states before each slice: h and c [K, D, B, ...]."""
    cdef rf_shape *s = &args.shape
    cdef Py_ssize_t k, slices = slices_of(s.T, steps)
    cdef size_t h_bytes = s.directions * s.B * h_size(s) * kernels.element
    cdef size_t c_bytes = s.directions * s.B * s.H * kernels.element
    cdef void *h_n = args.h_n
    cdef void *c_n = args.c_n
    cdef double next_poll = progress_clock() + RF_POLL_SECONDS
    cdef rf_run ran
    ran.ran_threads = 0
    copy_or_clear(h, args.h_0, h_bytes)
    if c != NULL:
        copy_or_clear(c, args.c_0, c_bytes)
    for k in range(slices):
        args.step0 = slice_start(s.T, steps, slices, k)
        args.step1 = slice_start(s.T, steps, slices, k + 1)
        args.h_0 = h + k * h_bytes
        args.h_n = h + (k + 1) * h_bytes if k + 1 < slices else h_n
        if c != NULL:
            args.c_0 = c + k * c_bytes
            args.c_n = c + (k + 1) * c_bytes if k + 1 < slices else c_n
        if kernels.forward(args) or poll_between(&next_poll):
            return 1
        note_ran(&ran, &args.run)
    args.run = ran
    return 0


cdef int backward_slices(
    Pack pack, Pack forward_pack, rf_backward_args *args, const char *h, const char *c,
    void *h_last, void *c_last, Py_ssize_t steps,
) noexcept nogil:
    """Backward from the states before each slice, h and c [K, D, B, ...]: of each direction, slice by
    slice, forward again into args.tape, which has room for one slice, then backward."""
    cdef rf_forward_args f
    cdef rf_backward_args g
    cdef rf_between ahead, back
    cdef rf_shape *s = &args.shape
    cdef Py_ssize_t k, slices = slices_of(s.T, steps)
    cdef size_t h_bytes = s.B * h_size(s) * pack.kernels.element
    cdef size_t c_bytes = s.B * s.H * pack.kernels.element
    cdef int d
    cdef double next_poll = progress_clock() + RF_POLL_SECONDS
    cdef rf_run ran
    ran.ran_threads = 0
    memset(&f, 0, sizeof(f))
    for d in range(s.directions):
        g = args[0]
        memset(&g.add_to, 0, sizeof(g.add_to))
        g.shape.directions = 1
        g.reverse = args.reverse >> d & 1
        g.add_dx = d > 0
        g.pack[0] = args.pack[d]
        g.grads[0] = args.grads[d]
        if g.dy.data != NULL:
            g.dy.data = <char *>args.dy.data + d * h_size(s) * pack.kernels.element
        if g.dh_n != NULL:
            g.dh_n = <char *>args.dh_n + d * h_bytes
        if g.dc_n != NULL:
            g.dc_n = <char *>args.dc_n + d * c_bytes
        g.dh_0 = <char *>args.dh_0 + d * h_bytes
        if g.dc_0 != NULL:
            g.dc_0 = <char *>args.dc_0 + d * c_bytes
        f.shape = g.shape
        f.reverse = g.reverse
        f.x = g.x
        f.lengths, f.times = g.lengths, g.times
        if args.between != NULL:
            back = of_direction(args.between, s, d, pack.kernels.element)
            ahead = back
            ahead.c_steps.data = NULL  # forward would write it
            g.between, f.between = &back, &ahead
        f.pack[0] = forward_pack.direction[d]
        f.h_n, f.c_n = h_last, c_last
        f.tape = g.tape
        f.workspace = g.workspace
        f.run = g.run
        for k in range(slices - 1, -1, -1):
            if k == 0:
                g.add_to = args.add_to
            g.step0 = f.step0 = slice_start(s.T, steps, slices, k)
            g.step1 = f.step1 = slice_start(s.T, steps, slices, k + 1)
            f.h_0 = h + (k * s.directions + d) * h_bytes
            if c != NULL:
                f.c_0 = c + (k * s.directions + d) * c_bytes
            if (forward_pack.kernels.forward(&f) or pack.kernels.backward(&g)
                    or (k > 0 and poll_between(&next_poll))):  # none after grads were added to
                return 1
            note_ran(&ran, &g.run)
            g.add_grads = 1
            g.dh_n, g.dc_n = g.dh_0, g.dc_0
    args.run = ran
    return 0


cdef int take_forward(
    Views *views, rf_forward_args *args, Pack pack, x, y, h_0, c_0, h_n, c_n, lengths, gates, h, c,
) except -1:
    """All of a forward call's arguments but reverse, workspace and run."""
    cdef int i
    take_seq(views, x, 0, &args.x)
    args.one_hot = 0
    args.shape = pack.shape
    args.shape.T, args.shape.B = views.T, views.B
    args.step0, args.step1 = 0, args.shape.T
    take_seq(views, y, PyBUF_WRITABLE, &args.y)
    take(views, h_0, 0, <void **>&args.h_0)
    take(views, c_0, 0, <void **>&args.c_0)
    take(views, h_n, PyBUF_WRITABLE, &args.h_n)
    take(views, c_n, PyBUF_WRITABLE, &args.c_n)
    take(views, lengths, 0, <void **>&args.lengths)
    args.times = NULL
    args.between = NULL
    take(views, gates, PyBUF_WRITABLE, &args.tape.gates)
    take(views, h, PyBUF_WRITABLE, &args.tape.h)
    take(views, c, PyBUF_WRITABLE, &args.tape.c)
    for i in range(2):
        args.pack[i] = pack.direction[i]
    return 0


def forward(
    Pack pack, x, y, h_0, c_0, h_n, c_n, lengths, gates, h_tape, c_tape,
    bint reverse, int threads, int plan, Py_ssize_t steps=0, times=None, between=None,
    c_steps=None, Py_ssize_t longest=-1,
):
    cdef Views views
    cdef rf_forward_args args
    cdef rf_between happens
    cdef rf_block memory
    cdef char *h_light
    cdef char *c_light
    cdef int failed
    memory.data = NULL
    begin(&views)
    try:
        take_forward(
            &views, &args, pack, x, y, h_0, c_0, h_n, c_n, lengths, gates, h_tape, c_tape)
        take(&views, times, 0, <void **>&args.times)
        if between is not None or c_steps is not None:
            memset(&happens, 0, sizeof(happens))
            if between is not None:
                take_between(&views, between, None, &happens)
            take_seq(&views, c_steps, PyBUF_WRITABLE, &happens.c_steps)
            args.between = &happens
        if longest >= 0:
            args.shape.T = args.step1 = longest
        args.reverse = reversed_bits(pack, reverse)
        set_run(&args.run, threads, plan)
        memory = allocate(pack.kernels.forward_workspace(&args.shape, threads))
        args.workspace = memory.data
        with nogil:
            if steps:
                h_light, c_light = <char *>args.tape.h, <char *>args.tape.c
                args.tape.h = args.tape.c = NULL
                failed = forward_slices(pack.kernels, &args, h_light, c_light, steps)
            else:
                failed = pack.kernels.forward(&args)
        rf_propagate(failed)
    finally:
        rf_block_give(memory)
        release(&views)
    return PLANS[args.run.ran_plan], args.run.ran_threads


def wavefront_steps(
    int cell, str dtype, Py_ssize_t T, Py_ssize_t B, Py_ssize_t I, Py_ssize_t H, Py_ssize_t P,
    int layers, int threads, int plan,
):
    cdef rf_shape lowest, others
    cdef rf_run run
    lowest.cell, lowest.directions = cell, 1
    lowest.T, lowest.B, lowest.I, lowest.H, lowest.P = T, B, I, H, P
    lowest.functions = NULL
    others = lowest
    others.I = h_size(&lowest)
    set_run(&run, threads, plan)
    return rf_wavefront_steps(current[dtype == "d"], &lowest, &others, layers, &run)


def wavefront(
    tuple packs, tuple calls, lengths, int threads, int plan, Py_ssize_t steps, times=None
):
    cdef Py_ssize_t n = len(packs), i, size = 0
    cdef Py_ssize_t views_size = whole_lines(n * sizeof(Views))
    cdef Py_ssize_t layers_size = whole_lines(n * sizeof(rf_forward_args))
    cdef rf_wavefront_args args
    cdef rf_forward_args *layer
    cdef Pack pack = packs[0]
    # Their blocks go back when the names do, after the views are released.
    cdef Memory tables = Memory(views_size + layers_size + n * RF_WAVE_BYTES)
    cdef Memory workspaces
    cdef Views *views = <Views *>tables.block.data
    cdef char *at = <char *>tables.block.data + views_size
    cdef int failed
    args.kernels = pack.kernels
    args.layers = <rf_forward_args *>at
    args.progress = at + layers_size
    args.n = <int>n
    args.steps = steps
    args.gates_step = 0
    for i in range(n):
        begin(&views[i])
    try:
        for i in range(n):
            layer = &args.layers[i]
            pack = packs[i]
            if pack.kernels != args.kernels:  # set_isa, in a signal's handler between two packs
                raise ValueError("isa: got another one during this call; needs the same throughout")
            x, y, h_0, c_0, h_n, c_n, gates, h, c = calls[i]
            take_forward(&views[i], layer, pack, x, y, h_0, c_0, h_n, c_n, lengths, gates, h, c)
            take(&views[i], times, 0, <void **>&layer.times)
            layer.reverse = 0
            if gates is not None:
                args.gates_step = layer.shape.B * gates.shape[3] * layer.shape.H
            size = sum_of(size, whole_lines(pack.kernels.forward_workspace(&layer.shape, 1)))
        args.h_step = args.layers[0].shape.B * h_size(&args.layers[0].shape)
        args.c_step = args.layers[0].shape.B * args.layers[0].shape.H
        set_run(&args.run, threads, plan)
        workspaces = Memory(size)
        at = <char *>workspaces.block.data
        for i in range(n):
            layer = &args.layers[i]
            layer.workspace = at
            at += whole_lines(args.kernels.forward_workspace(&layer.shape, 1))
        with nogil:
            failed = rf_wavefront(&args)
        rf_propagate(failed)
    finally:
        for i in range(n):
            release(&views[i])
    return PLANS[args.run.ran_plan], args.run.ran_threads


def backward(
    Pack pack, x, lengths, gates, h_tape, c_tape, dy, dh_n, dc_n, dx, dh_0, dc_0, grads,
    bint reverse, int threads, int plan, tuple light=None, tuple add_to=None,
    bint replace=False, times=None, between=None, received=None, Py_ssize_t longest=-1,
):
    cdef Views views
    cdef rf_backward_args args
    cdef rf_between happens
    cdef rf_shape one
    cdef rf_block memory
    cdef Py_ssize_t size, steps = 0
    cdef Pack forward_pack = None
    cdef void *h_light = NULL
    cdef void *c_light = NULL
    cdef void *h_last = NULL
    cdef void *c_last = NULL
    cdef int tape_flags = 0 if light is None else PyBUF_WRITABLE
    cdef int failed, d
    memory.data = NULL
    begin(&views)
    memset(args.grads, 0, sizeof(args.grads))
    memset(&args.add_to, 0, sizeof(args.add_to))
    args.replace = replace
    try:
        take_seq(&views, x, 0, &args.x)
        args.shape = pack.shape
        args.shape.T, args.shape.B = views.T, views.B
        args.step0, args.step1 = 0, args.shape.T
        args.add_dx = args.add_grads = 0
        take(&views, lengths, 0, <void **>&args.lengths)
        take(&views, times, 0, <void **>&args.times)
        args.between = NULL
        if between is not None or received is not None:
            take_between(&views, between, received, &happens)
            args.between = &happens
        if longest >= 0:
            args.shape.T = args.step1 = longest
        take(&views, gates, tape_flags, &args.tape.gates)
        take(&views, h_tape, tape_flags, &args.tape.h)
        take(&views, c_tape, tape_flags, &args.tape.c)
        take_seq(&views, dy, 0, &args.dy)
        take(&views, dh_n, 0, <void **>&args.dh_n)
        take(&views, dc_n, 0, <void **>&args.dc_n)
        take_seq(&views, dx, PyBUF_WRITABLE, &args.dx)
        take(&views, dh_0, PyBUF_WRITABLE, &args.dh_0)
        take(&views, dc_0, PyBUF_WRITABLE, &args.dc_0)
        for d in range(pack.shape.directions):
            args.pack[d] = pack.direction[d]
            if grads is not None:
                take_weights(&views, grads[d], PyBUF_WRITABLE, &args.grads[d])
        if add_to is not None:
            take_weights(&views, add_to, PyBUF_WRITABLE, &args.add_to)
        args.reverse = reversed_bits(pack, reverse)
        set_run(&args.run, threads, plan)
        size = pack.kernels.backward_workspace(&args.shape, threads)
        if light is not None:
            forward_pack, steps, h, c, h_n, c_n = light
            take(&views, h, 0, &h_light)
            take(&views, c, 0, &c_light)
            take(&views, h_n, PyBUF_WRITABLE, &h_last)
            take(&views, c_n, PyBUF_WRITABLE, &c_last)
            one = args.shape
            one.directions = 1
            size = most_of(pack.kernels.backward_workspace(&one, threads),
                           forward_pack.kernels.forward_workspace(&one, threads))
        memory = allocate(size)
        args.workspace = memory.data
        with nogil:
            if steps:
                failed = backward_slices(pack, forward_pack, &args, <char *>h_light,
                                         <char *>c_light, h_last, c_last, steps)
            else:
                failed = pack.kernels.backward(&args)
        rf_propagate(failed)
    finally:
        rf_block_give(memory)
        release(&views)
    return PLANS[args.run.ran_plan], args.run.ran_threads


cdef class Turn:
    """A lock that is taken by `with` if it is free, and which tells whether it was. Between taking it
    and knowing so no signal's handler can raise."""

    cdef object lock
    cdef bint held

    def __init__(self, lock):
        self.lock = lock

    def __enter__(self):
        self.held = self.lock is not None and self.lock.acquire(False)
        return self.held

    def __exit__(self, kind, error, traceback):
        if self.held:
            self.lock.release()


# ---- streams --------------------------------------------------------------------------------------

cdef class Stepper:
    """Layers with fixed packs and their own states, prepared for one step at a time."""

    cdef tuple packs
    cdef Views views            # of the states, taken for as long as this lives
    cdef int layers
    cdef rf_forward_args *args  # [layers], ready for a step
    cdef char *h                # [layers][B][N] the states, N numbers of h
    cdef char *c                # [layers][B][H]
    cdef rf_between between     # if there is any
    cdef rf_block memory        # of args, new states, a step's y of each layer, workspace
    cdef Py_ssize_t h_bytes, c_bytes  # of one layer's state
    cdef int threads
    cdef char format
    cdef bint busy              # a call has let go of the interpreter's lock, or runs its signals

    def __cinit__(self):
        begin(&self.views)
        self.memory.data = NULL

    def __init__(
        self, tuple packs, h, c, Py_ssize_t batch_size, int threads, int plan,
        double hold_h=0, double hold_c=0,
    ):
        cdef Pack pack = packs[0]
        cdef rf_shape shape
        cdef Py_ssize_t workspace = 0, here, tables  # here: of a state, whole lines
        cdef int i
        cdef char *at
        if self.memory.data != NULL:
            raise ValueError("Stepper: __init__ may be called once")
        self.layers = len(packs)
        self.packs = packs
        self.threads = threads
        self.format = c"f" if pack.kernels.element == 4 else c"d"
        self.h_bytes = batch_size * h_size(&pack.shape) * pack.kernels.element
        self.c_bytes = batch_size * pack.shape.H * pack.kernels.element
        here = (self.c_bytes + 63) // 64 * 64  # h has no more
        for pack in packs:
            shape = pack.shape
            shape.T, shape.B = 1, batch_size
            workspace = most_of(workspace, pack.kernels.forward_workspace(&shape, threads))
        tables = (self.layers * sizeof(rf_forward_args) + 63) // 64 * 64
        take(&self.views, h, PyBUF_WRITABLE, <void **>&self.h)
        take(&self.views, c, PyBUF_WRITABLE, <void **>&self.c)
        self.memory = allocate(sum_of(tables + 3 * self.layers * here, workspace))
        at = <char *>self.memory.data
        self.args = <rf_forward_args *>at
        at += tables
        memset(self.args, 0, self.layers * sizeof(rf_forward_args))
        for i in range(self.layers):
            pack = packs[i]
            self.args[i].shape = pack.shape
            self.args[i].shape.B = batch_size
            self.args[i].pack[0] = pack.direction[0]
            self.args[i].h_0 = self.h + i * self.h_bytes
            if self.c != NULL:
                self.args[i].c_0 = self.c + i * self.c_bytes
            self.args[i].h_n, self.args[i].c_n = at, at + here
            self.args[i].y.data = at + 2 * here
            self.args[i].x.row = pack.shape.I
            self.args[i].y.row = h_size(&pack.shape)
            set_run(&self.args[i].run, threads, plan)
            if hold_h > 0 or hold_c > 0:
                self.between.hold_h, self.between.hold_c = hold_h, hold_c
                self.args[i].between = &self.between
            at += 3 * here
        for i in range(self.layers):
            self.args[i].workspace = at

    def __dealloc__(self):
        release(&self.views)
        rf_block_give(self.memory)

    cdef int run(self, Py_ssize_t T, void *x, void *y, char *between, void *workspace) except -1:
        """T steps of all layers; `between` holds [2][T, B, N], or is NULL for one step's own place.
        States change only if all went well."""
        cdef int i, failed = 0
        cdef Pack pack
        cdef rf_forward_args args
        for i in range(self.layers):
            pack = <Pack>self.packs[i]
            args = self.args[i]
            args.shape.T = args.step1 = T
            args.x.data = x
            args.x.step = args.shape.B * args.shape.I
            args.y.step = args.shape.B * h_size(&args.shape)
            if i == self.layers - 1:
                args.y.data = y
            elif between != NULL:
                args.y.data = between + (i & 1) * T * self.h_bytes
            if workspace != NULL:
                args.workspace = workspace
            with nogil:
                failed = pack.kernels.forward(&args)
            rf_propagate(failed)
            x = args.y.data
        for i in range(self.layers):
            memcpy(self.h + i * self.h_bytes, self.args[i].h_n, self.h_bytes)
            if self.c != NULL:
                memcpy(self.c + i * self.c_bytes, self.args[i].c_n, self.c_bytes)
        return 0

    cdef bint fits(self, Py_buffer *view, Py_ssize_t columns) noexcept:
        """Whether this is just the [B, columns], or [columns] if B = 1, that the kernels take."""
        cdef Py_ssize_t size = view.itemsize
        cdef Py_ssize_t B = self.args[0].shape.B
        cdef int last = view.ndim - 1
        if view.format == NULL or view.format[0] != self.format or view.format[1] != 0:
            return False
        if last < 0 or last > 1 or view.shape[last] != columns or view.strides[last] != size:
            return False
        if last == 0:
            if B != 1:
                return False
        elif view.shape[0] != B or (B > 1 and view.strides[0] != columns * size):
            return False
        return <uintptr_t>view.buf % <uintptr_t>size == 0

    cdef int take(self) except -1:
        if self.busy:
            raise ValueError(
                "stream: in use by another call, of another thread or a signal handler")
        self.busy = True
        return 0

    # `with` the stepper, no other call gets in; and no signal's handler between take and the body.
    def __enter__(self):
        self.take()

    def __exit__(self, kind, error, traceback):
        self.busy = False

    def step(self, x, out):
        cdef Py_buffer from_, to
        cdef bint good
        cdef Py_ssize_t B = self.args[0].shape.B
        cdef Py_ssize_t I = self.args[0].shape.I, N = h_size(&self.args[0].shape)
        if rf_get_buffer(x, &from_, PyBUF_STRIDES | PyBUF_FORMAT) != 0:
            PyErr_Clear()
            return False
        if rf_get_buffer(out, &to, PyBUF_STRIDES | PyBUF_FORMAT | PyBUF_WRITABLE) != 0:
            PyErr_Clear()
            PyBuffer_Release(&from_)
            return False
        try:
            good = self.fits(&from_, I) and self.fits(&to, N) and from_.ndim == to.ndim and (
                <char *>to.buf >= <char *>from_.buf + B * I * from_.itemsize
                or <char *>from_.buf >= <char *>to.buf + B * N * to.itemsize
            )
            if good:
                self.take()
                try:
                    self.run(1, from_.buf, to.buf, NULL, NULL)
                finally:
                    self.busy = False
        finally:
            PyBuffer_Release(&from_)
            PyBuffer_Release(&to)
        return good

    def process(self, x, y):
        cdef Views views
        cdef rf_seq from_, to
        cdef rf_block memory
        cdef Py_ssize_t T, most = 0
        cdef Pack pack
        cdef rf_shape shape
        cdef Py_ssize_t between
        memory.data = NULL
        begin(&views)
        try:
            take_seq(&views, x, 0, &from_)
            take_seq(&views, y, PyBUF_WRITABLE, &to)
            T = views.T
            for pack in self.packs:
                shape = pack.shape
                shape.T, shape.B = T, self.args[0].shape.B
                most = most_of(most, pack.kernels.forward_workspace(&shape, self.threads))
            between = 2 * T * self.h_bytes if self.layers > 1 else 0
            between = (between + 63) // 64 * 64
            memory = allocate(sum_of(between, most))
            self.take()
            try:
                self.run(T, from_.data, to.data, <char *>memory.data, <char *>memory.data + between)
            finally:
                self.busy = False
        finally:
            rf_block_give(memory)
            release(&views)


# ---- the closed loop ------------------------------------------------------------------------------

cdef class _Bytes:
    """Hands out 64-byte aligned pieces of a block, once their sizes are known; -1: one overflowed."""

    cdef rf_block block
    cdef Py_ssize_t used

    def __dealloc__(self):
        rf_block_give(self.block)

    cdef Py_ssize_t add(self, Py_ssize_t count, Py_ssize_t size):
        """Where a piece of so many bytes will lie."""
        cdef Py_ssize_t at = self.used
        if count < 0 or size < 0 or (size > 0 and count > PY_SSIZE_T_MAX // size):
            self.used = -1
        else:
            self.used = sum_of(at, whole_lines(count * size))
        return at

    cdef int take(self) except -1:
        self.block = allocate(self.used)
        return 0

    cdef inline char *at(self, Py_ssize_t place) noexcept:
        return <char *>self.block.data + place


cdef inline Py_ssize_t row_of(Views *views) noexcept:
    """Numbers between rows [.., B, ..] of the array taken last: its second axis of two or three."""
    cdef Py_buffer *view = &views.view[views.n - 1]
    return view.strides[1] // view.itemsize


cdef inline Py_ssize_t step_of(Views *views) noexcept:
    cdef Py_buffer *view = &views.view[views.n - 1]
    return view.strides[0] // view.itemsize


def closed_loop(
    tuple packs, h, c, weight, bias, x, own, outputs, tokens, table, bint one_hot, int choice,
    Py_ssize_t steps, Py_ssize_t B, Py_ssize_t O, double temperature, uint64_t seed,
    uint64_t step0, uint64_t row0, double hold_h, double hold_c, tuple tapes, int threads, int plan,
):
    cdef Py_ssize_t n = len(packs), i, element, N, H, workspace = 0
    cdef Py_ssize_t views_at, layers_at, states_at, pack_at, loop_at, workspace_at
    cdef Py_ssize_t h_bytes, c_bytes
    cdef rf_loop_args args
    cdef rf_between between
    cdef rf_forward_args *layer
    cdef rf_shape shape
    cdef Pack pack = packs[0]
    cdef const rf_kernels *kernels = pack.kernels
    cdef _Bytes memory = _Bytes()
    cdef Views views  # of all but the tapes
    cdef Views *taken = NULL
    cdef void *h_state
    cdef void *c_state
    cdef void *W
    cdef void *b
    cdef int failed
    memset(&args, 0, sizeof(args))
    memset(&between, 0, sizeof(between))
    between.hold_h, between.hold_c = hold_h, hold_c
    begin(&views)
    args.n = <int>n
    args.steps = steps
    element = pack.kernels.element
    H, N = pack.shape.H, h_size(&pack.shape)
    h_bytes, c_bytes = B * N * element, B * H * element
    try:
        for pack in packs:
            if pack.kernels != kernels:  # set_isa, in a signal's handler between two packs
                raise ValueError("isa: got another one during this call; needs the same throughout")
            shape = pack.shape
            shape.T, shape.B = 1, B
            workspace = most_of(workspace, kernels.forward_workspace(&shape, threads))
        views_at = memory.add(n, sizeof(Views))
        layers_at = memory.add(n, sizeof(rf_forward_args))
        states_at = memory.add(n, h_bytes)
        memory.add(n, c_bytes)
        pack_at = memory.add(1, kernels.head_pack_size(N, O, RF_PACK_FORWARD))
        loop_at = memory.add(1, kernels.loop_workspace(<int>n, B, N, O))
        workspace_at = memory.add(1, workspace)
        memory.take()
        taken = <Views *>memory.at(views_at)
        for i in range(n):
            begin(&taken[i])
        take(&views, h, PyBUF_WRITABLE, &h_state)
        take(&views, c, PyBUF_WRITABLE, &c_state)
        memcpy(memory.at(states_at), h_state, n * h_bytes)
        if c_state != NULL:
            memcpy(memory.at(states_at) + whole_lines(n * h_bytes), c_state, n * c_bytes)
        set_run(&args.run, threads, plan)

        args.layers = <rf_forward_args *>memory.at(layers_at)
        memset(args.layers, 0, n * sizeof(rf_forward_args))
        for i in range(n):
            layer = &args.layers[i]
            pack = packs[i]
            layer.shape = pack.shape
            layer.shape.T = layer.step1 = 1
            layer.shape.B = B
            layer.pack[0] = pack.direction[0]
            layer.h_n = memory.at(states_at) + i * h_bytes
            if c_state != NULL:
                layer.c_n = memory.at(states_at) + whole_lines(n * h_bytes) + i * c_bytes
            layer.x.row = layer.y.row = N
            if hold_h > 0 or hold_c > 0:
                layer.between = &between
            layer.workspace = memory.at(workspace_at)
            if tapes is not None:
                gates, h_tape, c_tape, y = tapes[i]
                take(&taken[i], gates, PyBUF_WRITABLE, &layer.tape.gates)
                if gates is not None:
                    args.gates_step = B * gates.shape[3] * H
                take(&taken[i], h_tape, PyBUF_WRITABLE, &layer.tape.h)
                take(&taken[i], c_tape, PyBUF_WRITABLE, &layer.tape.c)
                take(&taken[i], y, PyBUF_WRITABLE, &layer.y.data)
        args.h_step, args.c_step = B * N, B * H
        layer = &args.layers[0]
        take(&views, x, PyBUF_WRITABLE, &layer.x.data)
        layer.one_hot = one_hot
        layer.x.row = args.head.x_row = row_of(&views)
        args.x_step = 0 if choice != RF_VALUE else step_of(&views)
        args.head.x = <char *>layer.x.data + args.x_step * element

        args.head.B, args.head.N, args.head.O, args.head.I = B, N, O, layer.shape.I
        args.head.choice = choice
        args.head.temperature = temperature
        args.head.key, args.head.t, args.head.row0 = dropout_mix(seed), step0, row0
        take(&views, outputs, PyBUF_WRITABLE, &args.head.o)
        if outputs is not None:
            args.o_step, args.head.o_row = step_of(&views), row_of(&views)
        take(&views, tokens, PyBUF_WRITABLE, <void **>&args.head.tokens)
        if tokens is not None:
            args.tokens_step, args.head.tokens_row = step_of(&views), row_of(&views)
        take(&views, own, 0, <void **>&args.head.own)
        if own is not None:
            args.head.own += B  # of the second step's input
            args.own_step = B
        take(&views, table, 0, <void **>&args.head.table)
        take(&views, weight, 0, &W)
        take(&views, bias, 0, &b)
        args.head.pack = memory.at(pack_at)
        args.workspace = memory.at(loop_at)
        with nogil:
            failed = kernels.head_pack(
                N, O, RF_PACK_FORWARD, W, b, <void *>args.head.pack, &args.run)
            if not failed:
                failed = kernels.loop(&args)
        rf_propagate(failed == RF_LOOP_ENDED)
        if not failed:
            memcpy(h_state, memory.at(states_at), n * h_bytes)
            if c_state != NULL:
                memcpy(c_state, memory.at(states_at) + whole_lines(n * h_bytes), n * c_bytes)
    finally:
        release(&views)
        if taken != NULL:
            for i in range(n):
                release(&taken[i])
    ran = PLANS[args.run.ran_plan], args.run.ran_threads
    return ran, ((args.failed_step, args.failed_row) if failed else None)


def closed_loop_backward(
    tuple packs, tuple tapes, weight, d_outputs, dx, own, dh, dh_state, dc_state, int threads,
    int plan,
):
    cdef Py_ssize_t n = len(packs), i, element, N, H, I, O, B, workspace = 0
    cdef Py_ssize_t views_at, layers_at, between_at, pack_at, loop_at, workspace_at
    cdef rf_loop_backward_args args
    cdef rf_backward_args *layer
    cdef rf_backward_args *layers
    cdef rf_shape shape
    cdef Pack pack = packs[0]
    cdef const rf_kernels *kernels = pack.kernels
    cdef _Bytes memory = _Bytes()
    cdef Views views
    cdef Views *taken = NULL
    cdef char *dh_0
    cdef char *dc_0
    cdef void *W
    cdef int failed
    memset(&args, 0, sizeof(args))
    begin(&views)
    args.n = <int>n
    args.steps, B, O = d_outputs.shape
    I, H, N = pack.shape.I, pack.shape.H, h_size(&pack.shape)
    element = pack.kernels.element
    try:
        for pack in packs:
            if pack.kernels != kernels:
                raise ValueError("isa: got another one during this call; needs the same throughout")
            shape = pack.shape
            shape.T, shape.B = 1, B
            workspace = most_of(workspace, kernels.backward_workspace(&shape, threads))
        views_at = memory.add(n, sizeof(Views))
        layers_at = memory.add(n, sizeof(rf_backward_args))
        between_at = memory.add(2, whole_lines(B * N * element))
        pack_at = memory.add(1, kernels.head_pack_size(N, O, RF_PACK_BACKWARD))
        loop_at = memory.add(1, kernels.loop_workspace(<int>n, B, N, O))
        workspace_at = memory.add(1, workspace)
        memory.take()
        taken = <Views *>memory.at(views_at)
        for i in range(n):
            begin(&taken[i])
        take(&views, dh_state, PyBUF_WRITABLE, <void **>&dh_0)
        take(&views, dc_state, PyBUF_WRITABLE, <void **>&dc_0)
        set_run(&args.run, threads, plan)

        args.layers = layers = <rf_backward_args *>memory.at(layers_at)
        memset(layers, 0, n * sizeof(rf_backward_args))
        for i in range(n):
            layer = &layers[i]
            pack = packs[i]
            layer.shape = pack.shape
            layer.shape.T = layer.step1 = 1
            layer.shape.B = B
            layer.pack[0] = pack.direction[0]
            layer.dh_0 = dh_0 + i * B * N * element
            if dc_0 != NULL:
                layer.dc_0 = dc_0 + i * B * H * element
            layer.dx.data = memory.at(between_at) + (i & 1) * whole_lines(B * N * element)
            layer.dx.row = N
            layer.workspace = memory.at(workspace_at)
            gates, h_tape, c_tape = tapes[i]
            take(&taken[i], gates, 0, &layer.tape.gates)
            if gates is not None:
                args.gates_step = B * gates.shape[3] * H
            take(&taken[i], h_tape, 0, &layer.tape.h)
            take(&taken[i], c_tape, 0, &layer.tape.c)
        args.h_step, args.c_step = B * N, B * H
        layer = &layers[0]
        take(&views, dx, PyBUF_WRITABLE, &layer.dx.data)
        layer.dx.row = args.head.dx_row = I
        args.dx_step = B * I

        args.head.B, args.head.N, args.head.O = B, N, O
        take(&views, d_outputs, PyBUF_WRITABLE, &args.head.d_o)
        args.d_o_step = B * O
        take(&views, dh, PyBUF_WRITABLE, &args.head.dh)
        args.dh_step = B * N
        take(&views, own, 0, <void **>&args.head.own)
        if own is not None:
            args.head.own += B  # of the second step's input
            args.own_step = B
        take(&views, weight, 0, &W)
        args.head.pack = memory.at(pack_at)
        args.workspace = memory.at(loop_at)
        with nogil:
            failed = kernels.head_pack(
                N, O, RF_PACK_BACKWARD, W, NULL, <void *>args.head.pack, &args.run)
            if not failed:
                failed = kernels.loop_backward(&args)
        rf_propagate(failed)
    finally:
        release(&views)
        if taken != NULL:
            for i in range(n):
                release(&taken[i])


# ---- the rest -------------------------------------------------------------------------------------

def dropout(
    x, out, double p, uint64_t seed, uint64_t call, uint64_t layer, int threads, int plan
):
    cdef Views views
    cdef rf_seq from_, to
    cdef uint64_t key = dropout_mix(dropout_mix(dropout_mix(seed) + call) + layer)
    cdef Py_ssize_t *shape
    cdef const rf_kernels *kernels
    cdef rf_run run
    cdef int failed
    begin(&views)
    try:
        take_seq(&views, x, 0, &from_)
        take_seq(&views, out, PyBUF_WRITABLE, &to)
        set_run(&run, threads, plan)
        shape = views.view[0].shape
        kernels = current[views.view[0].itemsize == 8]
        with nogil:
            failed = kernels.dropout(shape[0], shape[1], shape[2], from_, to, p, key, &run)
        rf_propagate(failed)
    finally:
        release(&views)


def dropout_mask(
    out, bint opposite, double p, uint64_t seed, uint64_t call, uint64_t layer, int threads,
    int plan,
):
    cdef Views views
    cdef rf_seq to
    cdef uint64_t key = dropout_mix(dropout_mix(dropout_mix(seed) + call) + layer)
    cdef Py_ssize_t N
    cdef rf_run run
    cdef int failed
    begin(&views)
    try:
        take_seq(&views, out, PyBUF_WRITABLE, &to)
        N = views.view[0].shape[2]
        set_run(&run, threads, plan)
        with nogil:
            failed = current[0].dropout_mask(views.T, views.B, N, to, opposite, p, key, &run)
        rf_propagate(failed)
    finally:
        release(&views)


def vmath(str name, x, out):
    cdef Views views
    cdef void *from_
    cdef void *to
    cdef rf_vmath_id f = {
        "exp": RF_EXP, "tanh": RF_TANH, "sigmoid": RF_SIGMOID, "expm1": RF_EXPM1,
        "softplus": RF_SOFTPLUS,
    }[name]
    cdef const rf_kernels *kernels
    begin(&views)
    try:
        take(&views, x, 0, &from_)
        take(&views, out, PyBUF_WRITABLE, &to)
        kernels = current[views.view[0].itemsize == 8]
        with nogil:
            kernels.vmath(f, views.view[0].shape[0], from_, to)
    finally:
        release(&views)


def multiply_add(str dtype, Py_ssize_t rounds, int threads):
    cdef const rf_kernels *kernels = current[dtype == "d"]
    cdef double operations
    with nogil:
        operations = kernels.multiply_add(rounds, threads)
    return operations


def read(Py_ssize_t nbytes, Py_ssize_t rounds, int threads):
    cdef rf_block memory
    cdef double total
    if not 0 < nbytes < PY_SSIZE_T_MAX // threads - 1024:
        raise MemoryError(f"cannot allocate {threads} times {nbytes} bytes to read")
    nbytes = (nbytes + 1023) // 1024 * 1024
    memory = allocate(nbytes * threads)
    memset(memory.data, 0, nbytes * threads)
    with nogil:
        total = current[0].read(memory.data, nbytes, rounds, threads)
    rf_block_give(memory)
    return total
