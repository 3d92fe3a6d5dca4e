/*
 * backward.c - backward(): the gradients of a call.
 *
 * Arguments are read as attention() reads them (call.c), after those that only the backward has. What is asked of
 * autograd, and shapes that need sums over batches, are the part of flashcore/torch: here a gradient has the shape of
 * its input, and there is one batch dimension at most.
 */
#include <string.h>

#include "binding.h"

/* What the backward has beyond the forward: what is read, and then what is written, in the order of the result. */
enum { OUT, LSE, DOUT, DLSE, DQ, DK, DV, DBIAS, DALIBI, DSINKS, NUM_ARRAYS, FIRST_GRADIENT = DQ };

/* The first argument: query, key, value, attn_mask, alibi_slopes, sinks, dropout_seed, out, lse. */
enum { SAVED_MASK = 3, SAVED_ALIBI, SAVED_SINKS, SAVED_SEED, SAVED_OUT, SAVED_LSE, NUM_SAVED };

/* Which array of the forward each is laid out as. */
static const struct {
    const char *name;
    enum fc_operand like;
} known[NUM_ARRAYS] = {
    [OUT] = {"out", FC_OUT},         [LSE] = {"lse", FC_LSE},      [DOUT] = {"dout", FC_OUT},
    [DLSE] = {"dlse", FC_LSE},       [DQ] = {"dq", FC_QUERY},      [DK] = {"dk", FC_KEY},
    [DV] = {"dv", FC_VALUE},         [DBIAS] = {"dbias", FC_MASK}, [DALIBI] = {"dalibi", FC_ALIBI},
    [DSINKS] = {"dsinks", FC_SINKS},
};

typedef struct fc_gradients {
    fc_call call;
    fc_array arrays[NUM_ARRAYS];
    bool has[NUM_ARRAYS];
    fc_tensor tensors[NUM_ARRAYS];
    PyObject *gradients[NUM_ARRAYS]; /* owned */
} fc_gradients;

/* Where the array lies, as the library's tensor. */
static int place(fc_gradients *g, int which)
{
    fc_batches batches = {0};
    enum fc_operand like = known[which].like;
    if (fc_place(&g->call.geometry, like, &g->arrays[which], &g->tensors[which], &batches) != 0) return -1;
    g->tensors[which].strides[0] = g->call.geometry.num_batch_dims > 0 ? batches.strides[like][0] : 0;
    return 0;
}

/* The library trusts the sizes it is told, so an array must have exactly those of what it belongs to. */
static int check_shape(const fc_geometry *g, const fc_array *array, enum fc_operand like)
{
    int ndim = like == FC_OUT ? g->out_ndim : g->lse_ndim;
    const int64_t *shape = like == FC_OUT ? g->out_shape : g->lse_shape;
    bool same = array->ndim == ndim;
    for (int i = 0; i < ndim && same; i++) same = array->shape[i] == shape[i];
    if (same) return 0;
    char given[200], wanted[200];
    fc_format_shape(given, sizeof given, array->ndim, array->shape);
    fc_format_shape(wanted, sizeof wanted, ndim, shape);
    PyErr_Format(PyExc_ValueError, "%s has shape %s; here it must be %s", array->name, given, wanted);
    return -1;
}

static int import_array(fc_gradients *g, int which, PyObject *object)
{
    fc_call *call = &g->call;
    fc_array *array = &g->arrays[which];
    if (which == DLSE && object == Py_None) return 0;
    fc_kind kind;
    if (fc_kind_of(call->state, object, &kind) != 0) return -1;
    if (fc_array_import(call->state, known[which].name, object, &kind, call->stream, call->has_stream, array) != 0)
        return -1;
    g->has[which] = true;
    if (fc_call_check_device(call, array) != 0) return -1;
    if (check_shape(&call->geometry, array, known[which].like) != 0) return -1;
    return place(g, which);
}

/* A gradient's array, like its input: torch lays it in memory as the input is, so what makes the input a view of
 * something (a projection's result, say) need not copy it back. */
static int make_gradient(fc_gradients *g, int which)
{
    fc_call *call = &g->call;
    enum fc_operand like = known[which].like;
    const fc_array *input = &call->arrays[like];
    fc_array *array = &g->arrays[which];
    if (!call->has[like] || which == DALIBI) {
        PyErr_Format(PyExc_ValueError, "%s is wanted, but %s", known[which].name,
                     which == DALIBI ? "flashcore computes no gradient of alibi_slopes" : "the call has no such input");
        return -1;
    }
    PyObject *finish = NULL;
    if (fc_result_new(call->state, input, known[which].name, input->dtype, input->ndim, input->shape, call->stream,
                      array, &g->gradients[which], &finish) != 0)
        return -1;
    if (finish != NULL) { /* of kinds that cannot be written, JAX's arrays */
        Py_DECREF(finish);
        PyErr_Format(PyExc_TypeError, "%s: backward() writes into arrays of numpy and torch", known[which].name);
        return -1;
    }
    g->has[which] = true;
    return place(g, which);
}

/* One truth for each input, in their order; autograd's have more behind them, of what is no array. */
static int make_gradients(fc_gradients *g, PyObject *wanted)
{
    if (!PyTuple_Check(wanted) || PyTuple_Size(wanted) < NUM_ARRAYS - FIRST_GRADIENT) {
        PyErr_Format(PyExc_TypeError,
                     "wanted is %R; allowed: a tuple of bools, one for each of query, key, value, attn_mask, "
                     "alibi_slopes and sinks",
                     wanted);
        return -1;
    }
    for (int which = FIRST_GRADIENT; which < NUM_ARRAYS; which++) {
        int truth = PyObject_IsTrue(PyTuple_GetItem(wanted, which - FIRST_GRADIENT));
        if (truth < 0 || (truth && make_gradient(g, which) != 0)) return -1;
    }
    return 0;
}

static int run(fc_gradients *g)
{
    fc_attention_problem *forward = &g->call.problem;
    forward->out = g->tensors[OUT];
    forward->lse = g->tensors[LSE];
    fc_backward_problem problem = {
        .struct_size = sizeof problem,
        .forward = forward,
        .dout = g->tensors[DOUT],
        .dlse = g->tensors[DLSE],
        .dq = g->tensors[DQ],
        .dk = g->tensors[DK],
        .dv = g->tensors[DV],
        .dbias = g->tensors[DBIAS],
        .dsinks = g->tensors[DSINKS],
    };
    /* FLASHCORE_FORCE: the CPU's kernels have the same names both ways; a GPU's backward is not to be chosen yet. */
    if (forward->device_type == FC_CPU) problem.kernel = forward->kernel;
    fc_plan plan = {.struct_size = sizeof plan};
    fc_status status = fc_attention_backward_plan(&problem, NULL, &plan);
    if (status != FC_OK) return fc_raise_status(status);
    fc_workspace workspace;
    if (fc_report_slow(g->call.state, forward, &plan) != 0) return -1;
    if (fc_workspace_new(&g->call, plan.workspace_bytes, &workspace) != 0) return -1;
    Py_BEGIN_ALLOW_THREADS
    status = fc_attention_backward(&problem, workspace.data, plan.workspace_bytes, g->call.stream);
    Py_END_ALLOW_THREADS
    fc_workspace_free(&workspace);
    return status == FC_OK ? 0 : fc_raise_status(status);
}

/* The gradients, as many as there are truths in `wanted`; None where one is not wanted. */
static PyObject *take_gradients(const fc_gradients *g, PyObject *wanted)
{
    Py_ssize_t count = PyTuple_Size(wanted);
    PyObject *taken = PyTuple_New(count);
    for (Py_ssize_t i = 0; taken != NULL && i < count; i++) {
        bool has = i < NUM_ARRAYS - FIRST_GRADIENT && g->gradients[FIRST_GRADIENT + i] != NULL;
        PyObject *gradient = has ? g->gradients[FIRST_GRADIENT + i] : Py_None;
        Py_INCREF(gradient);
        PyTuple_SetItem(taken, i, gradient);
    }
    return taken;
}

/* attention()'s arguments, out of what was saved of the call and its other options. */
static int prepare(fc_call *call, PyObject *saved, PyObject *options)
{
    enum { NUM_POSITIONAL = 4, NUM_NAMED = 3, FIRST_OPTION = NUM_POSITIONAL + NUM_NAMED };
    static const int order[FIRST_OPTION] = {0, 1, 2, SAVED_MASK, SAVED_ALIBI, SAVED_SINKS, SAVED_SEED};
    static const enum fc_argument named[NUM_NAMED] = {FC_ARG_ALIBI_SLOPES, FC_ARG_SINKS, FC_ARG_DROPOUT_SEED};
    PyObject *args[FIRST_OPTION + FC_NUM_ARGS];
    Py_ssize_t num_options = PyDict_Size(options), at = 0, number = NUM_NAMED;
    if (num_options > FC_NUM_ARGS) {
        PyErr_Format(PyExc_TypeError, "backward() is given %zd options; attention() has no such number", num_options);
        return -1;
    }
    for (int i = 0; i < FIRST_OPTION; i++) args[i] = PyTuple_GetItem(saved, order[i]);
    PyObject *names = PyTuple_New(NUM_NAMED + num_options), *name, *value;
    if (names == NULL) return -1;
    for (int i = 0; i < NUM_NAMED; i++) {
        name = call->state->parameter_names[named[i]];
        Py_INCREF(name);
        PyTuple_SetItem(names, i, name);
    }
    while (PyDict_Next(options, &at, &name, &value)) {
        args[NUM_POSITIONAL + number] = value;
        Py_INCREF(name);
        PyTuple_SetItem(names, number++, name);
    }
    int error = fc_call_prepare(call, args, NUM_POSITIONAL, names);
    Py_DECREF(names);
    return error;
}

PyObject *fc_py_backward(PyObject *module, PyObject *const *args, Py_ssize_t num_args)
{
    if (num_args != 5 || !PyTuple_Check(args[0]) || PyTuple_Size(args[0]) != NUM_SAVED || !PyDict_Check(args[4])) {
        PyErr_Format(PyExc_TypeError,
                     "backward() needs a tuple of %d arrays (query, key, value, attn_mask, alibi_slopes, sinks, "
                     "dropout_seed, out, lse), dout, dlse, wanted, and a dict of options",
                     NUM_SAVED);
        return NULL;
    }
    fc_gradients g;
    memset(&g, 0, sizeof g);
    fc_call_begin(&g.call, PyModule_GetState(module), true);
    PyObject *const read[FIRST_GRADIENT] = {PyTuple_GetItem(args[0], SAVED_OUT), PyTuple_GetItem(args[0], SAVED_LSE),
                                            args[1], args[2]};
    int error = prepare(&g.call, args[0], args[4]);
    if (error == 0 && g.call.geometry.num_batch_dims > 1) {
        PyErr_SetString(PyExc_ValueError, "backward() takes one batch dimension at most; fold them into one first");
        error = -1;
    }
    if (error == 0) fc_call_fold(&g.call);
    for (int i = 0; i < FIRST_GRADIENT && error == 0; i++) error = import_array(&g, i, read[i]);
    if (error == 0) error = make_gradients(&g, args[3]);
    if (error == 0) error = run(&g);
    PyObject *taken = error == 0 ? take_gradients(&g, args[3]) : NULL;
    for (int i = 0; i < NUM_ARRAYS; i++) {
        if (g.has[i]) fc_array_release(&g.arrays[i]);
        Py_XDECREF(g.gradients[i]);
    }
    fc_call_release(&g.call);
    return taken;
}
