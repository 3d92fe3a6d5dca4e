/*
 * torch.c - what a torch.Tensor may ask that the C function cannot serve.
 *
 * DLPack's C exchange API hands over pointers and nothing else: it would drop gradients, ignore a sign bit, and pass by
 * autocast, tracing, modes and functorch. So each tensor and the mode stacks are looked at first, through torch's
 * own C functions (about 0.5 us for a call). A call that needs a gradient goes to flashcore/torch.py; what else is not
 * a plain eager call on plain tensors is refused in words.
 */
#include "binding.h"

static PyObject *attribute_path(PyObject *module, const char *a, const char *b, const char *c)
{
    const char *const path[] = {a, b, c};
    PyObject *at = module;
    Py_INCREF(at);
    for (int i = 0; i < 3 && path[i] != NULL && at != NULL; i++) {
        PyObject *next = PyObject_GetAttrString(at, path[i]);
        Py_DECREF(at);
        at = next;
    }
    return at;
}

int fc_torch_load(fc_state *state, PyObject *torch)
{
    const struct {
        PyObject **into;
        const char *a, *b, *c;
        bool optional; /* not in every torch since 2.4 */
    } wanted[] = {
        {&state->torch.parameter_type, "nn", "Parameter", NULL, false},
        {&state->torch.strided, "strided", NULL, NULL, false},
        {&state->torch.is_grad_enabled, "is_grad_enabled", NULL, NULL, false},
        {&state->torch.is_any_autocast_enabled, "_C", "_is_any_autocast_enabled", NULL, true},
        {&state->torch.function_modes, "_C", "_len_torch_function_stack", NULL, false},
        {&state->torch.dispatch_modes, "_C", "_len_torch_dispatch_stack", NULL, false},
        {&state->torch.functorch_level, "_C", "_functorch", "maybe_current_level", true},
        {&state->torch.tracing_state, "_C", "_get_tracing_state", NULL, false},
        {&state->torch.forward_ad, "autograd", "forward_ad", NULL, true},
        {&state->torch.get_num_threads, "get_num_threads", NULL, NULL, false},
        {&state->torch.tensor_type, "Tensor", NULL, NULL, false}, /* last: it says that all is loaded */
    };
    state->torch.name_requires_grad = PyUnicode_InternFromString("requires_grad");
    state->torch.name_is_neg = PyUnicode_InternFromString("is_neg");
    state->torch.name_layout = PyUnicode_InternFromString("layout");
    state->torch.name_current_level = PyUnicode_InternFromString("_current_level");
    for (size_t i = 0; i < sizeof wanted / sizeof wanted[0]; i++) {
        if (*wanted[i].into != NULL) continue;
        PyObject *found = attribute_path(torch, wanted[i].a, wanted[i].b, wanted[i].c);
        if (found == NULL) {
            if (!wanted[i].optional || !PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
            PyErr_Clear();
        }
        *wanted[i].into = found;
    }
    return 0;
}

static int is_true(PyObject *function)
{
    if (function == NULL) return 0;
    PyObject *result = PyObject_CallNoArgs(function);
    if (result == NULL) return -1;
    int truth = result == Py_None ? 0 : PyObject_IsTrue(result);
    Py_DECREF(result);
    return truth;
}

/* Inside torch.autograd.forward_ad.dual_level() a tensor may carry a tangent; outside (level -1) none can. */
static int has_tangent(fc_state *state, PyObject *tensor)
{
    if (state->torch.forward_ad == NULL) return 0;
    PyObject *level = PyObject_GetAttr(state->torch.forward_ad, state->torch.name_current_level);
    if (level == NULL) { /* a private name; without it there is nothing to ask */
        PyErr_Clear();
        return 0;
    }
    long number = PyLong_AsLong(level);
    Py_DECREF(level);
    if (number < 0) {
        PyErr_Clear();
        return 0;
    }
    PyObject *function = fc_interop(state, "torch_has_tangent");
    PyObject *answer = function == NULL ? NULL : PyObject_CallFunctionObjArgs(function, tensor, NULL);
    Py_XDECREF(function);
    if (answer == NULL) return -1;
    int truth = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    return truth;
}

int fc_torch_check_tensor(fc_state *state, const char *name, PyObject *tensor, bool *wants_gradient)
{
    PyObject *layout = PyObject_GetAttr(tensor, state->torch.name_layout);
    if (layout == NULL) return -1;
    bool strided = layout == state->torch.strided;
    if (!strided)
        PyErr_Format(PyExc_NotImplementedError, "%s has layout %R; allowed: torch.strided. Call .to_dense() first",
                     name, layout);
    Py_DECREF(layout);
    if (!strided) return -1;

    PyObject *requires_grad = PyObject_GetAttr(tensor, state->torch.name_requires_grad);
    if (requires_grad == NULL) return -1;
    *wants_gradient = requires_grad == Py_True;
    Py_DECREF(requires_grad);
    if (*wants_gradient) {
        int enabled = is_true(state->torch.is_grad_enabled);
        if (enabled < 0) return -1;
        *wants_gradient = enabled;
    }

    int tangent = has_tangent(state, tensor);
    if (tangent < 0) return -1;
    if (tangent) {
        PyErr_Format(PyExc_NotImplementedError,
                     "%s carries a forward-mode tangent, which flashcore %s does not propagate yet; pass %s.detach()",
                     name, fc_version(), name);
        return -1;
    }

    PyObject *is_neg = PyObject_CallMethodObjArgs(tensor, state->torch.name_is_neg, NULL);
    if (is_neg == NULL) return -1;
    bool negative = is_neg == Py_True;
    Py_DECREF(is_neg);
    if (negative) {
        PyErr_Format(PyExc_NotImplementedError,
                     "%s is a lazily negated view (the imaginary part of a conjugate, say); pass %s.resolve_neg()",
                     name, name);
        return -1;
    }
    return 0;
}

/* A torch function mode is usually set_default_device, which changes nothing for existing tensors. */
static int check_function_modes(fc_state *state)
{
    PyObject *function = fc_interop(state, "torch_function_modes_are_harmless");
    if (function == NULL) return -1;
    int harmless = is_true(function);
    Py_DECREF(function);
    return harmless;
}

int fc_torch_check_modes(fc_state *state)
{
    int active = is_true(state->torch.is_any_autocast_enabled);
    if (active < 0) return -1;
    if (active) {
        PyErr_Format(PyExc_NotImplementedError,
                     "torch.autocast is active, and flashcore %s does not cast for it yet; cast query, key and value "
                     "to one dtype and "
                     "call under torch.autocast(device_type, enabled=False)",
                     fc_version());
        return -1;
    }
    active = is_true(state->torch.function_modes);
    if (active > 0) {
        int harmless = check_function_modes(state);
        active = harmless < 0 ? -1 : !harmless;
    }
    if (active == 0) active = is_true(state->torch.dispatch_modes);
    if (active < 0) return -1;
    if (active) {
        PyErr_SetString(PyExc_NotImplementedError, "a torch function or dispatch mode is active (FakeTensorMode, a "
                                                   "profiler of operators, say) and would not see "
                                                   "this call; leave the mode around it");
        return -1;
    }
    active = state->torch.functorch_level == NULL ? 0 : is_true(state->torch.functorch_level);
    if (active < 0) return -1;
    if (active) {
        PyErr_SetString(PyExc_NotImplementedError, "a torch.func transform (vmap, grad) is active; attention takes any "
                                                   "leading batch dimensions, so call it outside");
        return -1;
    }
    active = is_true(state->torch.tracing_state);
    if (active < 0) return -1;
    if (active) {
        PyErr_SetString(PyExc_NotImplementedError,
                        "torch.jit.trace is active and would record this call's result as a constant");
        return -1;
    }
    return 0;
}

int fc_torch_num_threads(fc_state *state, int32_t *num_threads)
{
    PyObject *result = PyObject_CallNoArgs(state->torch.get_num_threads);
    if (result == NULL) return -1;
    long number = PyLong_AsLong(result);
    Py_DECREF(result);
    if (number == -1 && PyErr_Occurred()) return -1;
    *num_threads = number < 1 ? 0 : (int32_t)number;
    return 0;
}

/* The same call of flashcore.torch.attention, which PyTorch's autograd sees. torch is imported by now: it made a
 * tensor.
 */
PyObject *fc_torch_differentiable(fc_state *state, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names)
{
    if (state->torch.differentiable == NULL) {
        PyObject *module = PyImport_ImportModule("flashcore.torch");
        state->torch.differentiable = module == NULL ? NULL : PyObject_GetAttrString(module, "attention");
        Py_XDECREF(module);
        if (state->torch.differentiable == NULL) return NULL;
    }
    PyObject *result = NULL, *positional = PyTuple_New(num_args), *named = PyDict_New();
    if (positional == NULL || named == NULL) goto done;
    for (Py_ssize_t i = 0; i < num_args; i++) {
        Py_INCREF(args[i]);
        if (PyTuple_SetItem(positional, i, args[i]) != 0) goto done;
    }
    Py_ssize_t num_named = keyword_names == NULL ? 0 : PyTuple_Size(keyword_names);
    for (Py_ssize_t i = 0; i < num_named; i++)
        if (PyDict_SetItem(named, PyTuple_GetItem(keyword_names, i), args[num_args + i]) != 0) goto done;
    result = PyObject_Call(state->torch.differentiable, positional, named);
done:
    Py_XDECREF(positional);
    Py_XDECREF(named);
    return result;
}
