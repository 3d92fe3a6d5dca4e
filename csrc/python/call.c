/*
 * call.c - attention(): parse, route, run, return. plan() shares all of it up to the result.
 *
 * There is no Python frame between the caller and the kernel: arguments are read straight from the vector call, arrays
 * are imported in place, the result is made by the query's own allocator, and the GIL is released around the kernel.
 * The rules on shapes and options live in the C library (check.c); what stands here is what only Python can say.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "binding.h"

/* Signature order; the first eight are PyTorch's and the first eight may be given by position. */
enum parameter {
    QUERY,
    KEY,
    VALUE,
    ATTN_MASK,
    DROPOUT_P,
    IS_CAUSAL,
    SCALE,
    ENABLE_GQA,
    WINDOW,
    DIAGONAL,
    SOFTCAP,
    ALIBI_SLOPES,
    SINKS,
    LAYOUT,
    RETURN_LSE,
    OUT,
    DETERMINISTIC,
    STREAM,
    BLOCK_M,
    BLOCK_N,
    NUM_PARAMETERS
};
enum { NUM_POSITIONAL = 8 };

const char *const fc_parameter_names[] = {
    "query",      "key",    "value",         "attn_mask", "dropout_p",    "is_causal", "scale",
    "enable_gqa", "window", "diagonal",      "softcap",   "alibi_slopes", "sinks",     "layout",
    "return_lse", "out",    "deterministic", "stream",    "block_m",      "block_n",
};
const int fc_num_parameters = NUM_PARAMETERS;

typedef struct fc_call {
    fc_state *state;
    PyObject *given[NUM_PARAMETERS]; /* NULL where absent or None */
    bool is_none[NUM_PARAMETERS];
    fc_array arrays[FC_NUM_OPERANDS];
    bool has[FC_NUM_OPERANDS];
    bool any_torch, return_lse;
    bool has_stream; /* the call's: the stream that the kernel runs on */
    void *stream;
    fc_geometry geometry;
    fc_batches batches;
    fc_attention_problem problem;
    char forced_kernel[64]; /* a copy: os.environ may change once the GIL is released */
} fc_call;

static const struct {
    enum fc_operand operand;
    enum parameter parameter;
} inputs[] = {
    {FC_QUERY, QUERY},        {FC_KEY, KEY},     {FC_VALUE, VALUE}, {FC_MASK, ATTN_MASK},
    {FC_ALIBI, ALIBI_SLOPES}, {FC_SINKS, SINKS},
};
enum { NUM_INPUTS = sizeof inputs / sizeof inputs[0] };

static fc_tensor *tensor_of(fc_attention_problem *problem, enum fc_operand operand)
{
    fc_tensor *const tensors[FC_NUM_OPERANDS] = {
        [FC_QUERY] = &problem->query, [FC_KEY] = &problem->key,
        [FC_VALUE] = &problem->value, [FC_OUT] = &problem->out,
        [FC_LSE] = &problem->lse,     [FC_MASK] = &problem->attn_mask,
        [FC_SINKS] = &problem->sinks, [FC_ALIBI] = &problem->alibi_slopes,
    };
    return tensors[operand];
}

static int raise_status(fc_status status)
{
    PyObject *exception = status == FC_INVALID         ? PyExc_ValueError
                          : status == FC_UNSUPPORTED   ? PyExc_NotImplementedError
                          : status == FC_OUT_OF_MEMORY ? PyExc_MemoryError
                                                       : PyExc_RuntimeError;
    PyErr_SetString(exception, fc_last_error());
    return -1;
}

/* ---- arguments ---- */

static int find_parameter(fc_state *state, PyObject *name)
{
    for (int i = 0; i < NUM_PARAMETERS; i++)
        if (state->parameter_names[i] == name) return i;
    for (int i = 0; i < NUM_PARAMETERS; i++) /* a name that was not interned */
        if (PyUnicode_Compare(state->parameter_names[i], name) == 0) return i;
    PyErr_Clear();
    return -1;
}

static int read_arguments(fc_call *call, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names)
{
    if (num_args > NUM_POSITIONAL) {
        PyErr_Format(PyExc_TypeError,
                     "attention() takes at most %d positional arguments (%zd given); from 'window' on, name them",
                     NUM_POSITIONAL, num_args);
        return -1;
    }
    for (Py_ssize_t i = 0; i < num_args; i++) call->given[i] = args[i];
    Py_ssize_t num_keywords = keyword_names == NULL ? 0 : PyTuple_Size(keyword_names);
    for (Py_ssize_t i = 0; i < num_keywords; i++) {
        PyObject *name = PyTuple_GetItem(keyword_names, i);
        int at = find_parameter(call->state, name);
        if (at < 0) {
            PyErr_Format(PyExc_TypeError, "attention() got an unexpected keyword argument %R", name);
            return -1;
        }
        if (call->given[at] != NULL) {
            PyErr_Format(PyExc_TypeError, "attention() got multiple values for argument %R", name);
            return -1;
        }
        call->given[at] = args[num_args + i];
    }
    for (int i = QUERY; i <= VALUE; i++)
        if (call->given[i] == NULL) {
            PyErr_Format(PyExc_TypeError, "attention() is missing its argument '%s'", fc_parameter_names[i]);
            return -1;
        }
    for (int i = ATTN_MASK; i < NUM_PARAMETERS; i++)
        if (call->given[i] == Py_None) {
            call->given[i] = NULL;
            call->is_none[i] = true;
        }
    return 0;
}

static int refuse_type(const fc_call *call, enum parameter at, const char *allowed)
{
    PyObject *type = PyType_GetQualName(Py_TYPE(call->given[at]));
    if (type == NULL) return -1;
    PyErr_Format(PyExc_TypeError, "%s is %R (%U); allowed: %s", fc_parameter_names[at], call->given[at], type, allowed);
    Py_DECREF(type);
    return -1;
}

/* numpy.bool, which is neither a bool nor an int. */
static bool is_numpy_bool(PyObject *given)
{
    PyObject *name = PyType_GetName(Py_TYPE(given));
    bool found = name != NULL && (PyUnicode_CompareWithASCIIString(name, "bool") == 0 ||
                                  PyUnicode_CompareWithASCIIString(name, "bool_") == 0);
    Py_XDECREF(name);
    PyErr_Clear();
    return found;
}

static int read_bool(const fc_call *call, enum parameter at, bool *value)
{
    PyObject *given = call->given[at];
    if (given == NULL) return 0;
    if (PyBool_Check(given)) {
        *value = given == Py_True;
        return 0;
    }
    if (!PyLong_Check(given) && !is_numpy_bool(given))
        return refuse_type(call, at, at == IS_CAUSAL ? "True, False, 'lower_right'" : "True, False");
    int truth = PyObject_IsTrue(given);
    *value = truth == 1;
    return truth < 0 ? -1 : 0;
}

static int read_double(const fc_call *call, enum parameter at, double *value)
{
    *value = PyFloat_AsDouble(call->given[at]);
    if (*value != -1.0 || !PyErr_Occurred()) return 0;
    if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%s is an int beyond what a float holds; it must be finite",
                     fc_parameter_names[at]);
        return -1;
    }
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) return -1;
    PyErr_Clear();
    return refuse_type(call, at, "a number or None");
}

/* An int that must fit 64 bits, from anything with __index__. */
static int read_int64(PyObject *given, const char *name, int64_t *value)
{
    PyObject *index = PyNumber_Index(given);
    if (index == NULL) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_TypeError, "%s is %R; allowed: an int", name, given);
        }
        return -1;
    }
    int overflow;
    *value = PyLong_AsLongLongAndOverflow(index, &overflow);
    Py_DECREF(index);
    if (*value == -1 && PyErr_Occurred()) return -1;
    if (overflow == 0) return 0;
    PyErr_Format(PyExc_ValueError, "%s is %R; allowed: an int of up to 60 bits", name, given);
    return -1;
}

static bool is_word(PyObject *given, const char *word)
{
    return given != NULL && PyUnicode_Check(given) && PyUnicode_CompareWithASCIIString(given, word) == 0;
}

/* One side of window: None and -1 leave it open. */
static int read_side(PyObject *side, const char *name, uint32_t flag, int64_t *value, uint32_t *flags)
{
    if (side == Py_None) return 0;
    if (read_int64(side, name, value) != 0) return -1;
    if (*value == -1) {
        *value = 0;
        return 0;
    }
    *flags |= flag;
    return 0;
}

static int read_window(const fc_call *call, fc_attention_problem *problem)
{
    static const char allowed[] = "None or a pair (left, right) of ints, None or -1 leaving a side open";
    PyObject *given = call->given[WINDOW];
    if (given == NULL) return 0;
    if (!PyTuple_Check(given) && !PyList_Check(given)) return refuse_type(call, WINDOW, allowed);
    if (PySequence_Size(given) != 2) {
        PyErr_Format(PyExc_ValueError, "window is %R; allowed: %s", given, allowed);
        return -1;
    }
    PyObject *left = PySequence_GetItem(given, 0), *right = PySequence_GetItem(given, 1);
    int error = left == NULL || right == NULL ||
                read_side(left, "window's left side", FC_WINDOW_LEFT, &problem->window_left, &problem->flags) != 0 ||
                read_side(right, "window's right side", FC_WINDOW_RIGHT, &problem->window_right, &problem->flags) != 0;
    Py_XDECREF(left);
    Py_XDECREF(right);
    return error ? -1 : 0;
}

static int read_diagonal(const fc_call *call, fc_attention_problem *problem)
{
    PyObject *given = call->given[DIAGONAL];
    if (given == NULL) {
        if (call->is_none[DIAGONAL]) {
            PyErr_SetString(PyExc_TypeError, "diagonal is None; allowed: an int or 'lower_right'");
            return -1;
        }
        return 0;
    }
    if (PyUnicode_Check(given)) {
        if (!is_word(given, "lower_right")) {
            PyErr_Format(PyExc_ValueError, "diagonal is %R; allowed: an int or 'lower_right'", given);
            return -1;
        }
        problem->flags |= FC_LOWER_RIGHT;
        return 0;
    }
    return read_int64(given, "diagonal", &problem->diagonal);
}

static int read_causal(const fc_call *call, fc_attention_problem *problem)
{
    PyObject *given = call->given[IS_CAUSAL];
    bool causal = false;
    if (given != NULL && PyUnicode_Check(given)) {
        if (!is_word(given, "lower_right")) {
            PyErr_Format(PyExc_ValueError, "is_causal is %R; allowed: True, False, 'lower_right'", given);
            return -1;
        }
        if (call->given[DIAGONAL] != NULL && !is_word(call->given[DIAGONAL], "lower_right")) {
            PyErr_Format(PyExc_ValueError, "is_causal is 'lower_right' and diagonal is %R; give one of them",
                         call->given[DIAGONAL]);
            return -1;
        }
        problem->flags |= FC_CAUSAL | FC_LOWER_RIGHT;
        return 0;
    }
    if (read_bool(call, IS_CAUSAL, &causal) != 0) return -1;
    if (causal) problem->flags |= FC_CAUSAL;
    return 0;
}

static int read_block(const fc_call *call, enum parameter at, int32_t *block)
{
    if (call->given[at] == NULL) return 0;
    int64_t value;
    if (read_int64(call->given[at], fc_parameter_names[at], &value) != 0) return -1;
    if (value < 1 || value > INT32_MAX) {
        PyErr_Format(PyExc_ValueError,
                     "%s is %lld; allowed: None to let the library choose, or a size that explain() names",
                     fc_parameter_names[at], (long long)value);
        return -1;
    }
    *block = (int32_t)value;
    return 0;
}

static int read_dropout(const fc_call *call)
{
    double p = 0;
    if (call->given[DROPOUT_P] == NULL) return 0;
    if (read_double(call, DROPOUT_P, &p) != 0) return -1;
    if (p == 0) return 0;
    if (p > 0 && p <= 1)
        PyErr_Format(PyExc_NotImplementedError,
                     "dropout_p is %R, and flashcore %s has no dropout yet; pass 0.0 (as in evaluation)",
                     call->given[DROPOUT_P], fc_version());
    else
        PyErr_Format(PyExc_ValueError, "dropout_p is %R; allowed: 0.0 to 1.0", call->given[DROPOUT_P]);
    return -1;
}

/* Options into problem->flags and fields. The GIL is held, so nobody's os.environ can change under getenv. */
static int read_options(fc_call *call)
{
    fc_attention_problem *problem = &call->problem;
    bool grouped = false, deterministic = false; /* grouped heads need no word here; PyTorch's flag is accepted */
    if (read_dropout(call) != 0 || read_causal(call, problem) != 0 || read_diagonal(call, problem) != 0 ||
        read_window(call, problem) != 0 || read_bool(call, ENABLE_GQA, &grouped) != 0 ||
        read_bool(call, RETURN_LSE, &call->return_lse) != 0 || read_bool(call, DETERMINISTIC, &deterministic) != 0 ||
        read_block(call, BLOCK_M, &problem->block_m) != 0 || read_block(call, BLOCK_N, &problem->block_n) != 0)
        return -1;
    if (deterministic) problem->flags |= FC_DETERMINISTIC;
    if (call->given[SCALE] != NULL) {
        if (read_double(call, SCALE, &problem->scale) != 0) return -1;
        problem->flags |= FC_SCALE;
    }
    if (call->given[SOFTCAP] != NULL && read_double(call, SOFTCAP, &problem->softcap) != 0) return -1;
    const char *forced = getenv("FLASHCORE_FORCE");
    if (forced != NULL && forced[0] != '\0') {
        snprintf(call->forced_kernel, sizeof call->forced_kernel, "%s", forced);
        problem->kernel = call->forced_kernel;
    }
    return 0;
}

static int read_layout(const fc_call *call, bool *heads_inside)
{
    PyObject *given = call->given[LAYOUT];
    *heads_inside = is_word(given, "bshd");
    if (given == NULL || *heads_inside || is_word(given, "bhsd")) return 0;
    PyErr_Format(
        PyUnicode_Check(given) ? PyExc_ValueError : PyExc_TypeError,
        "layout is %R; allowed: 'bhsd' (batch, heads, sequence, head_dim), 'bshd' (batch, sequence, heads, head_dim)",
        given);
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
    PyErr_Format(PyExc_ValueError, "stream is %R, but the query %s", call->given[STREAM],
                 on_cpu ? "is a CPU array; leave stream out"
                        : "comes from a library with a current stream of its own, which is used; enter it there (with "
                          "torch.cuda.stream(s): "
                          "or with s:) and leave stream out");
    return -1;
}

/* A query of another protocol must know the stream before its data is asked for: its library's, or the caller's. */
static int find_stream(fc_call *call, const fc_kind *kind)
{
    PyObject *query = call->given[QUERY];
    int32_t device_id = kind->protocol == FC_BY_DLPACK ? cuda_device_of(query) : 0;
    if (device_id >= 0 && ask_stream(call->state, "stream_of", query, device_id, &call->has_stream, &call->stream) != 0)
        return -1;
    if (call->given[STREAM] == NULL) return 0;
    if (device_id < 0 || call->has_stream) return refuse_stream(call, device_id < 0);
    return ask_stream(call->state, "stream_handle", call->given[STREAM], -1, &call->has_stream, &call->stream);
}

static int import_one(fc_call *call, enum fc_operand operand, const char *name, PyObject *object)
{
    fc_kind kind;
    if (fc_kind_of(call->state, object, &kind) != 0) return -1;
    if (kind.is_torch) {
        if (!call->any_torch && fc_torch_check_modes(call->state) != 0) return -1;
        call->any_torch = true;
        if (fc_torch_check_tensor(call->state, name, object) != 0) return -1;
    }
    bool asks_stream = kind.protocol == FC_BY_DLPACK || kind.protocol == FC_BY_CAI;
    if (operand == FC_QUERY && asks_stream && find_stream(call, &kind) != 0) return -1;
    fc_array *array = &call->arrays[operand];
    if (fc_array_import(call->state, name, object, &kind, call->stream, call->has_stream, array) != 0) return -1;
    call->has[operand] = true;
    if (operand == FC_QUERY && !asks_stream && call->given[STREAM] != NULL)
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

/* All on one device; a CUDA array interface does not say which GPU, so its pointer is asked. */
static int check_devices(fc_call *call)
{
    fc_array *query = &call->arrays[FC_QUERY];
    for (int operand = 0; operand < FC_NUM_OPERANDS; operand++) {
        fc_array *array = &call->arrays[operand];
        if (!call->has[operand]) continue;
        if (array->device_id < 0) {
            fc_status status = fc_pointer_device(array->data, &array->device_id);
            if (status != FC_OK) return raise_status(status);
        }
        if (array->device_type == query->device_type && array->device_id == query->device_id) continue;
        char ours[32], theirs[32];
        format_device(ours, sizeof ours, query);
        format_device(theirs, sizeof theirs, array);
        PyErr_Format(PyExc_ValueError, "query is on %s and %s on %s; all arrays must be on one device", ours,
                     array->name, theirs);
        return -1;
    }
    call->problem.device_type = query->device_type;
    call->problem.device_id = query->device_id;
    return 0;
}

/* Producers on other streams: their work before ours, or (after the launch) ours before what they do next. */
static int order_streams(fc_call *call, bool before)
{
    if (call->problem.device_type != FC_CUDA) return 0;
    for (int operand = 0; operand < FC_NUM_OPERANDS; operand++) {
        const fc_array *array = &call->arrays[operand];
        if (!call->has[operand] || !array->has_stream || array->stream == call->stream) continue;
        fc_status status = before ? fc_stream_order(call->problem.device_id, array->stream, call->stream)
                                  : fc_stream_order(call->problem.device_id, call->stream, array->stream);
        if (status != FC_OK) return raise_status(status);
    }
    return 0;
}

/* Arguments to a problem, all but the outputs. */
static int prepare(fc_call *call, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names)
{
    bool heads_inside;
    call->problem.struct_size = sizeof call->problem;
    if (read_arguments(call, args, num_args, keyword_names) != 0 || read_layout(call, &heads_inside) != 0 ||
        read_options(call) != 0)
        return -1;
    for (int i = 0; i < NUM_INPUTS; i++) {
        PyObject *object = call->given[inputs[i].parameter];
        if (object != NULL && import_one(call, inputs[i].operand, fc_parameter_names[inputs[i].parameter], object) != 0)
            return -1;
    }
    fc_geometry *g = &call->geometry;
    if (fc_geometry_of(&call->arrays[FC_QUERY], &call->arrays[FC_KEY], &call->arrays[FC_VALUE], heads_inside, g) != 0)
        return -1;
    for (int i = 0; i < NUM_INPUTS; i++) {
        enum fc_operand operand = inputs[i].operand;
        if (call->has[operand] &&
            fc_place(g, operand, &call->arrays[operand], tensor_of(&call->problem, operand), &call->batches) != 0)
            return -1;
    }
    if (call->given[OUT] != NULL && import_one(call, FC_OUT, "out", call->given[OUT]) != 0) return -1;
    if (check_devices(call) != 0) return -1;
    fc_attention_problem *p = &call->problem;
    p->num_heads_q = g->num_heads_q;
    p->num_heads_kv = g->num_heads_kv;
    p->seqlen_q = g->seqlen_q;
    p->seqlen_k = g->seqlen_k;
    p->head_dim = g->head_dim;
    p->head_dim_v = g->head_dim_v;
    call->batches.ndim = g->num_batch_dims;
    memcpy(call->batches.shape, g->batch_shape, sizeof call->batches.shape);
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
        result->object = call->given[OUT];
        Py_INCREF(result->object);
    } else {
        if (fc_result_new(call->state, query, is_lse ? "lse" : "out", dtype, is_lse ? g->lse_ndim : g->out_ndim,
                          is_lse ? g->lse_shape : g->out_shape, call->stream, &call->arrays[operand], &result->object,
                          &result->finish) != 0)
            return -1;
        call->has[operand] = true;
    }
    return fc_place(g, operand, &call->arrays[operand], tensor_of(&call->problem, operand), &call->batches);
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
static int report_slow(fc_state *state, const fc_attention_problem *problem, const fc_plan *plan)
{
    const char *mode = getenv("FLASHCORE_SLOW");
    bool is_error = mode != NULL && strcmp(mode, "error") == 0;
    if (mode != NULL && strcmp(mode, "allow") == 0) return 0;
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
        tensor_of(&call->problem, operand)->data =
            (char *)first[operand].data + offset * fc_dtype_size(first[operand].dtype);
    }
}

/* Folds the batches, and runs once, or once for each batch of the dimensions that did not fold. */
static int fold(fc_call *call, int64_t *num_calls)
{
    fc_batches *b = &call->batches;
    *num_calls = 1;
    call->problem.batch = 1;
    for (int i = 0; i < b->ndim; i++)
        if (b->shape[i] == 0) { /* nothing to compute; the checks still run */
            call->problem.batch = 0;
            return 0;
        }
    for (int operand = 0; operand < FC_NUM_OPERANDS; operand++)
        if (!call->has[operand]) memset(b->strides[operand], 0, (size_t)b->ndim * sizeof b->strides[operand][0]);
    fc_fold(b);
    if (b->ndim == 0) return 0;
    int last = b->ndim - 1;
    call->problem.batch = b->shape[last];
    for (int operand = 0; operand < FC_NUM_OPERANDS; operand++)
        tensor_of(&call->problem, operand)->strides[0] = call->has[operand] ? b->strides[operand][last] : 0;
    for (int i = 0; i < last; i++) *num_calls *= b->shape[i];
    return 0;
}

static int run(fc_call *call)
{
    fc_attention_problem *problem = &call->problem;
    int64_t num_calls;
    fc_plan plan = {.struct_size = sizeof plan};
    if (fold(call, &num_calls) != 0) return -1;
    if (problem->device_type == FC_CUDA) {
        fc_status status = fc_attention_plan(problem, NULL, &plan);
        if (status != FC_OK) return raise_status(status);
        if (plan.slow != 0 && report_slow(call->state, problem, &plan) != 0) return -1;
        if (order_streams(call, true) != 0) return -1;
    }
    fc_tensor first[FC_NUM_OPERANDS];
    if (num_calls > 1)
        for (int operand = 0; operand < FC_NUM_OPERANDS; operand++) first[operand] = *tensor_of(problem, operand);

    void *workspace = NULL;
    fc_status status = FC_OK;
    Py_BEGIN_ALLOW_THREADS if (plan.workspace_bytes > 0) status =
        fc_malloc(problem->device_type, problem->device_id, plan.workspace_bytes, call->stream, &workspace);
    for (int64_t i = 0; i < num_calls && status == FC_OK; i++) {
        if (num_calls > 1) step_to(call, first, call->batches.ndim - 1, i);
        status = fc_attention_forward(problem, workspace, plan.workspace_bytes, call->stream);
    }
    if (workspace != NULL && fc_free(problem->device_type, problem->device_id, workspace, call->stream) != FC_OK &&
        status == FC_OK)
        status = FC_CUDA_ERROR;
    Py_END_ALLOW_THREADS if (status != FC_OK) return raise_status(status);
    return order_streams(call, false);
}

static void release(fc_call *call)
{
    for (int operand = 0; operand < FC_NUM_OPERANDS; operand++)
        if (call->has[operand]) fc_array_release(&call->arrays[operand]);
}

PyObject *fc_py_attention(PyObject *module, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names)
{
    fc_call call;
    memset(&call, 0, offsetof(fc_call, arrays));
    memset(&call.has, 0, sizeof call - offsetof(fc_call, has));
    call.state = PyModule_GetState(module);
    fc_result out = {NULL, NULL}, lse = {NULL, NULL};
    PyObject *returned = NULL;

    if (prepare(&call, args, num_args, keyword_names) != 0) goto done;
    if (make_result(&call, FC_OUT, &out) != 0) goto done;
    if (call.return_lse && make_result(&call, FC_LSE, &lse) != 0) goto done;
    if (run(&call) != 0) goto done;
    returned = finish_result(&out);
    if (call.return_lse && returned != NULL) {
        PyObject *second = finish_result(&lse);
        PyObject *pair = second == NULL ? NULL : PyTuple_Pack(2, returned, second);
        Py_XDECREF(second);
        Py_DECREF(returned);
        returned = pair;
    }
done:
    release(&call);
    Py_XDECREF(out.object);
    Py_XDECREF(out.finish);
    Py_XDECREF(lse.object);
    Py_XDECREF(lse.finish);
    return returned;
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
    fc_place(g, operand, array, tensor_of(&call->problem, operand), &call->batches);
    call->has[operand] = true;
}

PyObject *fc_py_plan(PyObject *module, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names)
{
    fc_call call;
    memset(&call, 0, sizeof call);
    call.state = PyModule_GetState(module);
    PyObject *returned = NULL;
    if (prepare(&call, args, num_args, keyword_names) != 0) goto done;
    if (call.has[FC_OUT] && check_out(&call) != 0) goto done;
    if (call.has[FC_OUT])
        fc_place(&call.geometry, FC_OUT, &call.arrays[FC_OUT], &call.problem.out, &call.batches);
    else
        imagine_result(&call, FC_OUT);
    if (call.return_lse) imagine_result(&call, FC_LSE);
    int64_t num_calls;
    if (fold(&call, &num_calls) != 0) goto done;
    fc_plan plan = {.struct_size = sizeof plan};
    fc_status status = fc_attention_plan(&call.problem, NULL, &plan);
    if (status != FC_OK) {
        raise_status(status);
        goto done;
    }
    char text[512];
    fc_plan_describe(&call.problem, NULL, &plan, text, sizeof text);
    returned =
        Py_BuildValue("{s:s,s:i,s:i,s:i,s:i,s:L,s:L,s:K,s:I,s:s}", "kernel", fc_kernel_name(plan.kernel), "block_m",
                      plan.block_m, "block_n", plan.block_n, "num_splits", plan.num_splits, "num_threads",
                      plan.num_threads, "num_tiles", (long long)plan.grid, "num_calls", (long long)num_calls,
                      "workspace_bytes", (unsigned long long)plan.workspace_bytes, "slow", plan.slow, "reason", text);
done:
    release(&call);
    return returned;
}
