/*
 * result.c - arrays out and scratch memory, made by the allocator of the query's own kind.
 *
 * torch makes a tensor like the query where that is the shape. It and others with DLPack's C exchange API allocate
 * through that, NumPy through its C API; the rest go through flashcore/_interop.py, where a few lines of Python per
 * library ask for an empty array.
 */
#include <string.h>

#include "binding.h"

static void allocator_error(void *context, const char *kind, const char *message)
{
    (void)context;
    PyObject *exception = kind != NULL && strcmp(kind, "MemoryError") == 0 ? PyExc_MemoryError : PyExc_RuntimeError;
    PyErr_Format(exception, "the array library could not make the result: %s",
                 message != NULL ? message : "no reason given");
}

static PyObject *new_by_exchange(const fc_array *query, int32_t dtype, int ndim, const int64_t *shape, fc_array *array)
{
    const dl_exchange_api *api = query->kind.api;
    int64_t sizes[FC_MAX_NDIM], strides[FC_MAX_NDIM], step = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        sizes[i] = shape[i];
        strides[i] = step;
        step *= shape[i] > 0 ? shape[i] : 1;
    }
    dl_tensor prototype = {.ndim = ndim, .shape = sizes, .strides = strides};
    prototype.device = (dl_device){query->device_type == FC_CUDA ? DL_CUDA : DL_CPU, query->device_id};
    prototype.dtype = fc_dtype_to_dl(dtype);
    dl_managed_versioned *managed = NULL;
    if (api->allocate(&prototype, &managed, NULL, allocator_error) != 0) {
        if (!PyErr_Occurred()) allocator_error(NULL, NULL, NULL);
        return NULL;
    }
    void *object = NULL;
    if (fc_array_from_dl(array, &managed->tensor) != 0) {
        if (managed->deleter != NULL) managed->deleter(managed);
        return NULL;
    }
    if (api->object_from_managed(managed, &object) != 0) return NULL; /* it has taken the tensor over */
    return object;
}

static PyObject *tuple_of(int ndim, const int64_t *numbers)
{
    PyObject *tuple = PyTuple_New(ndim);
    for (int i = 0; i < ndim && tuple != NULL; i++) {
        PyObject *number = PyLong_FromLongLong(numbers[i]);
        if (number == NULL || PyTuple_SetItem(tuple, i, number) != 0) Py_CLEAR(tuple);
    }
    return tuple;
}

/* Everybody else: flashcore._interop.empty(query, shape, dtype, device_id, stream) -> (destination, finish or None). */
static int new_by_interop(fc_state *state, const fc_array *query, int32_t dtype, int ndim, const int64_t *shape,
                          void *stream, fc_array *array, PyObject **object, PyObject **finish)
{
    int error = -1;
    PyObject *pair = NULL, *sizes = tuple_of(ndim, shape), *function = fc_interop(state, "empty");
    if (sizes == NULL || function == NULL) goto done;
    pair = PyObject_CallFunction(function, "OOsiN", query->object, sizes, fc_dtype_word(dtype),
                                 query->device_type == FC_CUDA ? query->device_id : -1, PyLong_FromVoidPtr(stream));
    if (pair == NULL) goto done;
    PyObject *destination, *finisher;
    if (!PyArg_ParseTuple(pair, "OO", &destination, &finisher)) goto done;
    fc_kind kind;
    if (fc_kind_of(state, destination, &kind) != 0) goto done;
    if (fc_array_import(state, array->name, destination, &kind, stream, true, array) != 0) goto done;
    if (array->device_id < 0) array->device_id = query->device_id;
    Py_INCREF(destination);
    *object = destination;
    if (finisher != Py_None) {
        Py_INCREF(finisher);
        *finish = finisher;
    }
    error = 0;
done:
    Py_XDECREF(sizes);
    Py_XDECREF(function);
    Py_XDECREF(pair);
    return error;
}

/* Whether the numbers fill their span of memory, in any order of dimensions. */
static bool is_dense(const fc_array *array)
{
    bool seen[FC_MAX_NDIM] = {false};
    int64_t step = 1;
    for (int i = 0, next; i < array->ndim; i++, seen[next] = true, step *= array->shape[next]) {
        for (next = 0; next < array->ndim; next++)
            if (!seen[next] && (array->strides[next] == step || array->shape[next] == 1)) break;
        if (next == array->ndim || array->shape[next] == 0) return false;
    }
    return true;
}

/* torch's private allocator of the query's device, which is of the current one; NULL where that is another, or torch
 * has none. */
static PyObject *private_allocator(fc_state *state, const fc_array *query)
{
    if (query->device_type != FC_CUDA) return state->torch.empty_strided_cpu;
    if (state->torch.empty_strided_cuda == NULL || state->torch.current_device == NULL) return NULL;
    PyObject *device = PyObject_CallNoArgs(state->torch.current_device);
    long current = device == NULL ? -1 : PyLong_AsLong(device);
    Py_XDECREF(device);
    return current == query->device_id ? state->torch.empty_strided_cuda : NULL;
}

/* As empty_like(query) of a dense query, at half its price: how Inductor's code makes its buffers. Private functions:
 * where they are missing or refuse, for want of memory say, empty_like() has the say. Only of tensors whose strides are
 * known as they are, and whose import leaves nothing to release: those that the exchange API lends. */
static PyObject *new_by_inductor(fc_state *state, const fc_array *query, void *stream, fc_array *array)
{
    bool is_lent = query->kind.protocol == FC_BY_EXCHANGE && query->kind.api->borrow_from_object != NULL;
    if (!is_lent || query->dtype > FC_FLOAT64 || !is_dense(query)) return NULL;
    PyObject *object = NULL, *function = private_allocator(state, query);
    if (function != NULL) {
        PyObject *sizes = tuple_of(query->ndim, query->shape), *strides = tuple_of(query->ndim, query->strides);
        if (sizes != NULL && strides != NULL)
            object = PyObject_CallFunctionObjArgs(function, sizes, strides, state->torch.dtypes[query->dtype], NULL);
        Py_XDECREF(sizes);
        Py_XDECREF(strides);
    }
    fc_kind kind = query->kind;
    kind.type = (PyTypeObject *)state->torch.tensor_type;
    if (object != NULL && ((PyObject *)Py_TYPE(object) != state->torch.tensor_type ||
                           fc_array_import(state, array->name, object, &kind, stream, true, array) != 0 ||
                           array->device_type != query->device_type || array->device_id != query->device_id))
        Py_CLEAR(object);
    PyErr_Clear();
    return object;
}

/* As PyTorch's: laid out in memory as the query is, so that what a model made by transposing a projection goes back to
 * the next one without a copy; and known to its allocator, which record_stream() asks, as a tensor by DLPack is not. */
static PyObject *new_by_torch(fc_state *state, const fc_array *query, void *stream, fc_array *array)
{
    PyObject *object = new_by_inductor(state, query, stream, array);
    if (object != NULL) return object;
    object = PyObject_CallFunctionObjArgs(state->torch.empty_like, query->object, NULL);
    if (object == NULL) return NULL;
    fc_kind kind = query->kind;
    kind.type = Py_TYPE(object); /* of a Parameter, a Tensor */
    if (fc_array_import(state, array->name, object, &kind, stream, true, array) != 0) Py_CLEAR(object);
    return object;
}

static bool has_shape(const fc_array *array, int32_t dtype, int ndim, const int64_t *shape)
{
    return array->dtype == dtype && array->ndim == ndim &&
           memcmp(array->shape, shape, (size_t)ndim * sizeof *shape) == 0;
}

int fc_result_new(fc_state *state, const fc_array *query, const char *name, int32_t dtype, int ndim,
                  const int64_t *shape, void *stream, fc_array *array, PyObject **object, PyObject **finish)
{
    *array = (fc_array){.name = name, .kind = query->kind};
    *object = *finish = NULL;
    if (query->kind.is_torch && has_shape(query, dtype, ndim, shape)) {
        *object = new_by_torch(state, query, stream, array);
        return *object == NULL ? -1 : 0;
    }
    switch (query->kind.protocol) {
    case FC_BY_EXCHANGE:
        *object = new_by_exchange(query, dtype, ndim, shape, array);
        break;
    case FC_BY_NUMPY:
        *object = fc_numpy_new(state, query, dtype, ndim, shape, array);
        break;
    default:
        return new_by_interop(state, query, dtype, ndim, shape, stream, array, object, finish);
    }
    array->object = *object;
    return *object == NULL ? -1 : 0;
}

int fc_workspace_new(struct fc_call *call, uint64_t bytes, fc_workspace *workspace)
{
    const fc_attention_problem *p = &call->problem;
    *workspace = (fc_workspace){.device_type = p->device_type, .device_id = p->device_id, .stream = call->stream};
    if (bytes == 0) return 0;
    if (p->device_type == FC_CPU || !call->arrays[FC_QUERY].kind.is_torch) {
        fc_status status = fc_malloc(p->device_type, p->device_id, bytes, call->stream, &workspace->data);
        return status == FC_OK ? 0 : fc_raise_status(status);
    }
    int64_t count = (int64_t)((bytes + sizeof(float) - 1) / sizeof(float));
    PyObject *finish = NULL;
    fc_array array;
    if (fc_result_new(call->state, &call->arrays[FC_QUERY], "workspace", FC_FLOAT32, 1, &count, call->stream, &array,
                      &workspace->tensor, &finish) != 0)
        return -1;
    Py_XDECREF(finish);
    workspace->data = array.data;
    fc_array_release(&array); /* the tensor holds the memory */
    return 0;
}

void fc_workspace_free(fc_workspace *workspace)
{
    if (workspace->tensor == NULL)
        fc_free(workspace->device_type, workspace->device_id, workspace->data, workspace->stream);
    else
        Py_DECREF(workspace->tensor);
}
