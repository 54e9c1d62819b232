# cython: language_level=3
"""What the compiled layer calls: csrc's headers, and a little of Python's own C interface.

Mirrors kernels.h and the headers beside it, name by name; Cython reads this file with _kernels.pyx.
"""

from libc.stdint cimport uint8_t, uint64_t


cdef extern from *:
    """
    #include <Python.h>
    /* Lets Cython see the error that a poll has set. Without one, the poll forked: in the child the
     * call's other workers are gone. */
    static int rf_propagate(int failed) {
        if (failed && !PyErr_Occurred())
            PyErr_SetString(PyExc_OSError, "the process forked inside this call: no result here");
        return failed ? -1 : 0;
    }
    /* As the poll sees them: no error handling of Cython's own. */
    #define rf_check_signals PyErr_CheckSignals
    #define rf_get_buffer PyObject_GetBuffer
    /* A debugging build fills workspaces with NaN, so that no kernel can rest on what was there. */
    #ifdef NDEBUG
    #define rf_poison(memory, size) ((void)(memory), (void)(size))
    #else
    #define rf_poison(memory, size) memset(memory, 0xff, (size_t)(size))
    #endif
    """
    void rf_poison(void *, Py_ssize_t)
    int rf_propagate(int failed) except -1
    int rf_check_signals() noexcept
    ctypedef struct Py_buffer:
        void *buf
        Py_ssize_t itemsize
        int ndim
        char *format
        Py_ssize_t *shape
        Py_ssize_t *strides
    int PyBUF_STRIDES, PyBUF_WRITABLE, PyBUF_FORMAT
    int PyBuffer_FillInfo(Py_buffer *, object, void *, Py_ssize_t, int, int) except -1
    int PyObject_GetBuffer(object, Py_buffer *, int) except -1
    int rf_get_buffer(object, Py_buffer *, int) noexcept
    void PyBuffer_Release(Py_buffer *)
    void PyErr_Clear()


cdef extern from "dropout.h":
    uint64_t dropout_mix(uint64_t)


cdef extern from "memory.h":
    ctypedef struct rf_block:
        void *data
        size_t bytes
    rf_block rf_block_take(size_t) nogil
    void rf_block_give(rf_block) nogil
    size_t rf_blocks_release() nogil


cdef extern from "pool.h":
    int rf_cpu_count()
    ctypedef struct rf_host_threads:
        void (*parallel)(void (*)(void *) noexcept, void *, unsigned, unsigned) noexcept
        int (*thread)() noexcept
        int (*threads)() noexcept
    int rf_pool_use(const rf_host_threads *)


cdef extern from "progress.h":
    const double RF_POLL_SECONDS
    double progress_clock() nogil


cdef extern from "kernels.h":
    ctypedef struct rf_activation:
        int id
        double alpha, beta
    ctypedef struct rf_functions:
        rf_activation of[3]
        double clip, cell_clip
    ctypedef struct rf_shape:
        int cell, directions
        Py_ssize_t T, B, I, H, P
        const rf_functions *functions
    ctypedef struct rf_seq:
        void *data
        Py_ssize_t step, row
        const Py_ssize_t *starts
        const Py_ssize_t *offsets
    ctypedef struct rf_weights:
        void *W
        void *R
        void *unit_weights[7]
        void *projection
    ctypedef int (*rf_poll)(void *) noexcept
    ctypedef struct rf_run:
        int threads, plan
        rf_poll poll
        void *poll_context
        int ran_plan, ran_threads
    ctypedef struct rf_tape:
        void *gates
        void *h
        void *c
    ctypedef struct rf_setting:
        rf_seq where, value, dvalue
    ctypedef struct rf_between:
        rf_setting h[2]
        rf_setting c[2]
        double hold_h, hold_c
        rf_seq keep
        double keep_scale
        rf_seq c_steps
        double clip, clip_norm
        rf_seq norms
    ctypedef struct rf_forward_args:
        rf_shape shape
        int reverse
        Py_ssize_t step0, step1
        rf_seq x
        int one_hot
        rf_seq y
        const Py_ssize_t *lengths
        const Py_ssize_t *times
        const rf_between *between
        const void *pack[2]
        const void *h_0
        const void *c_0
        void *h_n
        void *c_n
        rf_tape tape
        void *workspace
        rf_run run
    ctypedef struct rf_backward_args:
        rf_shape shape
        int reverse
        Py_ssize_t step0, step1
        int add_dx, add_grads
        rf_seq x
        const Py_ssize_t *lengths
        const Py_ssize_t *times
        const rf_between *between
        const void *pack[2]
        rf_tape tape
        rf_seq dy
        const void *dh_n
        const void *dc_n
        rf_seq dx
        void *dh_0
        void *dc_0
        rf_weights grads[2]
        rf_weights add_to
        int replace
        void *workspace
        rf_run run
    ctypedef enum rf_dtype:
        RF_F32
        RF_F64
    ctypedef enum rf_pack_kind:
        RF_PACK_FORWARD
        RF_PACK_BACKWARD
    ctypedef enum rf_vmath_id:
        RF_EXP
        RF_TANH
        RF_SIGMOID
        RF_EXPM1
        RF_SOFTPLUS
    ctypedef enum rf_choice:
        RF_VALUE
        RF_ARGMAX
        RF_SAMPLE
    ctypedef struct rf_head:
        Py_ssize_t B, N, O, I
        const void *pack
        void *o
        Py_ssize_t o_row
        int choice
        Py_ssize_t *tokens
        Py_ssize_t tokens_row
        double temperature
        uint64_t key, t, row0
        const void *table
        void *x
        Py_ssize_t x_row
        const uint8_t *own
    ctypedef struct rf_head_backward:
        Py_ssize_t B, N, O
        const void *pack
        void *d_o
        const void *dx
        Py_ssize_t dx_row
        const uint8_t *own
        void *dh
    ctypedef struct rf_loop_args:
        rf_forward_args *layers
        int n
        Py_ssize_t steps
        rf_head head
        Py_ssize_t x_step, o_step, tokens_step, own_step, gates_step, h_step, c_step
        void *workspace
        Py_ssize_t failed_step, failed_row
        rf_run run
    ctypedef struct rf_loop_backward_args:
        const rf_backward_args *layers
        int n
        Py_ssize_t steps
        rf_head_backward head
        Py_ssize_t dx_step, d_o_step, dh_step, own_step, gates_step, h_step, c_step
        void *workspace
        rf_run run
    ctypedef enum rf_loop_end:
        RF_LOOP_DONE
        RF_LOOP_ENDED
        RF_LOOP_NO_TOKEN
    ctypedef struct rf_kernels:
        const char *isa
        Py_ssize_t element
        Py_ssize_t (*pack_size)(const rf_shape *, rf_pack_kind) noexcept nogil
        int (*pack)(
            const rf_shape *, rf_pack_kind, const rf_weights *, void *, rf_run *
        ) noexcept nogil
        Py_ssize_t (*forward_workspace)(const rf_shape *, int) noexcept nogil
        int (*forward)(rf_forward_args *) noexcept nogil
        Py_ssize_t (*backward_workspace)(const rf_shape *, int) noexcept nogil
        int (*backward)(rf_backward_args *) noexcept nogil
        Py_ssize_t (*backward_panel_steps)(const rf_shape *) noexcept nogil
        Py_ssize_t (*head_pack_size)(Py_ssize_t, Py_ssize_t, rf_pack_kind) noexcept nogil
        int (*head_pack)(
            Py_ssize_t, Py_ssize_t, rf_pack_kind, const void *, const void *, void *, rf_run *
        ) noexcept nogil
        Py_ssize_t (*loop_workspace)(int, Py_ssize_t, Py_ssize_t, Py_ssize_t) noexcept nogil
        rf_loop_end (*loop)(rf_loop_args *) noexcept nogil
        rf_loop_end (*loop_backward)(rf_loop_backward_args *) noexcept nogil
        void (*vmath)(rf_vmath_id, Py_ssize_t, const void *, void *) noexcept nogil
        double (*multiply_add)(Py_ssize_t, int) noexcept nogil
        double (*read)(const void *, Py_ssize_t, Py_ssize_t, int) noexcept nogil
        int (*dropout)(
            Py_ssize_t, Py_ssize_t, Py_ssize_t, rf_seq, rf_seq, double, uint64_t, rf_run *
        ) noexcept nogil
        int (*dropout_mask)(
            Py_ssize_t, Py_ssize_t, Py_ssize_t, rf_seq, int, double, uint64_t, rf_run *
        ) noexcept nogil
    const char **rf_isas
    const rf_kernels *rf_find_kernels(const char *, rf_dtype)


cdef extern from "wavefront.h":
    const Py_ssize_t RF_WAVE_BYTES
    ctypedef struct rf_wavefront_args:
        const rf_kernels *kernels
        rf_forward_args *layers
        int n
        Py_ssize_t steps, gates_step, h_step, c_step
        void *progress
        rf_run run
    Py_ssize_t rf_wavefront_steps(
        const rf_kernels *, const rf_shape *, const rf_shape *, int, const rf_run *)
    int rf_wavefront(rf_wavefront_args *) nogil


cdef extern from *:
    Py_ssize_t PY_SSIZE_T_MAX
