/*
 * binding.h - what the files of the CPython extension say to each other.
 *
 *   module.c     method table, module state
 *   attention.c  attention(): route, run, return
 *   call.c       a call on its way: from arguments to a problem
 *   backward.c   backward(): the gradients of a call, for autograd
 *   arguments.c  from the vector call to a problem's options
 *   layout.c     shapes: leading batches, heads, broadcasting, folding; no Python objects in it
 *   tensor.c     arrays in: which protocol an object speaks, and DLPack and the CUDA array interface
 *   numpy.c      arrays in and out through NumPy's C API
 *   torch.c      what a torch.Tensor may ask that the C function cannot serve
 *   autograd.c   the two ways of a call that torch must see: an autograd node, or torch's dispatcher
 *   result.c     arrays out: made by the query's own allocator
 *   support.c    facts of dtypes, and the way to flashcore/_interop.py
 *   buffer.c     memory of our own that speaks DLPack, for results of kinds that cannot be written
 *   tune.c       tuned choices, in and out
 *
 * Conventions: a function that returns int gives 0, or -1 with a Python exception set. Objects are
 * borrowed unless a comment says otherwise.
 */
#ifndef FC_BINDING_H
#define FC_BINDING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>

#include "dlpack_abi.h"
#include "flashcore.h"

/* Four dimensions and a dozen of leading batches; more is refused in words. */
enum { FC_MAX_NDIM = 16 };

typedef enum fc_protocol {
    FC_BY_NOTHING = 0,
    FC_BY_EXCHANGE, /* DLPack's C exchange API, torch among them */
    FC_BY_NUMPY,
    FC_BY_DLPACK, /* __dlpack__ */
    FC_BY_CAI,    /* __cuda_array_interface__ */
} fc_protocol;

/* How one type of array is served; cached per type. */
typedef struct fc_kind {
    PyTypeObject *type; /* held while cached */
    fc_protocol protocol;
    bool is_torch;
    bool is_subclass;     /* of torch.Tensor, and not Parameter: it may redefine what its data means */
    dl_exchange_api *api; /* lives as long as the process */
} fc_kind;

/* An imported array. fc_array_release gives back what the import took. */
typedef struct fc_array {
    PyObject *object; /* the caller keeps it alive */
    const char *name; /* "query", for messages */
    fc_kind kind;
    void *data;
    int ndim;
    int64_t shape[FC_MAX_NDIM];
    int64_t strides[FC_MAX_NDIM]; /* elements */
    int32_t dtype, device_type, device_id;
    bool read_only;
    bool is_seed;    /* dropout_seed: integers, of which dtype tells the size alone, as the float's that is as large */
    bool has_stream; /* its producer works on `stream`, to be ordered against ours */
    void *stream;
    dl_managed *managed; /* at most one of these two, to be released */
    dl_managed_versioned *managed_versioned;
} fc_array;

enum { FC_KIND_CACHE = 16 };

/* Everything the module keeps. torch's and NumPy's parts are filled when the first of their arrays is seen. */
typedef struct fc_state {
    fc_kind kinds[FC_KIND_CACHE];
    int next_kind;
    PyObject **parameter_names; /* interned, in signature order */
    PyObject *interop;          /* flashcore._interop, once needed */
    PyObject *slow_warning;     /* flashcore.SlowPathWarning */
    uint32_t slow_warned;       /* FC_SLOW_* reasons already warned of */
    bool is_tuned_loaded;       /* flashcore.autotune was asked for what earlier processes tuned */

    struct {
        PyObject *tensor_type, *parameter_type, *strided;
        PyObject *is_grad_enabled, *is_any_autocast_enabled, *function_modes, *dispatch_modes, *functorch_level,
            *is_legacy_batched, *is_tracing;
        PyObject *forward_ad, *increment_version, *get_num_threads;
        PyObject *empty_like, *empty_strided_cpu, *empty_strided_cuda, *current_device;
        PyObject *dtypes[FC_FLOAT64 + 1]; /* by FC_FLOAT16 and so on */
        PyObject *is_autocast_enabled, *get_autocast_dtype;
        PyObject *integration; /* flashcore.torch._call, once needed */
        PyObject *name_requires_grad, *name_is_neg, *name_layout, *name_current_level, *name_dtype, *name_saved_tensors,
            *name_needs_input_grad, *name_options;
    } torch;

    struct {
        PyObject *memmap_type; /* NULL until NumPy's C API is loaded */
        int bfloat16;          /* ml_dtypes' type number, 0 until seen */
    } numpy;
} fc_state;

/* support.c */
const char *fc_dtype_word(int32_t dtype);             /* "float16" */
int32_t fc_dtype_size(int32_t dtype);                 /* bytes */
int32_t fc_dtype_of_seed(int bits);                   /* FC_NONE where a seed's integers are no such */
const char *fc_allowed_dtypes(const fc_array *array); /* in words, for one that has another */
dl_dtype fc_dtype_to_dl(int32_t dtype);
int32_t fc_dtype_from_dl(dl_dtype dtype);                    /* FC_NONE for one that is not ours */
PyObject *fc_interop(fc_state *state, const char *function); /* of flashcore/_interop.py; a new reference */

/* tensor.c. import: stream is the call's, for producers that order themselves; NULL where none is known. */
int fc_kind_of(fc_state *state, PyObject *object, fc_kind *kind);
int fc_array_import(fc_state *state, const char *name, PyObject *object, const fc_kind *kind, void *stream,
                    bool has_stream, fc_array *array);
int fc_array_import_seed(fc_state *state, const char *name, PyObject *object, const fc_kind *kind, void *stream,
                         bool has_stream, fc_array *array);
void fc_array_release(fc_array *array);
int fc_array_from_dl(fc_array *array, const dl_tensor *tensor);

/* numpy.c. is_exact: numpy.ndarray or numpy.memmap; another subclass may mean something else by its data. */
int fc_numpy_classify(fc_state *state, PyObject *object, bool *is_array, bool *is_exact);
int fc_numpy_import(fc_state *state, PyObject *object, fc_array *array);
PyObject *fc_numpy_new(fc_state *state, const fc_array *like, int32_t dtype, int ndim, const int64_t *shape,
                       fc_array *array);

/* torch.c */

/* What torch has switched on around a call. */
typedef struct fc_torch_modes {
    bool autocast;
    bool tangents; /* a tensor may carry one: the call is inside torch.autograd.forward_ad.dual_level() */
    bool dispatch; /* something of torch's must see the call: a mode, a transform, a subclass, a lazy view */
} fc_torch_modes;

int fc_torch_load(fc_state *state, PyObject *torch);
int fc_torch_check_modes(fc_state *state, fc_torch_modes *modes);
int fc_torch_check_tensor(fc_state *state, const char *name, PyObject *tensor, const fc_kind *kind,
                          bool *wants_gradient, fc_torch_modes *modes);
/* Why an import failed, in better words; or 0, where it is the dispatcher's to serve the call. */
int fc_torch_import_failed(fc_state *state, const char *name, PyObject *tensor, fc_torch_modes *modes);
int fc_torch_num_threads(fc_state *state, int32_t *num_threads);
PyObject *fc_torch_integration(fc_state *state,
                               const char *function); /* of flashcore/torch/_call.py; a new reference */
/* 1 where nothing of torch but their data is in the tensors (or None), and no mode or transform is active. */
int fc_torch_is_plain(fc_state *state, PyObject *const *tensors, int count);
/* A gradient under autograd's is_grads_batched: its vmap is older than functorch, no level of it, and has no memory. */
int fc_torch_is_legacy_batched(fc_state *state, PyObject *tensor);
int fc_torch_grad_enabled(fc_state *state);
/* As torch's own functions do of an out=. */
int fc_torch_count_write(fc_state *state, PyObject *tensor);

/* layout.c */
typedef struct fc_geometry {
    int num_batch_dims;
    int64_t batch_shape[FC_MAX_NDIM];
    int64_t num_heads_q, num_heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v;
    bool heads_inside; /* layout "bshd" */
    int out_ndim, lse_ndim;
    int64_t out_shape[FC_MAX_NDIM], lse_shape[FC_MAX_NDIM];
} fc_geometry;

/* The eight operands of a call in the order of fc_attention_problem's tensors. */
enum fc_operand { FC_QUERY, FC_KEY, FC_VALUE, FC_OUT, FC_LSE, FC_MASK, FC_ALIBI, FC_SINKS, FC_NUM_OPERANDS };

/* Strides of an operand over all batch dimensions; the problem's tensor holds the rest. */
typedef struct fc_batches {
    int ndim;
    int64_t shape[FC_MAX_NDIM];
    int64_t strides[FC_NUM_OPERANDS][FC_MAX_NDIM];
} fc_batches;

int fc_geometry_of(const fc_array *query, const fc_array *key, const fc_array *value, bool heads_inside,
                   fc_geometry *geometry);
int fc_place(const fc_geometry *geometry, enum fc_operand operand, const fc_array *array, fc_tensor *tensor,
             fc_batches *batches);
void fc_fold(fc_batches *batches);
bool fc_arrays_overlap(const fc_array *a, const fc_array *b);
bool fc_overlaps_itself(const fc_array *array);
void fc_format_shape(char *text, size_t size, int ndim, const int64_t *shape);

/* result.c. Makes the array of the query's kind that will hold a result, and describes it in `array`.
 * *finish, where not NULL afterwards, is called after the work to give the object to return. */
int fc_result_new(fc_state *state, const fc_array *query, const char *name, int32_t dtype, int ndim,
                  const int64_t *shape, void *stream, fc_array *array, PyObject **object, PyObject **finish);

/* Scratch memory for a call: on a GPU from torch's allocator, which knows of its captures, where the query is torch's;
 * elsewhere from fc_malloc, on the call's stream. May be freed as soon as the work is enqueued. */
typedef struct fc_workspace {
    void *data;       /* NULL where no bytes are asked for */
    PyObject *tensor; /* owns it; NULL: fc_malloc's */
    int32_t device_type, device_id;
    void *stream;
} fc_workspace;
struct fc_call;
int fc_workspace_new(struct fc_call *call, uint64_t bytes, fc_workspace *workspace);
void fc_workspace_free(fc_workspace *workspace);

/* buffer.c */
extern PyType_Spec fc_buffer_spec;

/* arguments.c */

/* In the order of the signature. */
enum fc_argument {
    FC_ARG_QUERY,
    FC_ARG_KEY,
    FC_ARG_VALUE,
    FC_ARG_ATTN_MASK,
    FC_ARG_DROPOUT_P,
    FC_ARG_IS_CAUSAL,
    FC_ARG_SCALE,
    FC_ARG_ENABLE_GQA,
    FC_ARG_WINDOW,
    FC_ARG_DIAGONAL,
    FC_ARG_SOFTCAP,
    FC_ARG_ALIBI_SLOPES,
    FC_ARG_SINKS,
    FC_ARG_LAYOUT,
    FC_ARG_RETURN_LSE,
    FC_ARG_OUT,
    FC_ARG_DETERMINISTIC,
    FC_ARG_STREAM,
    FC_ARG_BLOCK_M,
    FC_ARG_BLOCK_N,
    FC_ARG_DROPOUT_SEED,
    FC_NUM_ARGS
};
extern const char *const fc_argument_names[FC_NUM_ARGS];

typedef struct fc_arguments {
    PyObject *given[FC_NUM_ARGS]; /* NULL where absent or None */
    bool is_none[FC_NUM_ARGS];
    bool heads_inside; /* layout "bshd" */
    bool return_lse;
    char forced_kernel[64]; /* FLASHCORE_FORCE, copied: os.environ may change once the GIL is released */
} fc_arguments;

/* Both structs zeroed by the caller; fills in the arguments, and the problem's options. */
int fc_arguments_read(fc_state *state, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names,
                      fc_arguments *arguments, fc_attention_problem *problem);

/* call.c */

/* One call on its way: what was given, and what is made of it. fc_call_begin zeroes all but the arrays, of which each
 * is written when it is imported: they are most of the struct's 5 KiB, and few are there. */
typedef struct fc_call {
    fc_state *state;
    fc_arguments arguments;
    bool has[FC_NUM_OPERANDS];
    bool has_seed;
    bool any_torch;
    bool below_dispatcher; /* which has looked at tensors and modes already */
    fc_torch_modes modes;  /* with modes.dispatch, nothing below is filled in: fc_torch_call serves the call */
    PyObject *casts[FC_NUM_OPERANDS]; /* autocast's copies, owned; each stands in arguments.given too */
    PyObject *drawn_seed;             /* owned; stands in arguments.given where the caller gave no dropout_seed */
    const char *gradient_of;          /* the first argument that requires a gradient, or NULL */
    bool has_stream;                  /* the call's: the stream that the kernel runs on */
    void *stream;
    fc_geometry geometry;
    fc_batches batches;
    fc_attention_problem problem;
    fc_array arrays[FC_NUM_OPERANDS]; /* last: see above */
    fc_array seed;                    /* dropout's */
} fc_call;

void fc_call_begin(fc_call *call, fc_state *state, bool below_dispatcher);
/* The arrays that a call reads but for dropout's seed, in the order of their import. */
typedef struct fc_input {
    enum fc_operand operand;
    enum fc_argument argument;
} fc_input;
enum { FC_NUM_INPUTS = 6 };
extern const fc_input fc_inputs[FC_NUM_INPUTS];

int fc_raise_status(fc_status status); /* -1, with fc_last_error() raised */
fc_tensor *fc_tensor_of(fc_attention_problem *problem, enum fc_operand operand);
/* Arguments to a problem, all but the outputs; fc_call_release gives back what was imported, after a failure too. */
int fc_call_prepare(fc_call *call, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names);
int fc_call_check_device(const fc_call *call, fc_array *array);
/* Seed and offset for a call with dropout whose caller gave none, from torch's generator. */
int fc_call_draw_seed(fc_call *call);
/* The problem's batch and batch strides, and how many calls of the library the rest of the batches takes. */
int64_t fc_call_fold(fc_call *call);
void fc_call_release(fc_call *call);
/* FLASHCORE_SLOW's say on a plan that is not the fast path: -1 with an exception, or a warning, which may be one. */
int fc_report_slow(fc_state *state, const fc_attention_problem *problem, const fc_plan *plan);

/* attention.c: attention() and, below torch's dispatcher, forward(), which gives (out, lse). */
PyObject *fc_py_attention(PyObject *module, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names);
PyObject *fc_py_forward(PyObject *module, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names);
PyObject *fc_py_plan(PyObject *module, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names);
PyObject *fc_py_measure(PyObject *module, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names);

/* tune.c */

/* What earlier processes tuned, read once, before the first call that leaves the choice open. */
int fc_load_tuned(fc_state *state, const fc_attention_problem *problem);
/* Adds to a plan's dict who chose it, for what class of problems, and what else could run. */
int fc_add_choices(PyObject *dict, const fc_attention_problem *problem, const fc_plan *plan);
PyObject *fc_py_add_tuned(PyObject *module, PyObject *args);
PyObject *fc_py_clear_tuned(PyObject *module, PyObject *unused);

/* autograd.c */
bool fc_torch_is_direct(const fc_call *call);
PyObject *fc_torch_node(const fc_call *call, PyObject *out, PyObject *lse);
PyObject *fc_py_node_backward(PyObject *module, PyObject *const *args, Py_ssize_t num_args);
PyObject *fc_torch_call(fc_state *state, const char *function, PyObject *const *args, Py_ssize_t num_args,
                        PyObject *keyword_names);
int fc_torch_autocast(fc_call *call);

/* backward.c */
PyObject *fc_py_backward(PyObject *module, PyObject *const *args, Py_ssize_t num_args);

#endif /* FC_BINDING_H */
