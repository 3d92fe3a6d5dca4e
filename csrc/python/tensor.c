/*
 * tensor.c - arrays in: which protocol an object speaks, and its import through DLPack or the CUDA array
 * interface.
 *
 * Order: torch and others by DLPack's C exchange API on the type (a struct read, no Python call), NumPy by its C API,
 * then __dlpack__, then __cuda_array_interface__. Nothing that a producer says is trusted: counts, shapes, strides,
 * names and versions are checked before they are used, and every refusal names the argument.
 */
#include <stdio.h>
#include <string.h>

#include "binding.h"

/* ---- which protocol ---- */

/* The C exchange API of a type, if it has a usable one. Early versions spelled it differently; only the final name is
 * read. */
static int find_exchange_api(PyTypeObject *type, dl_exchange_api **api)
{
    *api = NULL;
    PyObject *capsule = PyObject_GetAttrString((PyObject *)type, "__dlpack_c_exchange_api__");
    if (capsule == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
        PyErr_Clear();
        return 0;
    }
    if (PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
        dl_exchange_api *found = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
        /* A newer API may keep this one in its chain of older ones. */
        while (found != NULL && found->version.major != DL_MAJOR) found = found->previous;
        if (found != NULL && found->allocate != NULL && found->managed_from_object != NULL &&
            found->object_from_managed != NULL && found->current_stream != NULL)
            *api = found;
    }
    Py_DECREF(capsule);
    return 0;
}

/* Says whether the object is a torch.Tensor, without importing torch: a tensor exists only if torch is loaded. */
static int is_torch_tensor(fc_state *state, PyObject *object, bool *is_torch)
{
    *is_torch = false;
    if (state->torch.tensor_type == NULL) {
        PyObject *name = PyUnicode_FromString("torch");
        PyObject *torch = name == NULL ? NULL : PyImport_GetModule(name);
        Py_XDECREF(name);
        if (torch == NULL) return PyErr_Occurred() ? -1 : 0;
        bool ready = PyObject_HasAttrString(torch, "Tensor") && PyObject_HasAttrString(torch, "nn");
        int error = ready ? fc_torch_load(state, torch) : 0;
        Py_DECREF(torch);
        if (error != 0 || !ready) return error;
    }
    int instance = PyType_IsSubtype(Py_TYPE(object), (PyTypeObject *)state->torch.tensor_type);
    *is_torch = instance != 0;
    return 0;
}

static void remember_kind(fc_state *state, const fc_kind *kind)
{
    fc_kind *slot = &state->kinds[state->next_kind];
    state->next_kind = (state->next_kind + 1) % FC_KIND_CACHE;
    PyTypeObject *old = slot->type;
    *slot = *kind;
    Py_INCREF((PyObject *)slot->type);
    Py_XDECREF((PyObject *)old);
}

int fc_kind_of(fc_state *state, PyObject *object, fc_kind *kind)
{
    PyTypeObject *type = Py_TYPE(object);
    for (int i = 0; i < FC_KIND_CACHE; i++)
        if (state->kinds[i].type == type) {
            *kind = state->kinds[i];
            return 0;
        }

    *kind = (fc_kind){.type = type};
    if (is_torch_tensor(state, object, &kind->is_torch) != 0) return -1;
    kind->is_subclass = kind->is_torch && (PyObject *)type != state->torch.tensor_type &&
                        (PyObject *)type != state->torch.parameter_type;
    if (find_exchange_api(type, &kind->api) != 0) return -1;
    if (kind->api != NULL) {
        kind->protocol = FC_BY_EXCHANGE;
        remember_kind(state, kind);
        return 0;
    }
    if (kind->is_torch) { /* torch before 2.10 */
        kind->protocol = FC_BY_DLPACK;
        remember_kind(state, kind);
        return 0;
    }
    bool is_numpy, is_exact;
    if (fc_numpy_classify(state, object, &is_numpy, &is_exact) != 0) return -1;
    if (is_numpy) {
        if (!is_exact) {
            PyObject *name = PyType_GetQualName(type);
            PyErr_Format(PyExc_TypeError,
                         "a numpy.ndarray subclass, %U, may redefine what its data means (a mask, a unit); pass "
                         "numpy.asarray(x) or x.data",
                         name);
            Py_XDECREF(name);
            return -1;
        }
        kind->protocol = FC_BY_NUMPY;
        remember_kind(state, kind);
        return 0;
    }
    /* Attributes of an instance, which may come and go: looked up each time, not cached. */
    if (PyObject_HasAttrString(object, "__dlpack__"))
        kind->protocol = FC_BY_DLPACK;
    else if (PyObject_HasAttrString(object, "__cuda_array_interface__"))
        kind->protocol = FC_BY_CAI;
    return 0;
}

/* ---- DLPack ---- */

static int describe_dtype(fc_array *array, dl_dtype dtype)
{
    bool is_integer = (dtype.code == DL_INT || dtype.code == DL_UINT) && dtype.lanes == 1;
    array->dtype = !array->is_seed ? fc_dtype_from_dl(dtype) : is_integer ? fc_dtype_of_seed(dtype.bits) : FC_NONE;
    if (array->dtype != FC_NONE) return 0;
    static const char *const words[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
    char given[64];
    if (dtype.code < sizeof words / sizeof words[0] && dtype.lanes == 1)
        snprintf(given, sizeof given, "%s%d", words[dtype.code], dtype.bits);
    else
        snprintf(given, sizeof given, "of DLPack code %d, %d bits, %d lanes", dtype.code, dtype.bits, dtype.lanes);
    PyErr_Format(PyExc_ValueError, "%s has dtype %s; allowed: %s", array->name, given, fc_allowed_dtypes(array));
    return -1;
}

static int describe_device(fc_array *array, int32_t type, int32_t id)
{
    switch (type) {
    case DL_CPU:
    case DL_CUDA_HOST:
        array->device_type = FC_CPU;
        array->device_id = 0;
        return 0;
    case DL_CUDA:
    case DL_CUDA_MANAGED:
        array->device_type = FC_CUDA;
        array->device_id = id;
        if (id >= 0) return 0;
        break;
    }
    PyErr_Format(PyExc_ValueError, "%s is on a device of DLPack type %d, id %d; allowed: CPU and CUDA arrays",
                 array->name, type, id);
    return -1;
}

/* Row-major strides, for producers that leave them out. */
static int fill_compact_strides(fc_array *array)
{
    int64_t step = 1;
    for (int i = array->ndim - 1; i >= 0; i--) {
        array->strides[i] = step;
        if (array->shape[i] > 1 && __builtin_mul_overflow(step, array->shape[i], &step)) {
            PyErr_Format(PyExc_ValueError, "%s has a shape of more than 2^63 elements", array->name);
            return -1;
        }
    }
    return 0;
}

static int check_ndim(const fc_array *array, int64_t ndim)
{
    if (ndim >= 0 && ndim <= FC_MAX_NDIM) return 0;
    PyErr_Format(PyExc_ValueError, "%s has %lld dimensions; allowed: up to %d", array->name, (long long)ndim,
                 FC_MAX_NDIM);
    return -1;
}

static int check_dimension(const fc_array *array, int at)
{
    if (array->shape[at] >= 0) return 0;
    PyErr_Format(PyExc_ValueError, "%s has size %lld in dimension %d; sizes cannot be negative", array->name,
                 (long long)array->shape[at], at);
    return -1;
}

int fc_array_from_dl(fc_array *array, const dl_tensor *tensor)
{
    if (describe_device(array, tensor->device.type, tensor->device.id) != 0) return -1;
    if (describe_dtype(array, tensor->dtype) != 0) return -1;
    if (check_ndim(array, tensor->ndim) != 0) return -1;
    array->ndim = tensor->ndim;
    if (tensor->ndim > 0 && tensor->shape == NULL) {
        PyErr_Format(PyExc_ValueError, "%s has %d dimensions, but its DLPack shape is NULL", array->name, tensor->ndim);
        return -1;
    }
    for (int i = 0; i < array->ndim; i++) {
        array->shape[i] = tensor->shape[i];
        if (check_dimension(array, i) != 0) return -1;
        if (tensor->strides != NULL) array->strides[i] = tensor->strides[i];
    }
    if (tensor->strides == NULL && fill_compact_strides(array) != 0) return -1;
    if (tensor->data == NULL && tensor->byte_offset != 0) {
        PyErr_Format(PyExc_ValueError, "%s has a NULL data pointer with a byte offset", array->name);
        return -1;
    }
    array->data = (void *)((uintptr_t)tensor->data + (uintptr_t)tensor->byte_offset);
    return 0;
}

static int import_exchange(fc_array *array)
{
    const dl_exchange_api *api = array->kind.api;
    dl_tensor borrowed;
    const dl_tensor *tensor = &borrowed;
    if (api->borrow_from_object != NULL) {
        memset(&borrowed, 0, sizeof borrowed);
        if (api->borrow_from_object(array->object, &borrowed) != 0) return -1;
    } else {
        if (api->managed_from_object(array->object, &array->managed_versioned) != 0) return -1;
        array->read_only = (array->managed_versioned->flags & DL_FLAG_READ_ONLY) != 0;
        tensor = &array->managed_versioned->tensor;
    }
    if (fc_array_from_dl(array, tensor) != 0) return -1;
    if (array->device_type == FC_CUDA) {
        if (api->current_stream(DL_CUDA, array->device_id, &array->stream) != 0) return -1;
        array->has_stream = true;
    }
    return 0;
}

/* DLPack's numbers for streams: 1 and 2 are CUDA's two default streams, and 0 is forbidden as ambiguous. */
static PyObject *stream_number(void *stream)
{
    return stream == NULL ? PyLong_FromLong(1) : PyLong_FromVoidPtr(stream);
}

/* obj.__dlpack__(stream=..., max_version=(1, 3)), without max_version for producers that do not know it. */
static PyObject *call_dlpack(PyObject *object, bool on_gpu, void *stream)
{
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    PyObject *none = PyTuple_New(0);
    PyObject *keywords = PyDict_New();
    PyObject *capsule = NULL;
    if (method == NULL || none == NULL || keywords == NULL) goto done;
    if (on_gpu) {
        PyObject *number = stream_number(stream);
        int error = number == NULL ? -1 : PyDict_SetItemString(keywords, "stream", number);
        Py_XDECREF(number);
        if (error != 0) goto done;
    }
    PyObject *version = Py_BuildValue("(ii)", DL_MAJOR, DL_MINOR);
    int error = version == NULL ? -1 : PyDict_SetItemString(keywords, "max_version", version);
    Py_XDECREF(version);
    if (error != 0) goto done;
    capsule = PyObject_Call(method, none, keywords);
    if (capsule == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear();
        if (PyDict_DelItemString(keywords, "max_version") == 0) capsule = PyObject_Call(method, none, keywords);
    }
done:
    Py_XDECREF(method);
    Py_XDECREF(none);
    Py_XDECREF(keywords);
    return capsule;
}

/* Takes the tensor out of a capsule, as the protocol asks: renamed, so that nobody takes it twice. */
static int take_capsule(fc_array *array, PyObject *capsule)
{
    const char *const refusal = "%s: its __dlpack__ returned no fresh 'dltensor' or 'dltensor_versioned' capsule";
    if (!PyCapsule_CheckExact(capsule)) {
        PyErr_Format(PyExc_TypeError, refusal, array->name);
        return -1;
    }
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        dl_managed_versioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        if (PyCapsule_SetName(capsule, "used_dltensor_versioned") != 0) return -1;
        PyCapsule_SetDestructor(capsule, NULL);
        array->managed_versioned = managed;
        if (managed->version.major != DL_MAJOR) {
            PyErr_Format(PyExc_BufferError, "%s: its __dlpack__ gave DLPack version %u.%u; understood: %d.x",
                         array->name, managed->version.major, managed->version.minor, DL_MAJOR);
            return -1;
        }
        array->read_only = (managed->flags & DL_FLAG_READ_ONLY) != 0;
        return fc_array_from_dl(array, &managed->tensor);
    }
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        dl_managed *managed = PyCapsule_GetPointer(capsule, "dltensor");
        if (PyCapsule_SetName(capsule, "used_dltensor") != 0) return -1;
        PyCapsule_SetDestructor(capsule, NULL);
        array->managed = managed;
        return fc_array_from_dl(array, &managed->tensor);
    }
    PyErr_Format(PyExc_TypeError, refusal, array->name);
    return -1;
}

static int import_dlpack(fc_array *array, void *stream, bool has_stream)
{
    PyObject *device = PyObject_CallMethod(array->object, "__dlpack_device__", NULL);
    if (device == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
        PyErr_Clear();
        PyObject *name = PyType_GetQualName(Py_TYPE(array->object));
        PyErr_Format(PyExc_TypeError,
                     "%s is of type %U, which names no device by __dlpack_device__; allowed: arrays that hold data "
                     "(inside jax.jit, "
                     "jax.vmap and jax.grad there is none: call outside)",
                     array->name, name);
        Py_XDECREF(name);
        return -1;
    }
    int type, id;
    int parsed = PyTuple_Check(device) && PyArg_ParseTuple(device, "ii", &type, &id);
    Py_DECREF(device);
    if (!parsed) {
        if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_TypeError) &&
            !PyErr_ExceptionMatches(PyExc_OverflowError))
            return -1;
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s: its __dlpack_device__ returned no (type, id) pair of ints", array->name);
        return -1;
    }
    if (describe_device(array, type, id) != 0) return -1;
    int32_t said_type = array->device_type, said_id = array->device_id;
    bool on_gpu = said_type == FC_CUDA;
    PyObject *capsule = call_dlpack(array->object, on_gpu, has_stream ? stream : NULL);
    if (capsule == NULL) return -1;
    int error = take_capsule(array, capsule);
    Py_DECREF(capsule);
    if (error != 0) return -1;
    if (array->device_type != said_type || array->device_id != said_id) {
        PyErr_Format(PyExc_ValueError, "%s: its __dlpack__ and __dlpack_device__ name different devices", array->name);
        return -1;
    }
    return 0;
}

/* ---- the CUDA array interface, version 2 and 3 ---- */

static int cai_refuse(const fc_array *array, const char *what)
{
    if (PyErr_Occurred() && !PyErr_ExceptionMatches(PyExc_TypeError) && !PyErr_ExceptionMatches(PyExc_OverflowError) &&
        !PyErr_ExceptionMatches(PyExc_KeyError))
        return -1;
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "%s: its __cuda_array_interface__ %s", array->name, what);
    return -1;
}

/* Reads a tuple of ints into out; the tuple's length, or -1. */
static int cai_ints(const fc_array *array, PyObject *tuple, const char *what, int64_t *out)
{
    if (!PyTuple_Check(tuple)) return cai_refuse(array, what);
    Py_ssize_t length = PyTuple_Size(tuple);
    if (check_ndim(array, length) != 0) return -1;
    for (Py_ssize_t i = 0; i < length; i++) {
        PyObject *item = PyTuple_GetItem(tuple, i);
        if (!PyLong_Check(item)) return cai_refuse(array, what);
        out[i] = PyLong_AsLongLong(item);
        if (out[i] == -1 && PyErr_Occurred()) return cai_refuse(array, what);
    }
    return (int)length;
}

static int cai_dtype(fc_array *array, PyObject *typestr)
{
    static const struct {
        const char *typestr;
        int32_t dtype;
        bool is_seed;
    } known[] = {
        {"<f2", FC_FLOAT16, false}, {"<f4", FC_FLOAT32, false}, {"<f8", FC_FLOAT64, false}, {"|b1", FC_BOOL, false},
        {"<i8", FC_FLOAT64, true},  {"<u8", FC_FLOAT64, true},  {"<i4", FC_FLOAT32, true},  {"<u4", FC_FLOAT32, true},
    };
    if (typestr == NULL || !PyUnicode_Check(typestr)) return cai_refuse(array, "has no string 'typestr'");
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (known[i].is_seed == array->is_seed && PyUnicode_CompareWithASCIIString(typestr, known[i].typestr) == 0) {
            array->dtype = known[i].dtype;
            return 0;
        }
    PyErr_Format(PyExc_ValueError, "%s has typestr %R in its __cuda_array_interface__; allowed: %s", array->name,
                 typestr,
                 array->is_seed ? fc_allowed_dtypes(array)
                                : "'<f2', '<f4', '<f8', and '|b1' for masks (the interface has no bfloat16: use an "
                                  "array with __dlpack__)");
    return -1;
}

static int cai_data(fc_array *array, PyObject *data)
{
    if (data == NULL || !PyTuple_Check(data) || PyTuple_Size(data) != 2 || !PyLong_Check(PyTuple_GetItem(data, 0)))
        return cai_refuse(array, "has no 'data' pair of (pointer, read_only)");
    array->data = PyLong_AsVoidPtr(PyTuple_GetItem(data, 0));
    if (array->data == NULL && PyErr_Occurred()) return cai_refuse(array, "has a 'data' pointer that is no address");
    int read_only = PyObject_IsTrue(PyTuple_GetItem(data, 1));
    if (read_only < 0) return -1;
    array->read_only = read_only;
    return 0;
}

static int cai_stream(fc_array *array, PyObject *stream)
{
    if (stream == NULL || stream == Py_None) return 0; /* the producer asks for no ordering */
    if (!PyLong_Check(stream)) return cai_refuse(array, "has a 'stream' that is neither None nor an int");
    void *handle = PyLong_AsVoidPtr(stream);
    if (handle == NULL)
        return cai_refuse(array,
                          "has stream 0, which the interface forbids as ambiguous; 1 is the legacy default stream");
    array->stream = handle;
    array->has_stream = true;
    return 0;
}

static int cai_read(fc_array *array, PyObject *dict)
{
    PyObject *shape = PyDict_GetItemString(dict, "shape");
    PyObject *strides = PyDict_GetItemString(dict, "strides");
    PyObject *mask = PyDict_GetItemString(dict, "mask");
    if (mask != NULL && mask != Py_None)
        return cai_refuse(array, "has a mask; masked arrays are not understood, pass attn_mask");
    if (cai_dtype(array, PyDict_GetItemString(dict, "typestr")) != 0) return -1;
    if (cai_data(array, PyDict_GetItemString(dict, "data")) != 0) return -1;
    if (cai_stream(array, PyDict_GetItemString(dict, "stream")) != 0) return -1;
    if (shape == NULL) return cai_refuse(array, "has no 'shape'");
    array->ndim = cai_ints(array, shape, "has a 'shape' that is no tuple of ints", array->shape);
    if (array->ndim < 0) return -1;
    for (int i = 0; i < array->ndim; i++)
        if (check_dimension(array, i) != 0) return -1;
    if (strides == NULL || strides == Py_None) return fill_compact_strides(array);
    int count = cai_ints(array, strides, "has 'strides' that are no tuple of ints", array->strides);
    if (count < 0) return -1;
    if (count != array->ndim) return cai_refuse(array, "has a different number of 'strides' than of sizes in 'shape'");
    int64_t bytes = fc_dtype_size(array->dtype);
    for (int i = 0; i < array->ndim; i++) {
        if (array->strides[i] % bytes != 0)
            return cai_refuse(array, "has 'strides' that are no multiple of its element size");
        array->strides[i] /= bytes;
    }
    return 0;
}

static int import_cai(fc_array *array)
{
    PyObject *dict = PyObject_GetAttrString(array->object, "__cuda_array_interface__");
    if (dict == NULL) return -1;
    int error = PyDict_Check(dict) ? cai_read(array, dict) : cai_refuse(array, "is no dict");
    Py_DECREF(dict);
    if (error != 0) return -1;
    array->device_type = FC_CUDA;
    array->device_id = -1; /* the interface does not say; call.c takes the others' or asks for the pointer's */
    return 0;
}

/* CuPy 14 loses the sign of negative strides on their way to DLPack, and gets it right in the CUDA array interface. A
 * stride beyond any address space tells. */
static bool has_impossible_stride(const fc_array *array)
{
    for (int i = 0; i < array->ndim; i++)
        if (array->shape[i] > 1 && (array->strides[i] > INT64_MAX / 16 || array->strides[i] < INT64_MIN / 16))
            return true;
    return false;
}

static int import_dlpack_or_cai(fc_array *array, void *stream, bool has_stream)
{
    if (import_dlpack(array, stream, has_stream) != 0) return -1;
    if (array->device_type != FC_CUDA || !has_impossible_stride(array)) return 0;
    if (!PyObject_HasAttrString(array->object, "__cuda_array_interface__"))
        return 0; /* the library refuses the stride */
    fc_array_release(array);
    return import_cai(array);
}

/* ---- the importer ---- */

static int import_any(fc_state *state, const char *name, PyObject *object, const fc_kind *kind, void *stream,
                      bool has_stream, bool is_seed, fc_array *array)
{
    memset(array, 0, sizeof *array);
    array->is_seed = is_seed;
    array->object = object;
    array->name = name;
    array->kind = *kind;
    int error = -1;
    switch (kind->protocol) {
    case FC_BY_EXCHANGE:
        error = import_exchange(array);
        break;
    case FC_BY_NUMPY:
        error = fc_numpy_import(state, object, array);
        break;
    case FC_BY_DLPACK:
        error = import_dlpack_or_cai(array, stream, has_stream);
        break;
    case FC_BY_CAI:
        error = import_cai(array);
        break;
    case FC_BY_NOTHING: {
        PyObject *type = PyType_GetQualName(Py_TYPE(object));
        PyErr_Format(PyExc_TypeError,
                     "%s is of type %U, which is no array; allowed: torch, NumPy, CuPy and JAX arrays, and others with "
                     "__dlpack__ or "
                     "__cuda_array_interface__",
                     name, type);
        Py_XDECREF(type);
        break;
    }
    }
    if (error != 0) fc_array_release(array);
    return error;
}

int fc_array_import(fc_state *state, const char *name, PyObject *object, const fc_kind *kind, void *stream,
                    bool has_stream, fc_array *array)
{
    return import_any(state, name, object, kind, stream, has_stream, false, array);
}

/* The library takes an address, so all 16 bytes must lie there in a row. */
int fc_array_import_seed(fc_state *state, const char *name, PyObject *object, const fc_kind *kind, void *stream,
                         bool has_stream, fc_array *array)
{
    if (import_any(state, name, object, kind, stream, has_stream, true, array) != 0) return -1;
    if (array->ndim == 1 && array->shape[0] * fc_dtype_size(array->dtype) == 16 && array->strides[0] == 1) return 0;
    char given[200];
    fc_format_shape(given, sizeof given, array->ndim, array->shape);
    PyErr_Format(PyExc_ValueError, "%s has shape %s, of %d-byte integers; allowed: %s, contiguous", name, given,
                 (int)fc_dtype_size(array->dtype), fc_allowed_dtypes(array));
    fc_array_release(array);
    return -1;
}

/* A deleter may run Python code; an exception that is on its way survives it. */
void fc_array_release(fc_array *array)
{
    dl_managed *managed = array->managed;
    dl_managed_versioned *versioned = array->managed_versioned;
    array->managed = NULL;
    array->managed_versioned = NULL;
    if (managed == NULL && versioned == NULL) return;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (managed != NULL && managed->deleter != NULL) managed->deleter(managed);
    if (versioned != NULL && versioned->deleter != NULL) versioned->deleter(versioned);
    PyErr_Restore(type, value, traceback);
}
