/*
 * module.c - the extension module flashcore._C: method table and state.
 *
 * Multi-phase initialization (PEP 489) with all state per module, so it can be loaded in several interpreters.
 */
#include <string.h>

#include "binding.h"

PyDoc_STRVAR(
    attention_doc,
    "attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *, "
    "window=None, diagonal=0, softcap=None, alibi_slopes=None, sinks=None, layout='bhsd', return_lse=False, out=None, "
    "deterministic=False, stream=None, block_m=None, block_n=None, dropout_seed=None)\n"
    "--\n"
    "\n"
    "Exact scaled dot-product attention. The first eight arguments are PyTorch's, in order and meaning.\n"
    "\n"
    "For query row i and key j of one head, with d = j - i - diagonal:\n"
    "\n"
    "    score = softcap(scale * q_i . k_j) + attn_mask_ij - alibi_slope * |d|\n"
    "    out_i = sum_j softmax_j(score) v_j\n"
    "\n"
    "over the keys that masks leave visible (Vaswani et al., 2017, eq. 1; softcap as in Gemma 2, slopes as in\n"
    "ALiBi, Press et al., 2022; sinks as in gpt-oss). Sums are float32, for float64 arrays float64.\n"
    "A row that sees no key gives 0, never NaN.\n"
    "\n"
    "Arrays are torch tensors, NumPy (ml_dtypes' bfloat16 too), CuPy or JAX arrays, or anything with __dlpack__ or\n"
    "__cuda_array_interface__, all on one device, of any strides. Leading dimensions are batch and broadcast.\n"
    "\n"
    "Args:\n"
    "    query: [..., num_heads_q, seqlen_q, head_dim]; float16, bfloat16, float32, or float64 (CPU). head_dim 1 to "
    "256.\n"
    "    key: [..., num_heads_kv, seqlen_k, head_dim], of query's dtype. num_heads_q is a multiple of num_heads_kv.\n"
    "    value: [..., num_heads_kv, seqlen_k, head_dim_v], of query's dtype.\n"
    "    attn_mask: broadcasts to [..., num_heads_q, seqlen_q, seqlen_k]; bool (True: attend), or query's dtype or\n"
    "        float32, added to the score. With is_causal both apply.\n"
    "    dropout_p: how likely each weight after the softmax is dropped, 0.0 to 1.0; the others are multiplied by\n"
    "        1 / (1 - dropout_p). As in PyTorch it applies wherever it is not 0: pass 0.0 in evaluation. lse knows\n"
    "        nothing of it.\n"
    "    is_causal: hide keys with d > 0. 'lower_right' also sets diagonal.\n"
    "    scale: any finite number; None: 1 / sqrt(head_dim).\n"
    "    enable_gqa: accepted for PyTorch's sake; grouped heads always work.\n"
    "    window: (left, right): keep -left <= d <= right; None or -1 leaves a side open.\n"
    "    diagonal: 0 (upper left, PyTorch's), 'lower_right' (seqlen_k - seqlen_q, FlashAttention's) or any int.\n"
    "    softcap: positive: score becomes softcap * tanh(score / softcap). None or 0: off.\n"
    "    alibi_slopes: [num_heads_q] or [..., num_heads_q]; query's dtype or float32.\n"
    "    sinks: [num_heads_q] or [..., num_heads_q]; one more logit in each row's softmax, with no value.\n"
    "    layout: 'bhsd', or 'bshd' for arrays [..., seqlen, num_heads, head_dim].\n"
    "    return_lse: also return log(sum(exp(score))), natural, [..., num_heads_q, seqlen_q] in both layouts, float32\n"
    "        (float64 for float64); -inf for a row that sees no key.\n"
    "    out: an array of the result's shape and dtype to write to; returned as the same object.\n"
    "    deterministic: make a row's bits independent of the batch around it, and of what autotune() chose (the "
    "forward\n"
    "        is always repeatable).\n"
    "    stream: for GPU arrays whose library has no current stream (JAX, Numba): a cudaStream_t as int or a stream "
    "object.\n"
    "    block_m, block_n: force a tile, rows and keys, of those in explain(...).candidates; one alone leaves the "
    "other\n"
    "        open.\n"
    "    dropout_seed: two 64-bit integers (or four of 32 bits), seed and offset, on the query's device; read where\n"
    "        dropout_p is not 0. What is dropped is a function of these, batch, head, row and key alone. None: drawn\n"
    "        from torch's default generator of the device; callers with other arrays must give them.\n"
    "\n"
    "Returns:\n"
    "    An array of query's kind, dtype, device and layout, [..., num_heads_q, seqlen_q, head_dim_v]; with return_lse "
    "a pair.\n"
    "    On a GPU it is enqueued on the library's current stream, without synchronization.\n"
    "    Of torch tensors that require grad, it carries gradients: to query, key, value, a float attn_mask, sinks. On "
    "a GPU\n"
    "    they come from portable kernels, which say so once.\n"
    "\n"
    "Raises:\n"
    "    TypeError: an argument of the wrong kind. ValueError: shapes, dtypes, strides, devices or options that do not "
    "fit.\n"
    "    NotImplementedError: legal, but not served here or not yet.\n"
    "    MemoryError, RuntimeError: out of memory; no such device, or CUDA reported an error.\n");

PyDoc_STRVAR(measure_doc,
             "measure(kernel, num_calls, /, *args, **kwargs)\n--\n\n"
             "Microseconds per call of attention(...) on this kernel, of num_calls in a row: device time on a GPU.\n");

PyDoc_STRVAR(add_tuned_doc,
             "add_tuned(device_type, name, compute_capability, num_sms, isa, shape_class, kernel, /)\n--\n\n"
             "From now on, in this process, problems of this class on such a device run on this kernel.\n");

PyDoc_STRVAR(plan_doc,
             "plan(*args, **kwargs)\n--\n\nWhat attention(...) would run, as a dict; flashcore.explain dresses it.\n");

PyDoc_STRVAR(forward_doc,
             "forward(*args, **kwargs)\n--\n\n"
             "attention(..., return_lse=True) for kernels of torch's dispatcher, which has looked at modes, gradients\n"
             "and subclasses already: tensors are taken as the memory they are.\n");

PyDoc_STRVAR(
    backward_doc,
    "backward(saved, dout, dlse, wanted, options, /)\n--\n\n"
    "Gradients of attention(query, key, value, attn_mask, alibi_slopes=..., sinks=..., dropout_seed=..., **options).\n"
    "\n"
    "saved is (query, key, value, attn_mask, alibi_slopes, sinks, dropout_seed, out, lse), the last two the call's\n"
    "results; dout and dlse (or None) are the gradients of these. wanted begins with a bool for each of the\n"
    "first six, and so does the result with its gradient, None where not wanted (nobody may want alibi_slopes').\n"
    "A gradient has its input's shape, dtype and, for torch tensors, order in memory. One batch dimension at\n"
    "most, which query, key and value share.\n"
    "\n"
    "Raises what attention(...) would raise, and ValueError for arrays that do not fit it.\n");

PyDoc_STRVAR(node_backward_doc,
             "node_backward(ctx, *grad_outputs)\n--\n\n"
             "The backward of flashcore.torch's autograd node, for autograd to call with dout and perhaps dlse.\n");

PyDoc_STRVAR(kernels_doc,
             "kernels()\n--\n\n"
             "(name, family, 'cpu' or 'cuda', does a device of this machine run it) of each kernel of this "
             "build, in the\nplanner's order.\n");

/* Does any device of this machine run the kernel? */
static bool is_usable(int32_t kernel, int32_t device_type, int32_t num_devices)
{
    for (int32_t id = 0; id < num_devices; id++) {
        fc_device facts = {.struct_size = sizeof facts};
        if (fc_device_query(device_type, id, &facts) == FC_OK && fc_kernel_runs_on(kernel, &facts)) return true;
    }
    return false;
}

static PyObject *kernels(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    PyObject *list = PyList_New(0);
    for (int32_t i = 0, num_gpus = fc_cuda_device_count(); list != NULL && i < fc_kernel_count(); i++) {
        const char *family = fc_kernel_family(i);
        bool on_cpu = strcmp(family, "cpu") == 0;
        bool usable = on_cpu ? is_usable(i, FC_CPU, 1) : is_usable(i, FC_CUDA, num_gpus);
        PyObject *kernel =
            Py_BuildValue("(sssO)", fc_kernel_name(i), family, on_cpu ? "cpu" : "cuda", usable ? Py_True : Py_False);
        if (kernel == NULL || PyList_Append(list, kernel) != 0) Py_CLEAR(list);
        Py_XDECREF(kernel);
    }
    return list;
}

/* device(type, id) -> dict of facts; raises RuntimeError where there is none. */
static PyObject *device(PyObject *module, PyObject *args)
{
    (void)module;
    const char *type;
    int id = 0;
    if (!PyArg_ParseTuple(args, "s|i", &type, &id)) return NULL;
    int32_t number = strcmp(type, "cpu") == 0 ? FC_CPU : strcmp(type, "cuda") == 0 ? FC_CUDA : 0;
    fc_device facts = {.struct_size = sizeof facts};
    if (fc_device_query(number, id, &facts) != FC_OK) {
        PyErr_SetString(PyExc_RuntimeError, fc_last_error());
        return NULL;
    }
    return Py_BuildValue("{s:s,s:i,s:s,s:i,s:i,s:i,s:i,s:i,s:i,s:L}", "type", type, "id", facts.id, "name", facts.name,
                         "compute_capability", facts.compute_capability, "num_sms", facts.num_sms,
                         "smem_bytes_per_block", facts.smem_bytes_per_block, "driver_version", facts.driver_version,
                         "isa", facts.isa, "num_threads", facts.num_threads, "l2_bytes", (long long)facts.l2_bytes);
}

/* cuda_devices() -> (count, why there are none). */
static PyObject *cuda_devices(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    int32_t count = fc_cuda_device_count();
    return Py_BuildValue("(is)", (int)count, count > 0 ? "" : fc_last_error());
}

static PyMethodDef methods[] = {
    {"attention", (PyCFunction)(void (*)(void))fc_py_attention, METH_FASTCALL | METH_KEYWORDS, attention_doc},
    {"plan", (PyCFunction)(void (*)(void))fc_py_plan, METH_FASTCALL | METH_KEYWORDS, plan_doc},
    {"backward", (PyCFunction)(void (*)(void))fc_py_backward, METH_FASTCALL, backward_doc},
    {"forward", (PyCFunction)(void (*)(void))fc_py_forward, METH_FASTCALL | METH_KEYWORDS, forward_doc},
    {"node_backward", (PyCFunction)(void (*)(void))fc_py_node_backward, METH_FASTCALL, node_backward_doc},
    {"kernels", kernels, METH_NOARGS, kernels_doc},
    {"device", device, METH_VARARGS, "device(type, id=0, /)\n--\n\nFacts of a device, 'cpu' or 'cuda', as a dict."},
    {"cuda_devices", cuda_devices, METH_NOARGS, "cuda_devices()\n--\n\n(number of GPUs, the reason where it is 0)."},
    {"measure", (PyCFunction)(void (*)(void))fc_py_measure, METH_FASTCALL | METH_KEYWORDS, measure_doc},
    {"add_tuned", fc_py_add_tuned, METH_VARARGS, add_tuned_doc},
    {"clear_tuned", fc_py_clear_tuned, METH_NOARGS, "clear_tuned()\n--\n\nForgets all choices, in this process."},
    {NULL, NULL, 0, NULL},
};

static int exec(PyObject *module)
{
    fc_state *state = PyModule_GetState(module);
    state->parameter_names = PyMem_Calloc(FC_NUM_ARGS, sizeof *state->parameter_names);
    if (state->parameter_names == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (int i = 0; i < FC_NUM_ARGS; i++) {
        state->parameter_names[i] = PyUnicode_InternFromString(fc_argument_names[i]);
        if (state->parameter_names[i] == NULL) return -1;
    }
    PyObject *buffer = PyType_FromModuleAndSpec(module, &fc_buffer_spec, NULL);
    int error = buffer == NULL ? -1 : PyModule_AddType(module, (PyTypeObject *)buffer);
    Py_XDECREF(buffer);
    if (error != 0) return -1;
    if (PyModule_AddStringConstant(module, "version", fc_version()) != 0) return -1;
    if (PyModule_AddStringConstant(module, "revision", fc_revision()) != 0) return -1;
    return PyModule_AddStringConstant(module, "cuda_archs", fc_cuda_archs());
}

/* Every object in the state, for the garbage collector and for clear. */
static int traverse(PyObject *module, visitproc visit, void *arg)
{
    fc_state *state = PyModule_GetState(module);
    if (state == NULL) return 0;
    for (int i = 0; i < FC_KIND_CACHE; i++) Py_VISIT((PyObject *)state->kinds[i].type);
    for (size_t i = 0; i < sizeof state->torch / sizeof(PyObject *); i++) Py_VISIT(((PyObject **)&state->torch)[i]);
    Py_VISIT(state->interop);
    Py_VISIT(state->slow_warning);
    Py_VISIT(state->numpy.memmap_type);
    return 0;
}

static int clear(PyObject *module)
{
    fc_state *state = PyModule_GetState(module);
    if (state == NULL) return 0;
    for (int i = 0; i < FC_KIND_CACHE; i++) Py_CLEAR(state->kinds[i].type);
    for (size_t i = 0; i < sizeof state->torch / sizeof(PyObject *); i++) Py_CLEAR(((PyObject **)&state->torch)[i]);
    Py_CLEAR(state->interop);
    Py_CLEAR(state->slow_warning);
    Py_CLEAR(state->numpy.memmap_type);
    if (state->parameter_names != NULL)
        for (int i = 0; i < FC_NUM_ARGS; i++) Py_CLEAR(state->parameter_names[i]);
    return 0;
}

static void free_state(void *module)
{
    clear(module);
    fc_state *state = PyModule_GetState(module);
    if (state == NULL) return;
    PyMem_Free(state->parameter_names);
    state->parameter_names = NULL;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, exec}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "flashcore._C",
    .m_doc = "The C side of flashcore; use the names in the package.",
    .m_size = sizeof(fc_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
    .m_free = free_state,
};

PyMODINIT_FUNC PyInit__C(void)
{
    return PyModuleDef_Init(&definition);
}
