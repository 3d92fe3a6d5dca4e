/*
 * autograd.c - the ways of a call that torch must see.
 *
 * A call that needs a gradient, and nothing else of torch, runs here like any other, and then a node of autograd's
 * graph is hung on its result: flashcore/torch/_eager.py keeps what the backward needs. Its arrays have four
 * dimensions and broadcast nothing among themselves, so each gradient has its input's shape; other shapes are brought
 * to that form by flashcore/torch/_shapes.py first. What more than autograd must see goes by
 * torch.ops.flashcore.attention. Both cost many times what the plain call does, which passes by here.
 */
#include "binding.h"

/* True where the call is in the form of which backward() gives the gradients, and all its arrays are tensors. */
bool fc_torch_is_direct(const fc_call *call)
{
    const fc_array *query = &call->arrays[FC_QUERY], *key = &call->arrays[FC_KEY], *value = &call->arrays[FC_VALUE];
    if (query->ndim != 4 || key->ndim != 4 || value->ndim != 4) return false;
    int head = call->arguments.heads_inside ? 2 : 1;
    for (int operand = 0; operand < FC_NUM_OPERANDS; operand++)
        if (call->has[operand] && !call->arrays[operand].kind.is_torch) return false;
    if (call->has_seed && !call->seed.kind.is_torch) return false;
    return query->shape[0] == key->shape[0] && key->shape[0] == value->shape[0] &&
           key->shape[head] == value->shape[head] && query->shape[head] == call->geometry.num_heads_q;
}

static int set(PyObject *dict, const char *name, PyObject *value)
{
    int error = value == NULL ? -1 : PyDict_SetItemString(dict, name, value);
    Py_XDECREF(value);
    return error;
}

static PyObject *side_of(bool given, int64_t width)
{
    return PyLong_FromLongLong(given ? width : -1);
}

/* The options that are set, in the words of the op: numbers and bools alone. */
static PyObject *options_of(const fc_call *call)
{
    const fc_attention_problem *p = &call->problem;
    bool left = p->flags & FC_WINDOW_LEFT, right = p->flags & FC_WINDOW_RIGHT;
    int64_t diagonal = p->flags & FC_LOWER_RIGHT ? p->seqlen_k - p->seqlen_q : p->diagonal;
    PyObject *options = PyDict_New();
    if (options == NULL) return NULL;
    if (((p->flags & FC_CAUSAL) && set(options, "is_causal", PyBool_FromLong(1)) != 0) ||
        ((p->flags & FC_SCALE) && set(options, "scale", PyFloat_FromDouble(p->scale)) != 0) ||
        ((left || right) &&
         set(options, "window",
             Py_BuildValue("[NN]", side_of(left, p->window_left), side_of(right, p->window_right))) != 0) ||
        (diagonal != 0 && set(options, "diagonal", PyLong_FromLongLong(diagonal)) != 0) ||
        (p->softcap != 0 && set(options, "softcap", PyFloat_FromDouble(p->softcap)) != 0) ||
        (call->arguments.heads_inside && set(options, "layout", PyUnicode_FromString("bshd")) != 0) ||
        (p->dropout_p != 0 && set(options, "dropout_p", PyFloat_FromDouble(p->dropout_p)) != 0) ||
        ((p->flags & FC_DETERMINISTIC) && set(options, "deterministic", PyBool_FromLong(1)) != 0) ||
        (p->block_m != 0 && set(options, "block_m", PyLong_FromLong(p->block_m)) != 0) ||
        (p->block_n != 0 && set(options, "block_n", PyLong_FromLong(p->block_n)) != 0)) {
        Py_DECREF(options);
        return NULL;
    }
    return options;
}

/* The result with its place in autograd's graph: out, or with return_lse (out, lse). */
PyObject *fc_torch_node(const fc_call *call, PyObject *out, PyObject *lse)
{
    PyObject *const *given = call->arguments.given;
    PyObject *mask = given[FC_ARG_ATTN_MASK], *slopes = given[FC_ARG_ALIBI_SLOPES], *sinks = given[FC_ARG_SINKS];
    PyObject *seed = call->problem.dropout_p != 0 ? given[FC_ARG_DROPOUT_SEED] : Py_None;
    if (mask == NULL) mask = Py_None;
    if (slopes == NULL) slopes = Py_None;
    if (sinks == NULL) sinks = Py_None;
    PyObject *node = NULL, *options = options_of(call), *apply = fc_torch_integration(call->state, "apply");
    PyObject *return_lse = call->arguments.return_lse ? Py_True : Py_False;
    /* In a tuple the results are no inputs to autograd. */
    PyObject *rest = options == NULL ? NULL : PyTuple_Pack(4, out, lse, return_lse, options);
    if (apply != NULL && rest != NULL)
        node = PyObject_CallFunctionObjArgs(apply, given[FC_ARG_QUERY], given[FC_ARG_KEY], given[FC_ARG_VALUE], mask,
                                            slopes, sinks, seed, rest, NULL);
    Py_XDECREF(options);
    Py_XDECREF(apply);
    Py_XDECREF(rest);
    return node;
}

/* After a failure, which it takes back where it was that a gradient has no memory: asked only then, for it is rare. */
static bool is_batched(fc_state *state, PyObject *const of_results[2])
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    bool batched =
        fc_torch_is_legacy_batched(state, of_results[0]) > 0 || fc_torch_is_legacy_batched(state, of_results[1]) > 0;
    PyErr_Clear();
    if (!batched) {
        PyErr_Restore(type, value, traceback);
        return false;
    }
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return true;
}

/* The node's backward, which autograd calls with (ctx, dout[, dlse]): a gradient for each input of the node. */
PyObject *fc_py_node_backward(PyObject *module, PyObject *const *args, Py_ssize_t num_args)
{
    fc_state *state = PyModule_GetState(module);
    if (num_args < 2 || num_args > 3) {
        PyErr_SetString(PyExc_TypeError, "node_backward() takes autograd's ctx, dout, and dlse where lse was returned");
        return NULL;
    }
    if (state->torch.tensor_type == NULL) {
        PyErr_SetString(PyExc_TypeError, "node_backward() is for torch's autograd to call, and no tensor was seen yet");
        return NULL;
    }
    PyObject *ctx = args[0], *of_results[2] = {args[1], num_args == 3 ? args[2] : Py_None};
    PyObject *gradients = NULL, *by_op = NULL, *saved = PyObject_GetAttr(ctx, state->torch.name_saved_tensors);
    PyObject *wanted = saved == NULL ? NULL : PyObject_GetAttr(ctx, state->torch.name_needs_input_grad);
    PyObject *options = wanted == NULL ? NULL : PyObject_GetAttr(ctx, state->torch.name_options);
    if (options == NULL) goto done;
    int grad_enabled = fc_torch_grad_enabled(state); /* create_graph=True: a second derivative is to be refused */
    int plain = grad_enabled < 0 ? -1 : !grad_enabled && of_results[0] != Py_None;
    if (plain > 0) plain = fc_torch_is_plain(state, of_results, 2);
    if (plain < 0) goto done;
    PyObject *call[5] = {saved, of_results[0], of_results[1], wanted, options};
    if (plain) {
        gradients = fc_py_backward(module, call, 5);
        if (gradients != NULL || !is_batched(state, of_results)) goto done;
    }
    if ((by_op = fc_torch_integration(state, "backward_by_op")) != NULL)
        gradients = PyObject_CallFunctionObjArgs(by_op, call[0], call[1], call[2], call[3], call[4], NULL);
done:
    Py_XDECREF(by_op);
    Py_XDECREF(saved);
    Py_XDECREF(wanted);
    Py_XDECREF(options);
    return gradients;
}

/* The same call of a function of flashcore/torch. */
PyObject *fc_torch_call(fc_state *state, const char *function, PyObject *const *args, Py_ssize_t num_args,
                        PyObject *keyword_names)
{
    PyObject *callee = fc_torch_integration(state, function);
    PyObject *result = NULL, *positional = PyTuple_New(num_args), *named = PyDict_New();
    if (callee == NULL || positional == NULL || named == NULL) goto done;
    for (Py_ssize_t i = 0; i < num_args; i++) {
        Py_INCREF(args[i]);
        if (PyTuple_SetItem(positional, i, args[i]) != 0) goto done;
    }
    Py_ssize_t num_named = keyword_names == NULL ? 0 : PyTuple_Size(keyword_names);
    for (Py_ssize_t i = 0; i < num_named; i++)
        if (PyDict_SetItem(named, PyTuple_GetItem(keyword_names, i), args[num_args + i]) != 0) goto done;
    result = PyObject_Call(callee, positional, named);
done:
    Py_XDECREF(callee);
    Py_XDECREF(positional);
    Py_XDECREF(named);
    return result;
}

/* What autocast casts to on the query's device; NULL where it is off there. A new reference. */
static int find_target(const fc_call *call, PyObject **target)
{
    const char *device = call->arrays[FC_QUERY].device_type == FC_CUDA ? "cuda" : "cpu";
    *target = NULL;
    PyObject *enabled = PyObject_CallFunction(call->state->torch.is_autocast_enabled, "s", device);
    if (enabled == NULL) return -1;
    bool on = enabled == Py_True;
    Py_DECREF(enabled);
    if (!on) return 0;
    if (call->state->torch.get_autocast_dtype == NULL) { /* torch before 2.4 */
        PyErr_SetString(PyExc_NotImplementedError,
                        "torch.autocast is active, and flashcore casts for it with torch 2.4 "
                        "and later; call under torch.autocast(device_type, enabled=False)");
        return -1;
    }
    *target = PyObject_CallFunction(call->state->torch.get_autocast_dtype, "s", device);
    return *target == NULL ? -1 : 0;
}

/* As PyTorch's scaled_dot_product_attention: query, key, value and a float mask go to autocast's dtype, float64 stays.
 * Slopes and sinks may stay in float32. The cast is torch's, so autograd sees it. */
int fc_torch_autocast(fc_call *call)
{
    PyObject *target;
    int error = find_target(call, &target);
    if (error != 0 || target == NULL) return error;
    for (int i = 0; i < FC_NUM_INPUTS && error == 0; i++) {
        enum fc_operand operand = fc_inputs[i].operand;
        fc_array *array = &call->arrays[operand];
        if (!call->has[operand] || !array->kind.is_torch) continue;
        bool is_half = array->dtype == FC_FLOAT16 || array->dtype == FC_BFLOAT16;
        if (!is_half && (array->dtype != FC_FLOAT32 || operand == FC_ALIBI || operand == FC_SINKS)) continue;
        PyObject *dtype = PyObject_GetAttr(array->object, call->state->torch.name_dtype);
        error = dtype == NULL ? -1 : 0;
        Py_XDECREF(dtype);
        if (error != 0 || dtype == target) continue;
        PyObject *cast = PyObject_CallMethod(array->object, "to", "O", target);
        if (cast == NULL) error = -1;
        if (error != 0) continue;
        call->casts[operand] = call->arguments.given[fc_inputs[i].argument] = cast;
        fc_kind kind = array->kind;
        const char *name = array->name;
        kind.type = Py_TYPE(cast); /* of a Parameter, a Tensor */
        fc_array_release(array);
        error = fc_array_import(call->state, name, cast, &kind, call->stream, call->has_stream, array);
    }
    Py_DECREF(target);
    return error;
}
