/*
 * backward.c - backward(): the gradients of a call, written into arrays that the caller made.
 *
 * It is what flashcore/torch.py stands on: arguments are read as attention() reads them (call.c), then the arrays that
 * the backward has beyond the forward, by name. What is asked of autograd, and shapes that need sums over batches, are
 * torch.py's part: here a gradient has the shape of its input, and there is one batch dimension at most.
 */
#include <string.h>

#include "binding.h"

enum { OUT, LSE, DOUT, DLSE, DQ, DK, DV, DBIAS, DSINKS, NUM_ARRAYS };

/* Which array of the forward each is laid out as, and where it goes in the problem. */
static const struct {
    const char *name;
    enum fc_operand like;
    bool required, written;
} known[NUM_ARRAYS] = {
    [OUT] = {"out", FC_OUT, true, false},         [LSE] = {"lse", FC_LSE, true, false},
    [DOUT] = {"dout", FC_OUT, true, false},       [DLSE] = {"dlse", FC_LSE, false, false},
    [DQ] = {"dq", FC_QUERY, false, true},         [DK] = {"dk", FC_KEY, false, true},
    [DV] = {"dv", FC_VALUE, false, true},         [DBIAS] = {"dbias", FC_MASK, false, true},
    [DSINKS] = {"dsinks", FC_SINKS, false, true},
};

typedef struct fc_gradients {
    fc_call call;
    fc_array arrays[NUM_ARRAYS];
    bool has[NUM_ARRAYS];
    fc_tensor tensors[NUM_ARRAYS];
} fc_gradients;

/* The library trusts the sizes it is told, so each array must have exactly those of what it belongs to. */
static int check_shape(const fc_call *call, const fc_array *array, enum fc_operand like)
{
    const fc_geometry *g = &call->geometry;
    bool is_result = like == FC_OUT || like == FC_LSE;
    if (!is_result && !call->has[like]) {
        PyErr_Format(PyExc_ValueError, "%s is given, but the call has no %s", array->name,
                     like == FC_MASK ? "attn_mask" : "sinks");
        return -1;
    }
    int ndim = like == FC_OUT ? g->out_ndim : like == FC_LSE ? g->lse_ndim : call->arrays[like].ndim;
    const int64_t *shape = like == FC_OUT ? g->out_shape : like == FC_LSE ? g->lse_shape : call->arrays[like].shape;
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
    enum fc_operand like = known[which].like;
    fc_kind kind;
    if (fc_kind_of(call->state, object, &kind) != 0) return -1;
    if (fc_array_import(call->state, known[which].name, object, &kind, call->stream, call->has_stream, array) != 0)
        return -1;
    g->has[which] = true;
    if (fc_call_check_device(call, array) != 0 || check_shape(call, array, like) != 0) return -1;
    if (known[which].written && array->read_only) {
        PyErr_Format(PyExc_ValueError, "%s is read-only; give an array that may be written", array->name);
        return -1;
    }
    fc_batches batches = {0};
    if (fc_place(&call->geometry, like, array, &g->tensors[which], &batches) != 0) return -1;
    g->tensors[which].strides[0] = call->geometry.num_batch_dims > 0 ? batches.strides[like][0] : 0;
    return 0;
}

static int import_arrays(fc_gradients *g, PyObject *given)
{
    if (!PyDict_Check(given)) {
        PyErr_SetString(PyExc_TypeError, "backward()'s first argument is a dict of arrays by name");
        return -1;
    }
    Py_ssize_t found = 0;
    for (int i = 0; i < NUM_ARRAYS; i++) {
        PyObject *object = PyDict_GetItemString(given, known[i].name);
        if (object != NULL) found++;
        if (object != NULL && object != Py_None) {
            if (import_array(g, i, object) != 0) return -1;
        } else if (known[i].required) {
            PyErr_Format(PyExc_TypeError, "backward() needs an array '%s'", known[i].name);
            return -1;
        }
    }
    if (found == PyDict_Size(given)) return 0;
    PyErr_Format(PyExc_TypeError, "backward() is given %R; it knows out, lse, dout, dlse, dq, dk, dv, dbias and dsinks",
                 given);
    return -1;
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
        .kernel = forward->kernel, /* FLASHCORE_FORCE: the CPU's kernels have the same names both ways */
    };
    fc_plan plan = {.struct_size = sizeof plan};
    void *workspace = NULL;
    fc_status status;
    Py_BEGIN_ALLOW_THREADS status = fc_attention_backward_plan(&problem, NULL, &plan);
    if (status == FC_OK && plan.workspace_bytes > 0)
        status = fc_malloc(forward->device_type, forward->device_id, plan.workspace_bytes, g->call.stream, &workspace);
    if (status == FC_OK) status = fc_attention_backward(&problem, workspace, plan.workspace_bytes, g->call.stream);
    if (workspace != NULL) fc_free(forward->device_type, forward->device_id, workspace, g->call.stream);
    Py_END_ALLOW_THREADS return status == FC_OK ? 0 : fc_raise_status(status);
}

PyObject *fc_py_backward(PyObject *module, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names)
{
    if (num_args == 0) {
        PyErr_SetString(PyExc_TypeError, "backward() needs a dict of arrays, and then attention()'s arguments");
        return NULL;
    }
    fc_gradients g;
    memset(&g, 0, sizeof g);
    g.call.state = PyModule_GetState(module);
    g.call.below_autograd = true;
    int error = fc_call_prepare(&g.call, args + 1, num_args - 1, keyword_names);
    if (error == 0 && g.call.geometry.num_batch_dims > 1) {
        PyErr_SetString(PyExc_ValueError, "backward() takes one batch dimension at most; fold them into one first");
        error = -1;
    }
    if (error == 0) {
        fc_call_fold(&g.call);
        error = import_arrays(&g, args[0]);
    }
    if (error == 0) error = run(&g);
    for (int i = 0; i < NUM_ARRAYS; i++)
        if (g.has[i]) fc_array_release(&g.arrays[i]);
    fc_call_release(&g.call);
    if (error != 0) return NULL;
    Py_RETURN_NONE;
}
