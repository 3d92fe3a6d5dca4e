/*
 * tune.c - between flashcore/autotune.py and the library's table of tuned choices: what could run a call goes out, what
 * was measured to be best comes in.
 */
#include <stdio.h>
#include <string.h>

#include "binding.h"

int fc_load_tuned(fc_state *state, const fc_attention_problem *problem)
{
    if (problem->kernel != NULL || problem->block_m != 0 || problem->block_n != 0 ||
        (problem->flags & FC_DETERMINISTIC) != 0)
        return 0;
    state->is_tuned_loaded = true; /* before: whatever goes wrong is said once */
    PyObject *module = PyImport_ImportModule("flashcore.autotune");
    PyObject *done = module == NULL ? NULL : PyObject_CallMethod(module, "_load", NULL);
    Py_XDECREF(module);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

static PyObject *list_of(const fc_plan *plans, int32_t count)
{
    PyObject *list = PyList_New(count);
    for (int32_t i = 0; i < count && list != NULL; i++) {
        PyObject *one = Py_BuildValue("(siii)", fc_kernel_name(plans[i].kernel), plans[i].block_m, plans[i].block_n,
                                      plans[i].num_splits);
        if (one == NULL || PyList_SetItem(list, i, one) != 0) Py_CLEAR(list);
    }
    return list;
}

int fc_add_choices(PyObject *dict, const fc_attention_problem *problem, const fc_plan *plan)
{
    int32_t count = 0, capacity = fc_kernel_count();
    uint64_t shape_class;
    char words[256];
    PyObject *list = NULL, *more = NULL;
    int error = -1;
    fc_plan *plans = PyMem_Calloc((size_t)capacity, sizeof *plans);
    if (plans == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (int32_t i = 0; i < capacity; i++) plans[i].struct_size = sizeof *plans;
    fc_status status = fc_attention_class(problem, &shape_class, words, sizeof words);
    if (status == FC_OK) status = fc_attention_candidates(problem, NULL, plans, capacity, &count);
    if (status != FC_OK) { /* what has a plan has candidates */
        PyErr_SetString(PyExc_RuntimeError, fc_last_error());
        goto done;
    }
    list = list_of(plans, count);
    if (list == NULL) goto done;
    more = Py_BuildValue("{s:N,s:s,s:i,s:K,s:s,s:O}", "tuned", PyBool_FromLong(plan->tuned), "device_type",
                         problem->device_type == FC_CPU ? "cpu" : "cuda", "device_id", problem->device_id,
                         "shape_class", (unsigned long long)shape_class, "class_words", words, "candidates", list);
    if (more != NULL) error = PyDict_Update(dict, more);
done:
    PyMem_Free(plans);
    Py_XDECREF(list);
    Py_XDECREF(more);
    return error;
}

PyObject *fc_py_add_tuned(PyObject *module, PyObject *args)
{
    (void)module;
    const char *type, *name, *kernel;
    unsigned long long shape_class;
    fc_device device = {.struct_size = sizeof device};
    if (!PyArg_ParseTuple(args, "ssiiiKs", &type, &name, &device.compute_capability, &device.num_sms, &device.isa,
                          &shape_class, &kernel))
        return NULL;
    device.type = strcmp(type, "cpu") == 0 ? FC_CPU : strcmp(type, "cuda") == 0 ? FC_CUDA : 0;
    snprintf(device.name, sizeof device.name, "%s", name);
    if (fc_tuned_add(&device, shape_class, kernel) != FC_OK) {
        PyErr_SetString(PyExc_ValueError, fc_last_error());
        return NULL;
    }
    Py_RETURN_NONE;
}

PyObject *fc_py_clear_tuned(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    fc_tuned_clear();
    Py_RETURN_NONE;
}
