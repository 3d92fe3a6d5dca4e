/*
 * torch.c - what a torch.Tensor may ask that the C function cannot serve.
 *
 * DLPack's C exchange API hands over pointers and nothing else: it would drop gradients, ignore a sign bit, and pass by
 * autocast, tracing, modes and functorch. So each tensor and the mode stacks are looked at first, through torch's
 * own C functions (about 1 us for a call). What is not a plain eager call on plain tensors takes a way that torch
 * sees (autograd.c), or is refused in words.
 */
#include <string.h>

#include "binding.h"

/* module.name, or of a path "a.b.c" the last one. */
static PyObject *attribute_path(PyObject *module, const char *path)
{
    PyObject *at = module;
    Py_INCREF(at);
    while (path != NULL && at != NULL) {
        const char *dot = strchr(path, '.');
        PyObject *name = PyUnicode_FromStringAndSize(path, dot != NULL ? dot - path : (Py_ssize_t)strlen(path));
        PyObject *next = name == NULL ? NULL : PyObject_GetAttr(at, name);
        Py_XDECREF(name);
        Py_DECREF(at);
        at = next;
        path = dot != NULL ? dot + 1 : NULL;
    }
    return at;
}

int fc_torch_load(fc_state *state, PyObject *torch)
{
    const struct {
        PyObject **into;
        const char *path;
        bool optional; /* not in every torch since 2.4 */
    } wanted[] = {
        {&state->torch.parameter_type, "nn.Parameter", false},
        {&state->torch.strided, "strided", false},
        {&state->torch.is_grad_enabled, "is_grad_enabled", false},
        {&state->torch.is_any_autocast_enabled, "_C._is_any_autocast_enabled", true},
        {&state->torch.function_modes, "_C._len_torch_function_stack", false},
        {&state->torch.dispatch_modes, "_C._len_torch_dispatch_stack", false},
        {&state->torch.functorch_level, "_C._functorch.maybe_current_level", true},
        {&state->torch.is_legacy_batched, "_C._functorch.is_legacy_batchedtensor", true},
        {&state->torch.is_tracing, "_C._is_tracing", false},
        {&state->torch.forward_ad, "autograd.forward_ad", true},
        {&state->torch.increment_version, "autograd.graph.increment_version", true},
        {&state->torch.get_num_threads, "get_num_threads", false},
        {&state->torch.empty_like, "empty_like", false},
        {&state->torch.empty_strided_cpu, "_C._dynamo.guards._empty_strided_cpu", true},
        {&state->torch.empty_strided_cuda, "_C._dynamo.guards._empty_strided_cuda", true},
        {&state->torch.current_device, "_C._cuda_getDevice", true}, /* of a torch with CUDA */
        {&state->torch.dtypes[FC_FLOAT16], "float16", false},
        {&state->torch.dtypes[FC_BFLOAT16], "bfloat16", false},
        {&state->torch.dtypes[FC_FLOAT32], "float32", false},
        {&state->torch.dtypes[FC_FLOAT64], "float64", false},
        {&state->torch.is_autocast_enabled, "is_autocast_enabled", false},
        {&state->torch.get_autocast_dtype, "get_autocast_dtype", true},
        {&state->torch.tensor_type, "Tensor", false}, /* last: it says that all is loaded */
    };
    state->torch.name_requires_grad = PyUnicode_InternFromString("requires_grad");
    state->torch.name_is_neg = PyUnicode_InternFromString("is_neg");
    state->torch.name_layout = PyUnicode_InternFromString("layout");
    state->torch.name_current_level = PyUnicode_InternFromString("_current_level");
    state->torch.name_dtype = PyUnicode_InternFromString("dtype");
    state->torch.name_saved_tensors = PyUnicode_InternFromString("saved_tensors");
    state->torch.name_needs_input_grad = PyUnicode_InternFromString("needs_input_grad");
    state->torch.name_options = PyUnicode_InternFromString("options");
    for (size_t i = 0; i < sizeof wanted / sizeof wanted[0]; i++) {
        if (*wanted[i].into != NULL) continue;
        PyObject *found = attribute_path(torch, wanted[i].path);
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
static bool has_tangents(fc_state *state)
{
    if (state->torch.forward_ad == NULL) return false;
    PyObject *level = PyObject_GetAttr(state->torch.forward_ad, state->torch.name_current_level);
    long number = level == NULL ? -1 : PyLong_AsLong(level);
    Py_XDECREF(level);
    PyErr_Clear(); /* a private name; without it there is nothing to ask */
    return number >= 0;
}

static int refuse_tangent(fc_state *state, const char *name, PyObject *tensor)
{
    PyObject *function = fc_interop(state, "torch_has_tangent");
    PyObject *answer = function == NULL ? NULL : PyObject_CallFunctionObjArgs(function, tensor, NULL);
    Py_XDECREF(function);
    if (answer == NULL) return -1;
    int truth = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    if (truth > 0)
        PyErr_Format(PyExc_NotImplementedError,
                     "%s carries a forward-mode tangent, which flashcore %s does not propagate yet; pass %s.detach()",
                     name, fc_version(), name);
    return truth == 0 ? 0 : -1;
}

static int check_layout(fc_state *state, const char *name, PyObject *tensor)
{
    PyObject *layout = PyObject_GetAttr(tensor, state->torch.name_layout);
    if (layout == NULL) return -1;
    bool strided = layout == state->torch.strided;
    if (!strided)
        PyErr_Format(PyExc_NotImplementedError,
                     "%s has layout %R; allowed: torch.strided. Call .to_dense(), or pad a nested tensor, first", name,
                     layout);
    Py_DECREF(layout);
    return strided ? 0 : -1;
}

/* Of a plain call's tensor the layout is not asked: another than strided has no strides, so its import fails, and then
 * fc_torch_import_failed looks. */
int fc_torch_check_tensor(fc_state *state, const char *name, PyObject *tensor, const fc_kind *kind,
                          bool *wants_gradient, fc_torch_modes *modes)
{
    modes->dispatch |= kind->is_subclass;
    if (modes->dispatch && check_layout(state, name, tensor) != 0) return -1;
    if (kind->is_subclass) return 0;

    PyObject *requires_grad = PyObject_GetAttr(tensor, state->torch.name_requires_grad);
    if (requires_grad == NULL) return -1;
    *wants_gradient = requires_grad == Py_True;
    Py_DECREF(requires_grad);
    if (*wants_gradient) {
        int enabled = is_true(state->torch.is_grad_enabled);
        if (enabled < 0) return -1;
        *wants_gradient = enabled;
    }
    if (modes->tangents && refuse_tangent(state, name, tensor) != 0) return -1;

    PyObject *is_neg = PyObject_CallMethodObjArgs(tensor, state->torch.name_is_neg, NULL);
    if (is_neg == NULL) return -1;
    if (is_neg == Py_True) modes->dispatch = true; /* -x, by a bit that DLPack does not carry */
    Py_DECREF(is_neg);
    return 0;
}

/* A torch function mode is usually set_default_device, which changes nothing for existing tensors. */
static int has_function_mode(fc_state *state)
{
    int active = is_true(state->torch.function_modes);
    if (active <= 0) return active;
    PyObject *function = fc_interop(state, "torch_function_modes_are_harmless");
    if (function == NULL) return -1;
    int harmless = is_true(function);
    Py_DECREF(function);
    return harmless < 0 ? -1 : !harmless;
}

int fc_torch_check_modes(fc_state *state, fc_torch_modes *modes)
{
    int active = is_true(state->torch.is_any_autocast_enabled);
    if (active < 0) return -1;
    modes->autocast = active;
    modes->tangents = has_tangents(state);
    active = has_function_mode(state);
    if (active == 0) active = is_true(state->torch.dispatch_modes);
    if (active == 0) active = is_true(state->torch.functorch_level);
    if (active == 0) active = is_true(state->torch.is_tracing);
    if (active < 0) return -1;
    modes->dispatch = active;
    return 0;
}

int fc_torch_is_legacy_batched(fc_state *state, PyObject *tensor)
{
    if (state->torch.is_legacy_batched == NULL || tensor == Py_None) return 0;
    PyObject *answer = PyObject_CallFunctionObjArgs(state->torch.is_legacy_batched, tensor, NULL);
    if (answer == NULL) return -1;
    bool batched = answer == Py_True;
    Py_DECREF(answer);
    return batched;
}

int fc_torch_is_plain(fc_state *state, PyObject *const *tensors, int count)
{
    fc_torch_modes modes = {0};
    if (fc_torch_check_modes(state, &modes) != 0) return -1;
    for (int i = 0; i < count && !modes.dispatch; i++) {
        fc_kind kind;
        bool wants_gradient;
        if (tensors[i] == Py_None) continue;
        if (fc_kind_of(state, tensors[i], &kind) != 0 || check_layout(state, "a gradient", tensors[i]) != 0) return -1;
        if (fc_torch_check_tensor(state, "a gradient", tensors[i], &kind, &wants_gradient, &modes) != 0) return -1;
    }
    return !modes.dispatch;
}

int fc_torch_count_write(fc_state *state, PyObject *tensor)
{
    if (state->torch.increment_version == NULL) return 0;
    PyObject *none = PyObject_CallFunctionObjArgs(state->torch.increment_version, tensor, NULL);
    Py_XDECREF(none);
    return none == NULL ? -1 : 0;
}

int fc_torch_grad_enabled(fc_state *state)
{
    return is_true(state->torch.is_grad_enabled);
}

static bool is_truly(PyObject *tensor, const char *attribute)
{
    PyObject *value = PyObject_GetAttrString(tensor, attribute);
    bool is_true = value == Py_True;
    PyErr_Clear();
    Py_XDECREF(value);
    return is_true;
}

/* A tensor on the meta device has no data, and the dispatcher knows its way. A nested tensor of the older kind calls
 * itself strided, and says no more than that it has no sizes. */
int fc_torch_import_failed(fc_state *state, const char *name, PyObject *tensor, fc_torch_modes *modes)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    int error = 0;
    if (is_truly(tensor, "is_meta")) {
        modes->dispatch = true;
    } else if (is_truly(tensor, "is_nested")) {
        PyErr_Format(PyExc_NotImplementedError,
                     "%s is a nested tensor; pad it, with nested.to_padded_tensor(0.0), and mask the rest", name);
        error = -1;
    } else if ((error = check_layout(state, name, tensor)) == 0) {
        PyErr_Restore(type, value, traceback);
        return -1;
    }
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return error;
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

PyObject *fc_torch_integration(fc_state *state, const char *function)
{
    if (state->torch.integration == NULL) { /* torch is imported by now: it made a tensor */
        state->torch.integration = PyImport_ImportModule("flashcore.torch._call");
        if (state->torch.integration == NULL) return NULL;
    }
    return PyObject_GetAttrString(state->torch.integration, function);
}
