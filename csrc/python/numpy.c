/*
 * numpy.c - arrays in and out through NumPy's C API, in its limited-API mode.
 *
 * NumPy is never imported by us: an ndarray can only arrive once its owner has loaded NumPy, and the API's function
 * table is fetched then. ml_dtypes' bfloat16 is a user-defined dtype whose number NumPy hands out at run time, so it is
 * known by name once and by number after.
 */
#include "binding.h"

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION    NPY_1_23_API_VERSION /* runs with NumPy 1.23 and later */
#include <numpy/arrayobject.h>

/* Loads the function table when NumPy is there; *loaded stays false when it is not. */
static int load(fc_state *state, bool *loaded)
{
    *loaded = state->numpy.memmap_type != NULL;
    if (*loaded) return 0;
    PyObject *name = PyUnicode_InternFromString("numpy");
    PyObject *numpy = name == NULL ? NULL : PyImport_GetModule(name);
    Py_XDECREF(name);
    if (numpy == NULL) return PyErr_Occurred() ? -1 : 0;
    int error = PyArray_ImportNumPyAPI();
    PyObject *memmap = error == 0 ? PyObject_GetAttrString(numpy, "memmap") : NULL;
    Py_DECREF(numpy);
    if (memmap == NULL) return -1;
    state->numpy.memmap_type = memmap;
    *loaded = true;
    return 0;
}

int fc_numpy_classify(fc_state *state, PyObject *object, bool *is_array, bool *is_exact)
{
    bool loaded;
    *is_array = *is_exact = false;
    if (load(state, &loaded) != 0) return -1;
    if (!loaded) return 0;
    *is_array = PyArray_Check(object);
    *is_exact = PyArray_CheckExact(object) || (PyObject *)Py_TYPE(object) == state->numpy.memmap_type;
    return 0;
}

/* ml_dtypes.bfloat16 is the only user dtype known here: by its scalar type's name, then by its number. */
static int is_bfloat16(fc_state *state, PyArray_Descr *descr)
{
    int number = descr->type_num;
    if (state->numpy.bfloat16 != 0 || number < NPY_USERDEF) return number == state->numpy.bfloat16 && number != 0;
    PyObject *scalar = PyObject_GetAttrString((PyObject *)descr, "type");
    PyObject *name = scalar == NULL ? NULL : PyObject_GetAttrString(scalar, "__name__");
    Py_XDECREF(scalar);
    if (name == NULL) return -1;
    bool found = PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, "bfloat16") == 0 &&
                 PyDataType_ELSIZE(descr) == 2;
    Py_DECREF(name);
    if (found) state->numpy.bfloat16 = number;
    return found;
}

static int read_seed_dtype(PyArray_Descr *descr, fc_array *array)
{
    array->dtype = PyTypeNum_ISINTEGER(descr->type_num) ? fc_dtype_of_seed((int)PyDataType_ELSIZE(descr) * 8) : FC_NONE;
    if (array->dtype != FC_NONE) return 0;
    PyErr_Format(PyExc_ValueError, "%s has dtype %S; allowed: %s", array->name, descr, fc_allowed_dtypes(array));
    return -1;
}

static int read_dtype(fc_state *state, PyArray_Descr *descr, fc_array *array)
{
    if (array->is_seed) return read_seed_dtype(descr, array);
    switch (descr->type_num) {
    case NPY_HALF:
        array->dtype = FC_FLOAT16;
        return 0;
    case NPY_FLOAT:
        array->dtype = FC_FLOAT32;
        return 0;
    case NPY_DOUBLE:
        array->dtype = FC_FLOAT64;
        return 0;
    case NPY_BOOL:
        array->dtype = FC_BOOL;
        return 0;
    }
    int found = is_bfloat16(state, descr);
    if (found < 0) return -1;
    if (found) {
        array->dtype = FC_BFLOAT16;
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "%s has dtype %S; allowed: %s", array->name, descr, fc_allowed_dtypes(array));
    return -1;
}

int fc_numpy_import(fc_state *state, PyObject *object, fc_array *array)
{
    PyArrayObject *numpy = (PyArrayObject *)object;
    if (read_dtype(state, PyArray_DESCR(numpy), array) != 0) return -1;
    if (!PyArray_ISNOTSWAPPED(numpy)) {
        PyErr_Format(PyExc_ValueError, "%s is byte-swapped (dtype %S); pass x.astype(x.dtype.newbyteorder('='))",
                     array->name, PyArray_DESCR(numpy));
        return -1;
    }
    array->ndim = PyArray_NDIM(numpy);
    if (array->ndim > FC_MAX_NDIM) {
        PyErr_Format(PyExc_ValueError, "%s has %d dimensions; allowed: up to %d", array->name, array->ndim,
                     FC_MAX_NDIM);
        return -1;
    }
    int64_t bytes = fc_dtype_size(array->dtype);
    for (int i = 0; i < array->ndim; i++) {
        array->shape[i] = PyArray_DIM(numpy, i);
        array->strides[i] = PyArray_STRIDE(numpy, i) / bytes;
        bool whole = PyArray_STRIDE(numpy, i) % bytes == 0;
        if ((!whole && array->shape[i] > 1) || !PyArray_ISALIGNED(numpy)) {
            PyErr_Format(PyExc_ValueError,
                         "%s is not aligned to its %lld-byte elements; pass numpy.ascontiguousarray(x)", array->name,
                         (long long)bytes);
            return -1;
        }
    }
    array->data = PyArray_DATA(numpy);
    array->read_only = !PyArray_ISWRITEABLE(numpy);
    array->device_type = FC_CPU;
    return 0;
}

/* A new C-order array; a dtype that is the query's takes its descriptor, so that bfloat16 needs no lookup. */
PyObject *fc_numpy_new(fc_state *state, const fc_array *like, int32_t dtype, int ndim, const int64_t *shape,
                       fc_array *array)
{
    PyArray_Descr *descr;
    if (dtype == like->dtype) {
        descr = PyArray_DESCR((PyArrayObject *)like->object);
        Py_INCREF((PyObject *)descr);
    } else {
        descr = PyArray_DescrFromType(dtype == FC_FLOAT64 ? NPY_DOUBLE : NPY_FLOAT);
    }
    npy_intp sizes[FC_MAX_NDIM];
    for (int i = 0; i < ndim; i++) sizes[i] = (npy_intp)shape[i];
    PyObject *object = PyArray_NewFromDescr(&PyArray_Type, descr, ndim, sizes, NULL, NULL, 0, NULL);
    if (object == NULL || fc_numpy_import(state, object, array) == 0) return object;
    Py_DECREF(object);
    return NULL;
}
