/*
 * call.c - a call on its way to the library: Python's arguments to a problem, but for the outputs.
 *
 * Arguments are read straight from the vector call (arguments.c), and arrays are imported in place. The rules on shapes
 * and options live in the C library (check.c); what stands here is what only Python can say.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "binding.h"

const fc_input fc_inputs[FC_NUM_INPUTS] = {
    {FC_QUERY, FC_ARG_QUERY},        {FC_KEY, FC_ARG_KEY},     {FC_VALUE, FC_ARG_VALUE}, {FC_MASK, FC_ARG_ATTN_MASK},
    {FC_ALIBI, FC_ARG_ALIBI_SLOPES}, {FC_SINKS, FC_ARG_SINKS},
};

fc_tensor *fc_tensor_of(fc_attention_problem *problem, enum fc_operand operand)
{
    fc_tensor *const tensors[FC_NUM_OPERANDS] = {
        [FC_QUERY] = &problem->query, [FC_KEY] = &problem->key,
        [FC_VALUE] = &problem->value, [FC_OUT] = &problem->out,
        [FC_LSE] = &problem->lse,     [FC_MASK] = &problem->attn_mask,
        [FC_SINKS] = &problem->sinks, [FC_ALIBI] = &problem->alibi_slopes,
    };
    return tensors[operand];
}

int fc_raise_status(fc_status status)
{
    PyObject *exception = status == FC_INVALID         ? PyExc_ValueError
                          : status == FC_UNSUPPORTED   ? PyExc_NotImplementedError
                          : status == FC_OUT_OF_MEMORY ? PyExc_MemoryError
                                                       : PyExc_RuntimeError;
    const char *said = fc_last_error(); /* with what the environment holds, perhaps */
    PyObject *words = PyUnicode_DecodeUTF8(said, (Py_ssize_t)strlen(said), "replace");
    if (words != NULL) PyErr_SetObject(exception, words);
    Py_XDECREF(words);
    return -1;
}

void fc_call_begin(fc_call *call, fc_state *state, bool below_dispatcher)
{
    memset(call, 0, offsetof(fc_call, arrays));
    call->state = state;
    call->below_dispatcher = below_dispatcher;
}

/* ---- arrays and streams ---- */

/* A __dlpack__ producer's device, (type, id), without its data. */
static int32_t cuda_device_of(PyObject *object)
{
    PyObject *device = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    int type = 0, id = 0;
    bool is_cuda = device != NULL && PyTuple_Check(device) && PyArg_ParseTuple(device, "ii", &type, &id) &&
                   (type == DL_CUDA || type == DL_CUDA_MANAGED);
    PyErr_Clear(); /* the import says what is wrong with it */
    Py_XDECREF(device);
    return is_cuda ? id : -1;
}

/* Asks flashcore._interop for a stream handle; *has is false for None. */
static int ask_stream(fc_state *state, const char *function_name, PyObject *object, int32_t device_id, bool *has,
                      void **stream)
{
    PyObject *function = fc_interop(state, function_name);
    PyObject *handle = function == NULL ? NULL
                       : device_id < 0  ? PyObject_CallFunctionObjArgs(function, object, NULL)
                                        : PyObject_CallFunction(function, "Oi", object, (int)device_id);
    Py_XDECREF(function);
    if (handle == NULL) return -1;
    *has = handle != Py_None;
    if (*has) *stream = PyLong_AsVoidPtr(handle);
    Py_DECREF(handle);
    return PyErr_Occurred() ? -1 : 0;
}

static int refuse_stream(const fc_call *call, bool on_cpu)
{
    PyErr_Format(PyExc_ValueError, "stream is %R, but the query %s", call->arguments.given[FC_ARG_STREAM],
                 on_cpu ? "is a CPU array; leave stream out"
                        : "comes from a library with a current stream of its own, which is used; enter it there (with "
                          "torch.cuda.stream(s): "
                          "or with s:) and leave stream out");
    return -1;
}

/* A query of another protocol must know the stream before its data is asked for: its library's, or the caller's. */
static int find_stream(fc_call *call, const fc_kind *kind)
{
    PyObject *query = call->arguments.given[FC_ARG_QUERY];
    int32_t device_id = kind->protocol == FC_BY_DLPACK ? cuda_device_of(query) : 0;
    if (device_id >= 0 && ask_stream(call->state, "stream_of", query, device_id, &call->has_stream, &call->stream) != 0)
        return -1;
    if (call->arguments.given[FC_ARG_STREAM] == NULL) return 0;
    if (device_id < 0 || call->has_stream) return refuse_stream(call, device_id < 0);
    return ask_stream(call->state, "stream_handle", call->arguments.given[FC_ARG_STREAM], -1, &call->has_stream,
                      &call->stream);
}

/* The dispatcher makes a tensor, so the query must be one. */
static int check_dispatch(const fc_call *call, const char *name)
{
    fc_kind kind;
    if (fc_kind_of(call->state, call->arguments.given[FC_ARG_QUERY], &kind) != 0) return -1;
    if (kind.is_torch) return 0;
    PyErr_Format(
        PyExc_NotImplementedError,
        "%s is a tensor that torch's dispatcher must see (a subclass, a lazy view, or a torch mode or transform "
        "is active), but query is no torch tensor; pass query as one",
        name);
    return -1;
}

static int refuse_gradient_of_slopes(void)
{
    PyErr_SetString(PyExc_NotImplementedError,
                    "alibi_slopes requires a gradient, and flashcore computes none: slopes are constants to it; pass "
                    "alibi_slopes.detach(), or give the slopes' term as an attn_mask, which has a gradient");
    return -1;
}

static int import_one(fc_call *call, enum fc_operand operand, const char *name, PyObject *object)
{
    fc_kind kind;
    if (fc_kind_of(call->state, object, &kind) != 0) return -1;
    if (kind.is_torch && !call->below_dispatcher) {
        bool wants_gradient = false;
        if (!call->any_torch && fc_torch_check_modes(call->state, &call->modes) != 0) return -1;
        if (fc_torch_check_tensor(call->state, name, object, &kind, &wants_gradient, &call->modes) != 0) return -1;
        if (call->modes.dispatch) return check_dispatch(call, name);
        if (wants_gradient && call->gradient_of == NULL) call->gradient_of = name;
        if (wants_gradient && operand == FC_ALIBI) return refuse_gradient_of_slopes();
    }
    call->any_torch |= kind.is_torch;
    bool asks_stream = kind.protocol == FC_BY_DLPACK || kind.protocol == FC_BY_CAI;
    if (operand == FC_QUERY && asks_stream && find_stream(call, &kind) != 0) return -1;
    fc_array *array = &call->arrays[operand];
    if (fc_array_import(call->state, name, object, &kind, call->stream, call->has_stream, array) != 0)
        if (!kind.is_torch || call->below_dispatcher ||
            fc_torch_import_failed(call->state, name, object, &call->modes) != 0)
            return -1;
    if (call->modes.dispatch) return check_dispatch(call, name);
    call->has[operand] = true;
    if (operand == FC_QUERY && !asks_stream && call->arguments.given[FC_ARG_STREAM] != NULL)
        return refuse_stream(call, array->device_type == FC_CPU);
    if (operand == FC_QUERY && !call->has_stream && array->has_stream) {
        call->stream = array->stream; /* the exchange API's, or what a CUDA array interface names */
        call->has_stream = true;
    }
    return 0;
}

static void format_device(char *text, size_t size, const fc_array *array)
{
    if (array->device_type == FC_CPU)
        snprintf(text, size, "the CPU");
    else
        snprintf(text, size, "cuda:%d", array->device_id);
}

/* The query's device; a CUDA array interface does not say which GPU, so its pointer is asked. */
int fc_call_check_device(const fc_call *call, fc_array *array)
{
    const fc_array *query = &call->arrays[FC_QUERY];
    if (array->device_id < 0) {
        fc_status status = fc_pointer_device(array->data, &array->device_id);
        if (status != FC_OK) return fc_raise_status(status);
    }
    if (array->device_type == query->device_type && array->device_id == query->device_id) return 0;
    char ours[32], theirs[32];
    format_device(ours, sizeof ours, query);
    format_device(theirs, sizeof theirs, array);
    PyErr_Format(PyExc_ValueError, "query is on %s and %s on %s; all arrays must be on one device", ours, array->name,
                 theirs);
    return -1;
}

/* ---- dropout ---- */

static int import_seed(fc_call *call)
{
    static const char name[] = "dropout_seed";
    PyObject *object = call->arguments.given[FC_ARG_DROPOUT_SEED];
    fc_kind kind;
    if (fc_kind_of(call->state, object, &kind) != 0) return -1;
    if (kind.is_torch && !call->below_dispatcher) {
        bool wants_gradient; /* integers never do */
        if (!call->any_torch && fc_torch_check_modes(call->state, &call->modes) != 0) return -1;
        if (fc_torch_check_tensor(call->state, name, object, &kind, &wants_gradient, &call->modes) != 0) return -1;
        if (call->modes.dispatch) return check_dispatch(call, name);
    }
    if (fc_array_import_seed(call->state, name, object, &kind, call->stream, call->has_stream, &call->seed) != 0)
        return -1;
    call->has_seed = true;
    call->problem.dropout_seed = call->seed.data;
    return fc_call_check_device(call, &call->seed);
}

/* A given seed; or else the caller must be one for whom fc_call_draw_seed can draw. */
static int prepare_seed(fc_call *call)
{
    if (call->arguments.given[FC_ARG_DROPOUT_SEED] != NULL) return import_seed(call);
    if (call->arrays[FC_QUERY].kind.is_torch && !call->below_dispatcher) return 0;
    PyErr_Format(PyExc_ValueError,
                 "dropout_p is %R and dropout_seed is not given; %s: pass an array of two 64-bit integers, a seed and "
                 "an offset, on the query's device and others in each call",
                 call->arguments.given[FC_ARG_DROPOUT_P],
                 call->below_dispatcher ? "this operator draws no random numbers itself"
                                        : "the query's library has no random generator to draw it from");
    return -1;
}

int fc_call_draw_seed(fc_call *call)
{
    if (call->problem.dropout_p == 0 || call->arguments.given[FC_ARG_DROPOUT_SEED] != NULL) return 0;
    PyObject *draw = fc_torch_integration(call->state, "draw_seed");
    if (draw == NULL) return -1;
    call->drawn_seed = PyObject_CallFunctionObjArgs(draw, call->arguments.given[FC_ARG_QUERY], NULL);
    Py_DECREF(draw);
    if (call->drawn_seed == NULL) return -1;
    call->arguments.given[FC_ARG_DROPOUT_SEED] = call->drawn_seed;
    return import_seed(call);
}

static int check_gradient(const fc_call *call)
{
    const char *name = call->gradient_of;
    if (call->has[FC_OUT])
        PyErr_Format(PyExc_ValueError,
                     "out is given and %s requires a gradient, which a result written to out= cannot carry; leave out= "
                     "away, or pass %s.detach() or call under torch.no_grad()",
                     name, name);
    else if (!call->arrays[FC_QUERY].kind.is_torch)
        PyErr_Format(PyExc_ValueError,
                     "%s requires a gradient, but query is no torch tensor, so neither is the result, which could not "
                     "carry it; pass query as a tensor, or %s.detach()",
                     name, name);
    else
        return 0;
    return -1;
}

int fc_call_prepare(fc_call *call, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names)
{
    call->problem.struct_size = sizeof call->problem;
    if (fc_arguments_read(call->state, args, num_args, keyword_names, &call->arguments, &call->problem) != 0) return -1;
    for (int i = 0; i < FC_NUM_INPUTS; i++) {
        PyObject *object = call->arguments.given[fc_inputs[i].argument];
        if (object != NULL &&
            import_one(call, fc_inputs[i].operand, fc_argument_names[fc_inputs[i].argument], object) != 0)
            return -1;
        if (call->modes.dispatch) return 0;
    }
    if (call->modes.autocast && fc_torch_autocast(call) != 0) return -1;
    fc_geometry *g = &call->geometry;
    if (fc_geometry_of(&call->arrays[FC_QUERY], &call->arrays[FC_KEY], &call->arrays[FC_VALUE],
                       call->arguments.heads_inside, g) != 0)
        return -1;
    for (int i = 0; i < FC_NUM_INPUTS; i++) {
        enum fc_operand operand = fc_inputs[i].operand;
        if (call->has[operand] &&
            fc_place(g, operand, &call->arrays[operand], fc_tensor_of(&call->problem, operand), &call->batches) != 0)
            return -1;
    }
    if (call->arguments.given[FC_ARG_OUT] != NULL &&
        import_one(call, FC_OUT, "out", call->arguments.given[FC_ARG_OUT]) != 0)
        return -1;
    if (call->modes.dispatch) return 0;
    if (call->problem.dropout_p != 0 && prepare_seed(call) != 0) return -1;
    if (call->modes.dispatch) return 0;
    for (int operand = 0; operand < FC_NUM_OPERANDS; operand++)
        if (call->has[operand] && fc_call_check_device(call, &call->arrays[operand]) != 0) return -1;
    fc_attention_problem *p = &call->problem;
    p->device_type = call->arrays[FC_QUERY].device_type;
    p->device_id = call->arrays[FC_QUERY].device_id;
    if (call->gradient_of != NULL && check_gradient(call) != 0) return -1;
    p->num_heads_q = g->num_heads_q;
    p->num_heads_kv = g->num_heads_kv;
    p->seqlen_q = g->seqlen_q;
    p->seqlen_k = g->seqlen_k;
    p->head_dim = g->head_dim;
    p->head_dim_v = g->head_dim_v;
    call->batches.ndim = g->num_batch_dims;
    memcpy(call->batches.shape, g->batch_shape, sizeof call->batches.shape);
    if (!call->state->is_tuned_loaded && fc_load_tuned(call->state, p) != 0) return -1;
    if (call->any_torch && p->device_type == FC_CPU) return fc_torch_num_threads(call->state, &p->num_threads);
    return 0;
}

/* ---- the problem ---- */

/* Folds the batches; the library runs once, or once for each batch of the dimensions that did not fold. */
int64_t fc_call_fold(fc_call *call)
{
    fc_batches *b = &call->batches;
    call->problem.batch = 1;
    for (int i = 0; i < b->ndim; i++)
        if (b->shape[i] == 0) { /* nothing to compute; the checks still run */
            call->problem.batch = 0;
            return 1;
        }
    for (int operand = 0; operand < FC_NUM_OPERANDS; operand++)
        if (!call->has[operand]) memset(b->strides[operand], 0, (size_t)b->ndim * sizeof b->strides[operand][0]);
    fc_fold(b);
    if (b->ndim == 0) return 1;
    int last = b->ndim - 1;
    call->problem.batch = b->shape[last];
    for (int operand = 0; operand < FC_NUM_OPERANDS; operand++)
        fc_tensor_of(&call->problem, operand)->strides[0] = call->has[operand] ? b->strides[operand][last] : 0;
    int64_t num_calls = 1;
    for (int i = 0; i < last; i++) num_calls *= b->shape[i];
    return num_calls;
}

/* FLASHCORE_SLOW: error, warn (the default, once per reason) or allow. */
int fc_report_slow(fc_state *state, const fc_attention_problem *problem, const fc_plan *plan)
{
    if (plan->slow == 0) return 0;
    const char *mode = getenv("FLASHCORE_SLOW");
    if (mode == NULL || mode[0] == '\0') mode = "warn";
    bool is_error = strcmp(mode, "error") == 0;
    if (strcmp(mode, "allow") == 0) return 0;
    if (!is_error && strcmp(mode, "warn") != 0) {
        PyErr_Format(PyExc_ValueError, "FLASHCORE_SLOW=%s; allowed: error, warn, allow, or unset", mode);
        return -1;
    }
    if (!is_error && (plan->slow & ~state->slow_warned) == 0) return 0;
    char text[512];
    fc_plan_describe(problem, NULL, plan, text, sizeof text);
    if (is_error) {
        PyErr_Format(PyExc_RuntimeError, "FLASHCORE_SLOW=error: %s", text);
        return -1;
    }
    state->slow_warned |= plan->slow;
    if (state->slow_warning == NULL) {
        PyObject *package = PyImport_ImportModule("flashcore");
        state->slow_warning = package == NULL ? NULL : PyObject_GetAttrString(package, "SlowPathWarning");
        Py_XDECREF(package);
        if (state->slow_warning == NULL) return -1;
    }
    return PyErr_WarnFormat(state->slow_warning, 1, "%s FLASHCORE_SLOW=allow silences this, =error refuses such calls.",
                            text);
}

void fc_call_release(fc_call *call)
{
    for (int operand = 0; operand < FC_NUM_OPERANDS; operand++) {
        if (call->has[operand]) fc_array_release(&call->arrays[operand]);
        Py_XDECREF(call->casts[operand]);
    }
    if (call->has_seed) fc_array_release(&call->seed);
    Py_XDECREF(call->drawn_seed);
}
