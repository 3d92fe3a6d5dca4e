/*
 * buffer.c - flashcore._C.Buffer: memory of our own that speaks DLPack, for results of kinds that cannot be
 * written (JAX). The extension writes it, then the kind's from_dlpack adopts it.
 *
 * The memory belongs to a counted block, not to the Python object: a consumer may let go of it on a thread that does
 * not hold the GIL.
 */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "binding.h"

typedef struct block {
    atomic_int references;
    void *data, *stream;
    int32_t dtype, device_type, device_id;
    int ndim;
    int64_t shape[FC_MAX_NDIM], strides[FC_MAX_NDIM];
} block;

typedef struct fc_buffer {
    PyObject_HEAD block *block;
} fc_buffer;

static void block_release(block *b)
{
    if (atomic_fetch_sub(&b->references, 1) != 1) return;
    fc_free(b->device_type, b->device_id, b->data, b->stream);
    free(b);
}

/* One export: the struct that the consumer gets, in both of DLPack's forms. */
static void delete_managed(dl_managed *managed)
{
    block_release(managed->manager);
    free(managed);
}

static void delete_versioned(dl_managed_versioned *managed)
{
    block_release(managed->manager);
    free(managed);
}

/* Capsules that nobody took. */
static void drop_capsule(PyObject *capsule)
{
    if (PyCapsule_IsValid(capsule, "dltensor")) delete_managed(PyCapsule_GetPointer(capsule, "dltensor"));
    if (PyCapsule_IsValid(capsule, "dltensor_versioned"))
        delete_versioned(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
}

static void fill_tensor(dl_tensor *tensor, block *b)
{
    *tensor = (dl_tensor){.data = b->data, .ndim = b->ndim, .shape = b->shape, .strides = b->strides};
    tensor->device = (dl_device){b->device_type == FC_CUDA ? DL_CUDA : DL_CPU, b->device_id};
    tensor->dtype = fc_dtype_to_dl(b->dtype);
}

static PyObject *export_capsule(block *b, bool versioned)
{
    PyObject *capsule = NULL;
    if (versioned) {
        dl_managed_versioned *managed = calloc(1, sizeof *managed);
        if (managed == NULL) return PyErr_NoMemory();
        managed->version = (dl_version){DL_MAJOR, DL_MINOR};
        managed->manager = b;
        managed->deleter = delete_versioned;
        fill_tensor(&managed->tensor, b);
        atomic_fetch_add(&b->references, 1);
        capsule = PyCapsule_New(managed, "dltensor_versioned", drop_capsule);
        if (capsule == NULL) delete_versioned(managed);
    } else {
        dl_managed *managed = calloc(1, sizeof *managed);
        if (managed == NULL) return PyErr_NoMemory();
        managed->manager = b;
        managed->deleter = delete_managed;
        fill_tensor(&managed->tensor, b);
        atomic_fetch_add(&b->references, 1);
        capsule = PyCapsule_New(managed, "dltensor", drop_capsule);
        if (capsule == NULL) delete_managed(managed);
    }
    return capsule;
}

/* __dlpack__(*, stream=None, max_version=None, dl_device=None, copy=None) */
static PyObject *buffer_dlpack(PyObject *self, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
    PyObject *stream = Py_None, *max_version = Py_None, *device = Py_None, *copy = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|$OOOO", names, &stream, &max_version, &device, &copy))
        return NULL;
    block *b = ((fc_buffer *)self)->block;
    if (copy == Py_True) {
        PyErr_SetString(PyExc_BufferError, "copy=True is not offered; this buffer is handed over as it is");
        return NULL;
    }
    if (b->device_type == FC_CUDA && stream != Py_None) {
        long long number = PyLong_AsLongLong(stream);
        if (number == -1 && PyErr_Occurred()) return NULL;
        if (number != -1) { /* -1: the consumer asks for no ordering */
            fc_status status = fc_stream_order(b->device_id, b->stream, number == 1 ? NULL : (void *)(intptr_t)number);
            if (status != FC_OK) {
                PyErr_SetString(PyExc_BufferError, fc_last_error());
                return NULL;
            }
        }
    }
    int major = 0, minor = 0;
    if (max_version != Py_None && !PyTuple_Check(max_version)) {
        PyErr_Format(PyExc_TypeError, "max_version is %R; allowed: a pair of ints, or None", max_version);
        return NULL;
    }
    if (max_version != Py_None && !PyArg_ParseTuple(max_version, "ii", &major, &minor)) return NULL;
    return export_capsule(b, major >= DL_MAJOR);
}

static PyObject *buffer_dlpack_device(PyObject *self, PyObject *unused)
{
    (void)unused;
    const block *b = ((fc_buffer *)self)->block;
    return Py_BuildValue("(ii)", b->device_type == FC_CUDA ? DL_CUDA : DL_CPU, (int)b->device_id);
}

static int32_t dtype_from_word(const char *word)
{
    for (int32_t dtype = FC_FLOAT16; dtype <= FC_FLOAT64; dtype++)
        if (strcmp(word, fc_dtype_word(dtype)) == 0) return dtype;
    return FC_NONE;
}

/* Buffer(shape, dtype, device_id, stream): device_id -1 is the CPU. */
static PyObject *buffer_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"shape", "dtype", "device_id", "stream", NULL};
    PyObject *shape, *stream = NULL;
    const char *word;
    int device_id;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O!si|O!", names, &PyTuple_Type, &shape, &word, &device_id,
                                     &PyLong_Type, &stream))
        return NULL;
    block *b = calloc(1, sizeof *b);
    if (b == NULL) return PyErr_NoMemory();
    atomic_init(&b->references, 1);
    b->dtype = dtype_from_word(word);
    b->ndim = (int)PyTuple_Size(shape);
    b->device_type = device_id < 0 ? FC_CPU : FC_CUDA;
    b->device_id = device_id < 0 ? 0 : device_id;
    if (stream != NULL) b->stream = PyLong_AsVoidPtr(stream);
    int64_t step = 1;
    bool fits = b->dtype != FC_NONE && b->ndim <= FC_MAX_NDIM && !PyErr_Occurred();
    for (int i = b->ndim - 1; i >= 0 && fits; i--) {
        b->shape[i] = PyLong_AsLongLong(PyTuple_GetItem(shape, i));
        b->strides[i] = step;
        fits = b->shape[i] >= 0 && !__builtin_mul_overflow(step, b->shape[i] > 0 ? b->shape[i] : 1, &step) &&
               step < INT64_MAX / 16;
    }
    if (!fits) {
        free(b);
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "Buffer of shape %R and dtype '%s' cannot be", shape, word);
        return NULL;
    }
    bool empty = false;
    for (int i = 0; i < b->ndim; i++) empty = empty || b->shape[i] == 0;
    uint64_t bytes = empty ? 0 : (uint64_t)step * (uint64_t)fc_dtype_size(b->dtype);
    fc_status status = fc_malloc(b->device_type, b->device_id, bytes, b->stream, &b->data);
    if (status != FC_OK) {
        free(b);
        PyErr_SetString(status == FC_OUT_OF_MEMORY ? PyExc_MemoryError : PyExc_RuntimeError, fc_last_error());
        return NULL;
    }
    fc_buffer *self = (fc_buffer *)PyType_GenericNew(type, NULL, NULL);
    if (self == NULL) {
        block_release(b);
        return NULL;
    }
    self->block = b;
    return (PyObject *)self;
}

static void buffer_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (((fc_buffer *)self)->block != NULL) block_release(((fc_buffer *)self)->block);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF((PyObject *)type);
}

static PyMethodDef buffer_methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))buffer_dlpack, METH_VARARGS | METH_KEYWORDS,
     "A DLPack capsule of this memory."},
    {"__dlpack_device__", buffer_dlpack_device, METH_NOARGS, "(device_type, device_id), as DLPack numbers them."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot buffer_slots[] = {
    {Py_tp_doc, "Memory for a result of a kind that cannot be written; handed over through DLPack."},
    {Py_tp_new, buffer_new},
    {Py_tp_dealloc, buffer_dealloc},
    {Py_tp_methods, buffer_methods},
    {0, NULL},
};

PyType_Spec fc_buffer_spec = {
    .name = "flashcore._C.Buffer",
    .basicsize = sizeof(fc_buffer),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = buffer_slots,
};
