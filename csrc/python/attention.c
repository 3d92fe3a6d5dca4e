/*
 * attention.c - attention(): route, run, return. plan() and measure() share what they can of it.
 *
 * There is no Python frame between the caller and the kernel: call.c makes a problem of the arguments, the result is
 * made by the query's own allocator, and the GIL is released around the kernel. Calls of torch tensors that torch must
 * see take the ways of autograd.c.
 */
#include <string.h>

#include "binding.h"

/* ---- outputs ---- */

/* JAX arrays never change, though their DLPack capsules do not say so. */
static int is_writable(fc_state *state, const fc_array *out)
{
    if (out->read_only || out->kind.is_torch || out->kind.protocol != FC_BY_DLPACK) return !out->read_only;
    PyObject *function = fc_interop(state, "is_writable");
    PyObject *answer = function == NULL ? NULL : PyObject_CallFunctionObjArgs(function, out->object, NULL);
    Py_XDECREF(function);
    int writable = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    return writable;
}

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
    int writable = is_writable(call->state, out);
    if (writable < 0) return -1;
    if (!writable) {
        PyErr_SetString(PyExc_ValueError, "out is read-only; give an array that may be written");
        return -1;
    }
    if (fc_overlaps_itself(out)) {
        PyErr_SetString(PyExc_ValueError,
                        "out has two elements at one address (a stride of 0, say); give an array without self-overlap");
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

/* What a result of the call is to be. */
typedef struct fc_wanted {
    const char *name;
    int32_t dtype;
    int ndim;
    const int64_t *shape;
} fc_wanted;

static fc_wanted wanted_of(const fc_call *call, enum fc_operand operand)
{
    const fc_geometry *g = &call->geometry;
    int32_t dtype = call->arrays[FC_QUERY].dtype;
    if (operand == FC_OUT) return (fc_wanted){"out", dtype, g->out_ndim, g->out_shape};
    return (fc_wanted){"lse", dtype == FC_FLOAT64 ? FC_FLOAT64 : FC_FLOAT32, g->lse_ndim, g->lse_shape};
}

static int place_result(fc_call *call, enum fc_operand operand)
{
    call->has[operand] = true;
    return fc_place(&call->geometry, operand, &call->arrays[operand], fc_tensor_of(&call->problem, operand),
                    &call->batches);
}

static int make_result(fc_call *call, enum fc_operand operand, fc_result *result)
{
    if (call->has[operand]) { /* out= */
        if (check_out(call) != 0) return -1;
        result->object = call->arguments.given[FC_ARG_OUT];
        Py_INCREF(result->object);
    } else {
        fc_wanted wanted = wanted_of(call, operand);
        if (fc_result_new(call->state, &call->arrays[FC_QUERY], wanted.name, wanted.dtype, wanted.ndim, wanted.shape,
                          call->stream, &call->arrays[operand], &result->object, &result->finish) != 0)
            return -1;
    }
    return place_result(call, operand);
}

/* A result that is not made, as a row-major array of its shape. */
static void imagine_result(fc_call *call, enum fc_operand operand)
{
    fc_wanted wanted = wanted_of(call, operand);
    fc_array *array = &call->arrays[operand];
    *array = (fc_array){.name = wanted.name, .dtype = wanted.dtype, .ndim = wanted.ndim};
    int64_t step = 1;
    for (int i = array->ndim - 1; i >= 0; i--) {
        array->shape[i] = wanted.shape[i];
        array->strides[i] = step;
        step *= array->shape[i] > 0 ? array->shape[i] : 1;
    }
    place_result(call, operand);
}

/* Takes a result's object for the caller: a new reference. */
static PyObject *finish_result(fc_result *result)
{
    if (result->finish != NULL) return PyObject_CallNoArgs(result->finish);
    PyObject *object = result->object;
    result->object = NULL;
    return object;
}

/* A call and its results, as far as they came. */
static void release(fc_call *call, fc_result *out, fc_result *lse)
{
    fc_call_release(call);
    Py_XDECREF(out->object);
    Py_XDECREF(out->finish);
    Py_XDECREF(lse->object);
    Py_XDECREF(lse->finish);
}

/* ---- the run ---- */

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

/* What would run, into *plan; on a GPU FLASHCORE_SLOW has its say. */
static int make_plan(fc_call *call, fc_plan *plan)
{
    *plan = (fc_plan){.struct_size = sizeof *plan};
    fc_status status = fc_attention_plan(&call->problem, NULL, plan);
    if (status != FC_OK) return fc_raise_status(status);
    return fc_report_slow(call->state, &call->problem, plan);
}

/* One call of the library; on the CPU it plans, too. */
static int run_once(fc_call *call)
{
    fc_attention_problem *problem = &call->problem;
    fc_plan plan;
    fc_status status;
    if (problem->device_type == FC_CPU) {
        Py_BEGIN_ALLOW_THREADS
        status = fc_attention_forward(problem, NULL, 0, NULL);
        Py_END_ALLOW_THREADS
        return status == FC_OK ? 0 : fc_raise_status(status);
    }
    fc_workspace workspace;
    if (make_plan(call, &plan) != 0 || fc_workspace_new(call, plan.workspace_bytes, &workspace) != 0) return -1;
    Py_BEGIN_ALLOW_THREADS
    status = fc_attention_run(problem, &plan, workspace.data, plan.workspace_bytes, call->stream);
    Py_END_ALLOW_THREADS
    fc_workspace_free(&workspace);
    return status == FC_OK ? 0 : fc_raise_status(status);
}

/* The batches that do not fold. Each has a plan of its own, for its arrays may be aligned otherwise; all are made
 * before the first runs, so that what is refused is refused before anything is written. */
static int run_batches(fc_call *call, int64_t num_calls)
{
    fc_tensor first[FC_NUM_OPERANDS];
    for (int i = 0; i < FC_NUM_OPERANDS; i++) first[i] = *fc_tensor_of(&call->problem, i);
    for (int64_t i = 0; i < num_calls && call->problem.device_type == FC_CUDA; i++) {
        fc_plan plan;
        step_to(call, first, call->batches.ndim - 1, i);
        if (make_plan(call, &plan) != 0) return -1;
    }
    for (int64_t i = 0; i < num_calls; i++) {
        step_to(call, first, call->batches.ndim - 1, i);
        if (run_once(call) != 0) return -1;
    }
    return 0;
}

static int run(fc_call *call)
{
    int64_t num_calls = fc_call_fold(call);
    bool is_empty = call->problem.seqlen_q == 0 || call->problem.num_heads_q == 0; /* one call checks the rest */
    if (order_streams(call, true) != 0) return -1;
    int error = num_calls == 1 || is_empty ? run_once(call) : run_batches(call, num_calls);
    if (error == 0) return order_streams(call, false);
    PyObject *type, *value, *traceback; /* of several batches some may be on their way */
    PyErr_Fetch(&type, &value, &traceback);
    order_streams(call, false);
    PyErr_Restore(type, value, traceback);
    return -1;
}

/* torch counts what is written to a tensor, so that autograd can tell whether what it saved is still there. */
static int count_write(const fc_call *call)
{
    PyObject *out = call->arguments.given[FC_ARG_OUT];
    if (out == NULL || !call->arrays[FC_OUT].kind.is_torch || call->below_dispatcher) return 0;
    return fc_torch_count_write(call->state, out);
}

static PyObject *attend(PyObject *module, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names,
                        bool below_dispatcher)
{
    fc_call call;
    fc_call_begin(&call, PyModule_GetState(module), below_dispatcher);
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
    if (run(&call) != 0 || count_write(&call) != 0) goto done;
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
    release(&call, &out, &lse);
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
    fc_call_begin(&call, PyModule_GetState(module), false);
    PyObject *returned = NULL;
    if (fc_call_prepare(&call, args, num_args, keyword_names) != 0) goto done;
    if (call.modes.dispatch) {
        refuse_dispatch("explain()");
        goto done;
    }
    if (!call.has[FC_OUT])
        imagine_result(&call, FC_OUT);
    else if (check_out(&call) != 0 || place_result(&call, FC_OUT) != 0)
        goto done;
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
    returned = Py_BuildValue("{s:s,s:s,s:i,s:i,s:i,s:i,s:L,s:L,s:K,s:I,s:s}", "kernel", fc_kernel_name(plan.kernel),
                             "family", fc_kernel_family(plan.kernel), "block_m", plan.block_m, "block_n", plan.block_n,
                             "num_splits", plan.num_splits, "num_threads", plan.num_threads, "num_tiles",
                             (long long)plan.num_tiles, "num_calls", (long long)num_calls, "workspace_bytes",
                             (unsigned long long)plan.workspace_bytes, "slow", plan.slow, "reason", text);
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
    fc_workspace workspace;
    if (fc_workspace_new(call, plan.workspace_bytes, &workspace) != 0) return -1;
    Py_BEGIN_ALLOW_THREADS
    status = fc_attention_measure(problem, workspace.data, plan.workspace_bytes, call->stream, num_calls, microseconds);
    Py_END_ALLOW_THREADS
    fc_workspace_free(&workspace);
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
    fc_call_begin(&call, PyModule_GetState(module), false);
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
    if (measure(&call, (int32_t)num_calls, &microseconds) != 0 || count_write(&call) != 0) goto done;
    returned = PyFloat_FromDouble(microseconds);
done:
    release(&call, &out, &lse);
    return returned;
}
