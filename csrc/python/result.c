/*
 * result.c - arrays out, made by the allocator of the query's own kind.
 *
 * torch and others with DLPack's C exchange API allocate through it, NumPy through its C API; the rest go through
 * flashcore/_interop.py, where a few lines of Python per library ask for an empty array.
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

static void swap(int64_t *x, int i, int j)
{
    int64_t kept = x[i];
    x[i] = x[j];
    x[j] = kept;
}

/* The API makes row-major arrays alone, so one with two dimensions changed in memory is made as its transpose. */
static PyObject *new_by_exchange(const fc_array *query, int32_t dtype, int ndim, const int64_t *shape, bool swapped,
                                 fc_array *array)
{
    const dl_exchange_api *api = query->kind.api;
    int64_t sizes[FC_MAX_NDIM], strides[FC_MAX_NDIM], step = 1;
    for (int i = 0; i < ndim; i++) sizes[i] = shape[i];
    if (swapped) swap(sizes, ndim - 3, ndim - 2);
    for (int i = ndim - 1; i >= 0; i--) {
        strides[i] = step;
        step *= sizes[i] > 0 ? sizes[i] : 1;
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
    if (swapped && managed->tensor.strides != NULL) {
        swap(managed->tensor.shape, ndim - 3, ndim - 2);
        swap(managed->tensor.strides, ndim - 3, ndim - 2);
    }
    if (fc_array_from_dl(array, &managed->tensor) != 0) {
        if (managed->deleter != NULL) managed->deleter(managed);
        return NULL;
    }
    if (api->object_from_managed(managed, &object) != 0) return NULL; /* it has taken the tensor over */
    return object;
}

/* Everybody else: flashcore._interop.empty(query, shape, dtype, device_id, stream) -> (destination, finish or None). */
static int new_by_interop(fc_state *state, const fc_array *query, int32_t dtype, int ndim, const int64_t *shape,
                          void *stream, fc_array *array, PyObject **object, PyObject **finish)
{
    int error = -1;
    PyObject *pair = NULL, *sizes = PyTuple_New(ndim), *function = fc_interop(state, "empty");
    if (sizes == NULL || function == NULL) goto done;
    for (int i = 0; i < ndim; i++) {
        PyObject *size = PyLong_FromLongLong(shape[i]);
        if (size == NULL || PyTuple_SetItem(sizes, i, size) != 0) goto done;
    }
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

int fc_result_new(fc_state *state, const fc_array *query, const char *name, int32_t dtype, int ndim,
                  const int64_t *shape, bool swapped, void *stream, fc_array *array, PyObject **object,
                  PyObject **finish)
{
    *array = (fc_array){.name = name, .kind = query->kind};
    *object = *finish = NULL;
    switch (query->kind.protocol) {
    case FC_BY_EXCHANGE:
        *object = new_by_exchange(query, dtype, ndim, shape, swapped, array);
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
