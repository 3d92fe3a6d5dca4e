/*
 * call.c - attention(): route, run, return. plan() shares all of it up to the result.
 *
 * There is no Python frame between the caller and the kernel: arguments are read straight from the vector call
 * (arguments.c), arrays are imported in place, the result is made by the query's own allocator, and the GIL is released
 * around the kernel. The rules on shapes and options live in the C library (check.c); what stands here is what only
 * Python can say. Calls of torch tensors that torch must see take the ways of autograd.c.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "binding.h"

static const struct {
    enum fc_operand operand;
    enum fc_argument argument;
} inputs[] = {
    {FC_QUERY, FC_ARG_QUERY},        {FC_KEY, FC_ARG_KEY},     {FC_VALUE, FC_ARG_VALUE}, {FC_MASK, FC_ARG_ATTN_MASK},
    {FC_ALIBI, FC_ARG_ALIBI_SLOPES}, {FC_SINKS, FC_ARG_SINKS},
};
enum { NUM_INPUTS = sizeof inputs / sizeof inputs[0] };

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
    PyErr_SetString(exception, fc_last_error());
    return -1;
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

static int order_stream(const fc_call *call, const fc_array *array, bool before)
{
    if (!array->has_stream || array->stream == call->stream) return 0;
    fc_status status = before ? fc_stream_order(call->problem.device_id, array->stream, call->stream)
                              : fc_stream_order(call->problem.device_id, call->stream, array->stream);
    return status == FC_OK ? 0 : fc_raise_status(status);
}

/* Producers on other streams: their work before ours, or (after the launch) ours before what they do next. */
static int order_streams(fc_call *call, bool before)
{
    if (call->problem.device_type != FC_CUDA) return 0;
    for (int operand = 0; operand < FC_NUM_OPERANDS; operand++)
        if (call->has[operand] && order_stream(call, &call->arrays[operand], before) != 0) return -1;
    return call->has_seed ? order_stream(call, &call->seed, before) : 0;
}

int fc_call_prepare(fc_call *call, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names)
{
    call->problem.struct_size = sizeof call->problem;
    if (fc_arguments_read(call->state, args, num_args, keyword_names, &call->arguments, &call->problem) != 0) return -1;
    for (int i = 0; i < NUM_INPUTS; i++) {
        PyObject *object = call->arguments.given[inputs[i].argument];
        if (object != NULL && import_one(call, inputs[i].operand, fc_argument_names[inputs[i].argument], object) != 0)
            return -1;
        if (call->modes.dispatch) return 0;
    }
    if (call->modes.autocast && fc_torch_autocast(call) != 0) return -1;
    fc_geometry *g = &call->geometry;
    if (fc_geometry_of(&call->arrays[FC_QUERY], &call->arrays[FC_KEY], &call->arrays[FC_VALUE],
                       call->arguments.heads_inside, g) != 0)
        return -1;
    for (int i = 0; i < NUM_INPUTS; i++) {
        enum fc_operand operand = inputs[i].operand;
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

/* ---- outputs ---- */

static int check_out(const fc_call *call)
{
    const fc_array *out = &call->arrays[FC_OUT], *query = &call->arrays[FC_QUERY];
    const fc_geometry *g = &call->geometry;
    bool same = out->ndim == g->out_ndim;
    for (int i = 0; i < g->out_ndim && same; i++) same = out->shape[i] == g->out_shape[i];
    if (!same) {
        char given[200], wanted[200];
        fc_format_shape(given, sizeof given, out->ndim, out->shape);
        fc_format_shape(wanted, sizeof wanted, g->out_ndim, g->out_shape);
        PyErr_Format(PyExc_ValueError, "out has shape %s; the result's is %s", given, wanted);
        return -1;
    }
    if (out->dtype != query->dtype) {
        PyErr_Format(PyExc_ValueError, "out has dtype %s; the result's is %s, the query's", fc_dtype_word(out->dtype),
                     fc_dtype_word(query->dtype));
        return -1;
    }
    if (out->read_only) {
        PyErr_SetString(PyExc_ValueError, "out is read-only; give an array that may be written");
        return -1;
    }
    for (int i = 0; i < FC_NUM_OPERANDS; i++)
        if (i != FC_OUT && call->has[i] && fc_arrays_overlap(out, &call->arrays[i])) {
            PyErr_Format(PyExc_ValueError, "out shares memory with %s; give an array of its own", call->arrays[i].name);
            return -1;
        }
    return 0;
}

/* Where a result of the call goes: an array made (or out=), the object that owns it, and what turns it into the
 * caller's kind. Both objects are owned. */
typedef struct fc_result {
    PyObject *object, *finish;
} fc_result;

static int make_result(fc_call *call, enum fc_operand operand, fc_result *result)
{
    const fc_geometry *g = &call->geometry;
    const fc_array *query = &call->arrays[FC_QUERY];
    bool is_lse = operand == FC_LSE;
    int32_t dtype = !is_lse || query->dtype == FC_FLOAT64 ? query->dtype : FC_FLOAT32;
    if (call->has[operand]) { /* out= */
        if (check_out(call) != 0) return -1;
        result->object = call->arguments.given[FC_ARG_OUT];
        Py_INCREF(result->object);
    } else {
        if (fc_result_new(call->state, query, is_lse ? "lse" : "out", dtype, is_lse ? g->lse_ndim : g->out_ndim,
                          is_lse ? g->lse_shape : g->out_shape, call->stream, &call->arrays[operand], &result->object,
                          &result->finish) != 0)
            return -1;
        call->has[operand] = true;
    }
    return fc_place(g, operand, &call->arrays[operand], fc_tensor_of(&call->problem, operand), &call->batches);
}

/* Takes a result's object for the caller: a new reference. */
static PyObject *finish_result(fc_result *result)
{
    if (result->finish != NULL) return PyObject_CallNoArgs(result->finish);
    PyObject *object = result->object;
    result->object = NULL;
    return object;
}

/* ---- the run ---- */

/* FLASHCORE_SLOW: error, warn (the default, once per reason) or allow. */
int fc_report_slow(fc_state *state, const fc_attention_problem *problem, const fc_plan *plan)
{
    const char *mode = getenv("FLASHCORE_SLOW");
    bool is_error = mode != NULL && strcmp(mode, "error") == 0;
    if (plan->slow == 0 || (mode != NULL && strcmp(mode, "allow") == 0)) return 0;
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

/* Steps every operand's pointer to the batch `index` of the dimensions that did not fold, outermost ones. */
static void step_to(fc_call *call, const fc_tensor first[FC_NUM_OPERANDS], int num_outer, int64_t index)
{
    for (int operand = 0; operand < FC_NUM_OPERANDS; operand++) {
        if (!call->has[operand]) continue;
        int64_t offset = 0, rest = index;
        for (int i = num_outer - 1; i >= 0; i--) {
            offset += rest % call->batches.shape[i] * call->batches.strides[operand][i];
            rest /= call->batches.shape[i];
        }
        fc_tensor_of(&call->problem, operand)->data =
            (char *)first[operand].data + offset * fc_dtype_size(first[operand].dtype);
    }
    call->problem.first_batch = index * call->problem.batch;
}

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

static int run(fc_call *call)
{
    fc_attention_problem *problem = &call->problem;
    int64_t num_calls = fc_call_fold(call);
    fc_plan plan = {.struct_size = sizeof plan};
    fc_status status = FC_OK;
    bool on_gpu = problem->device_type == FC_CUDA;
    if (on_gpu) {
        status = fc_attention_plan(problem, NULL, &plan);
        if (status != FC_OK) return fc_raise_status(status);
        if (fc_report_slow(call->state, problem, &plan) != 0) return -1;
        if (order_streams(call, true) != 0) return -1;
    }
    fc_tensor first[FC_NUM_OPERANDS];
    if (num_calls > 1)
        for (int operand = 0; operand < FC_NUM_OPERANDS; operand++) first[operand] = *fc_tensor_of(problem, operand);

    void *workspace = NULL;
    Py_BEGIN_ALLOW_THREADS
    if (plan.workspace_bytes > 0)
        status = fc_malloc(problem->device_type, problem->device_id, plan.workspace_bytes, call->stream, &workspace);
    for (int64_t i = 0; i < num_calls && status == FC_OK; i++) {
        if (num_calls > 1) step_to(call, first, call->batches.ndim - 1, i);
        status = on_gpu ? fc_attention_run(problem, &plan, workspace, plan.workspace_bytes, call->stream)
                        : fc_attention_forward(problem, NULL, 0, NULL);
    }
    if (workspace != NULL && fc_free(problem->device_type, problem->device_id, workspace, call->stream) != FC_OK &&
        status == FC_OK)
        status = FC_CUDA_ERROR;
    Py_END_ALLOW_THREADS
    if (status != FC_OK) return fc_raise_status(status);
    return order_streams(call, false);
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

static PyObject *attend(PyObject *module, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names,
                        bool below_dispatcher)
{
    fc_call call;
    memset(&call, 0, offsetof(fc_call, arrays));
    memset(&call.has, 0, sizeof call - offsetof(fc_call, has));
    call.state = PyModule_GetState(module);
    call.below_dispatcher = below_dispatcher;
    fc_result out = {NULL, NULL}, lse = {NULL, NULL};
    PyObject *returned = NULL;

    if (fc_call_prepare(&call, args, num_args, keyword_names) != 0) goto done;
    if (call.modes.dispatch) {
        returned = fc_torch_call(call.state, "attention", args, num_args, keyword_names);
        goto done;
    }
    bool differentiable = call.gradient_of != NULL;
    if (differentiable && !fc_torch_is_direct(&call)) {
        returned = fc_torch_call(call.state, "fold_and_call", args, num_args, keyword_names);
        goto done;
    }
    if (fc_call_draw_seed(&call) != 0) goto done;
    bool wants_lse = call.arguments.return_lse || differentiable || below_dispatcher;
    if (make_result(&call, FC_OUT, &out) != 0) goto done;
    if (wants_lse && make_result(&call, FC_LSE, &lse) != 0) goto done;
    if (run(&call) != 0) goto done;
    if (differentiable) {
        returned = fc_torch_node(&call, out.object, lse.object);
        goto done;
    }
    returned = finish_result(&out);
    if (wants_lse && returned != NULL) {
        PyObject *second = finish_result(&lse);
        PyObject *pair = second == NULL ? NULL : PyTuple_Pack(2, returned, second);
        Py_XDECREF(second);
        Py_DECREF(returned);
        returned = pair;
    }
done:
    fc_call_release(&call);
    Py_XDECREF(out.object);
    Py_XDECREF(out.finish);
    Py_XDECREF(lse.object);
    Py_XDECREF(lse.finish);
    return returned;
}

PyObject *fc_py_attention(PyObject *module, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names)
{
    return attend(module, args, num_args, keyword_names, false);
}

PyObject *fc_py_forward(PyObject *module, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names)
{
    return attend(module, args, num_args, keyword_names, true);
}

/* Describes an output that is not made, as a row-major array of its shape. */
static void imagine_result(fc_call *call, enum fc_operand operand)
{
    const fc_geometry *g = &call->geometry;
    fc_array *array = &call->arrays[operand];
    bool is_lse = operand == FC_LSE;
    const fc_array *query = &call->arrays[FC_QUERY];
    *array = (fc_array){.name = is_lse ? "lse" : "out", .ndim = is_lse ? g->lse_ndim : g->out_ndim};
    array->dtype = !is_lse || query->dtype == FC_FLOAT64 ? query->dtype : FC_FLOAT32;
    int64_t step = 1;
    for (int i = array->ndim - 1; i >= 0; i--) {
        array->shape[i] = is_lse ? g->lse_shape[i] : g->out_shape[i];
        array->strides[i] = step;
        step *= array->shape[i] > 0 ? array->shape[i] : 1;
    }
    fc_place(g, operand, array, fc_tensor_of(&call->problem, operand), &call->batches);
    call->has[operand] = true;
}

static void refuse_dispatch(const char *who)
{
    PyErr_Format(
        PyExc_NotImplementedError,
        "%s reads shapes and strides of plain tensors, and here torch's dispatcher must see the call (a tensor "
        "subclass or lazy view, or a torch mode or transform is active); call outside",
        who);
}

PyObject *fc_py_plan(PyObject *module, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names)
{
    fc_call call;
    memset(&call, 0, sizeof call);
    call.state = PyModule_GetState(module);
    PyObject *returned = NULL;
    if (fc_call_prepare(&call, args, num_args, keyword_names) != 0) goto done;
    if (call.modes.dispatch) {
        refuse_dispatch("explain()");
        goto done;
    }
    if (call.has[FC_OUT] && check_out(&call) != 0) goto done;
    if (call.has[FC_OUT])
        fc_place(&call.geometry, FC_OUT, &call.arrays[FC_OUT], &call.problem.out, &call.batches);
    else
        imagine_result(&call, FC_OUT);
    if (call.arguments.return_lse) imagine_result(&call, FC_LSE);
    int64_t num_calls = fc_call_fold(&call);
    fc_plan plan = {.struct_size = sizeof plan};
    fc_status status = fc_attention_plan(&call.problem, NULL, &plan);
    if (status != FC_OK) {
        fc_raise_status(status);
        goto done;
    }
    char text[512];
    fc_plan_describe(&call.problem, NULL, &plan, text, sizeof text);
    returned =
        Py_BuildValue("{s:s,s:i,s:i,s:i,s:i,s:L,s:L,s:K,s:I,s:s}", "kernel", fc_kernel_name(plan.kernel), "block_m",
                      plan.block_m, "block_n", plan.block_n, "num_splits", plan.num_splits, "num_threads",
                      plan.num_threads, "num_tiles", (long long)plan.num_tiles, "num_calls", (long long)num_calls,
                      "workspace_bytes", (unsigned long long)plan.workspace_bytes, "slow", plan.slow, "reason", text);
    if (returned != NULL && fc_add_choices(returned, &call.problem, &plan) != 0) Py_CLEAR(returned);
done:
    fc_call_release(&call);
    return returned;
}

/* Times the folded problem, once where the batches take several calls. */
static int measure(fc_call *call, int32_t num_calls, double *microseconds)
{
    fc_attention_problem *problem = &call->problem;
    fc_plan plan = {.struct_size = sizeof plan};
    fc_call_fold(call);
    if (order_streams(call, true) != 0) return -1;
    fc_status status = fc_attention_plan(problem, NULL, &plan);
    if (status != FC_OK) return fc_raise_status(status);
    void *workspace = NULL;
    Py_BEGIN_ALLOW_THREADS
    if (plan.workspace_bytes > 0)
        status = fc_malloc(problem->device_type, problem->device_id, plan.workspace_bytes, call->stream, &workspace);
    if (status == FC_OK)
        status = fc_attention_measure(problem, workspace, plan.workspace_bytes, call->stream, num_calls, microseconds);
    if (workspace != NULL) fc_free(problem->device_type, problem->device_id, workspace, call->stream);
    Py_END_ALLOW_THREADS
    return status == FC_OK ? 0 : fc_raise_status(status);
}

/* measure(kernel, num_calls, /, ...) -> microseconds per call of attention(...) on this kernel. */
PyObject *fc_py_measure(PyObject *module, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names)
{
    enum { OWN = 2 };
    if (num_args < OWN || !PyUnicode_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError,
                        "measure() takes a kernel's name, a number of calls and then attention's arguments");
        return NULL;
    }
    const char *kernel = PyUnicode_AsUTF8AndSize(args[0], NULL);
    long num_calls = PyLong_AsLong(args[1]);
    if (kernel == NULL || (num_calls == -1 && PyErr_Occurred())) return NULL;
    if (num_calls > INT32_MAX) num_calls = INT32_MAX; /* refused below */
    if (num_calls < 0) num_calls = 0;

    fc_call call;
    memset(&call, 0, sizeof call);
    call.state = PyModule_GetState(module);
    fc_result out = {NULL, NULL}, lse = {NULL, NULL};
    double microseconds;
    PyObject *returned = NULL;
    if (fc_call_prepare(&call, args + OWN, num_args - OWN, keyword_names) != 0) goto done;
    if (call.modes.dispatch) {
        refuse_dispatch("measure()");
        goto done;
    }
    call.problem.kernel = kernel;
    if (fc_call_draw_seed(&call) != 0) goto done;
    if (make_result(&call, FC_OUT, &out) != 0) goto done;
    if (call.arguments.return_lse && make_result(&call, FC_LSE, &lse) != 0) goto done;
    if (measure(&call, (int32_t)num_calls, &microseconds) != 0) goto done;
    returned = PyFloat_FromDouble(microseconds);
done:
    fc_call_release(&call);
    Py_XDECREF(out.object);
    Py_XDECREF(out.finish);
    Py_XDECREF(lse.object);
    Py_XDECREF(lse.finish);
    return returned;
}
