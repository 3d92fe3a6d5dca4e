/*
 * arguments.c - from the vector call to a problem's options: which argument is which, and what each may hold.
 *
 * Rules that need only the numbers stand in the C library (check.c); what stands here is what only Python can say:
 * kinds of objects, words such as 'lower_right', None. Nothing of a problem but its options is filled in.
 */
#include <stdio.h>
#include <stdlib.h>

#include "binding.h"

enum { NUM_POSITIONAL = 8 }; /* PyTorch's eight may be given by position */

const char *const fc_argument_names[FC_NUM_ARGS] = {
    "query",      "key",    "value",         "attn_mask", "dropout_p",    "is_causal", "scale",
    "enable_gqa", "window", "diagonal",      "softcap",   "alibi_slopes", "sinks",     "layout",
    "return_lse", "out",    "deterministic", "stream",    "block_m",      "block_n",   "dropout_seed",
};

static int find_parameter(fc_state *state, PyObject *name)
{
    for (int i = 0; i < FC_NUM_ARGS; i++)
        if (state->parameter_names[i] == name) return i;
    for (int i = 0; i < FC_NUM_ARGS; i++) /* a name that was not interned */
        if (PyUnicode_Compare(state->parameter_names[i], name) == 0) return i;
    PyErr_Clear();
    return -1;
}

static int sort_arguments(fc_state *state, fc_arguments *arguments, PyObject *const *args, Py_ssize_t num_args,
                          PyObject *keyword_names)
{
    if (num_args > NUM_POSITIONAL) {
        PyErr_Format(PyExc_TypeError,
                     "attention() takes at most %d positional arguments (%zd given); from 'window' on, name them",
                     NUM_POSITIONAL, num_args);
        return -1;
    }
    for (Py_ssize_t i = 0; i < num_args; i++) arguments->given[i] = args[i];
    Py_ssize_t num_keywords = keyword_names == NULL ? 0 : PyTuple_Size(keyword_names);
    for (Py_ssize_t i = 0; i < num_keywords; i++) {
        PyObject *name = PyTuple_GetItem(keyword_names, i);
        int at = find_parameter(state, name);
        if (at < 0) {
            PyErr_Format(PyExc_TypeError, "attention() got an unexpected keyword argument %R", name);
            return -1;
        }
        if (arguments->given[at] != NULL) {
            PyErr_Format(PyExc_TypeError, "attention() got multiple values for argument %R", name);
            return -1;
        }
        arguments->given[at] = args[num_args + i];
    }
    for (int i = FC_ARG_QUERY; i <= FC_ARG_VALUE; i++)
        if (arguments->given[i] == NULL) {
            PyErr_Format(PyExc_TypeError, "attention() is missing its argument '%s'", fc_argument_names[i]);
            return -1;
        }
    for (int i = FC_ARG_ATTN_MASK; i < FC_NUM_ARGS; i++)
        if (arguments->given[i] == Py_None) {
            arguments->given[i] = NULL;
            arguments->is_none[i] = true;
        }
    return 0;
}

static int refuse_type(const fc_arguments *arguments, enum fc_argument at, const char *allowed)
{
    PyObject *type = PyType_GetQualName(Py_TYPE(arguments->given[at]));
    if (type == NULL) return -1;
    PyErr_Format(PyExc_TypeError, "%s is %R (%U); allowed: %s", fc_argument_names[at], arguments->given[at], type,
                 allowed);
    Py_DECREF(type);
    return -1;
}

/* numpy.bool, which is neither a bool nor an int. */
static bool is_numpy_bool(PyObject *given)
{
    PyObject *name = PyType_GetName(Py_TYPE(given));
    bool found = name != NULL && (PyUnicode_CompareWithASCIIString(name, "bool") == 0 ||
                                  PyUnicode_CompareWithASCIIString(name, "bool_") == 0);
    Py_XDECREF(name);
    PyErr_Clear();
    return found;
}

static int read_bool(const fc_arguments *arguments, enum fc_argument at, bool *value)
{
    PyObject *given = arguments->given[at];
    if (given == NULL) return 0;
    if (PyBool_Check(given)) {
        *value = given == Py_True;
        return 0;
    }
    if (!PyLong_Check(given) && !is_numpy_bool(given))
        return refuse_type(arguments, at, at == FC_ARG_IS_CAUSAL ? "True, False, 'lower_right'" : "True, False");
    int truth = PyObject_IsTrue(given);
    *value = truth == 1;
    return truth < 0 ? -1 : 0;
}

/* As a number it would be one that learns nothing. */
static bool requires_grad(PyObject *given)
{
    if (PyFloat_Check(given) || PyLong_Check(given)) return false;
    PyObject *answer = PyObject_GetAttrString(given, "requires_grad");
    bool does = answer == Py_True;
    Py_XDECREF(answer);
    PyErr_Clear();
    return does;
}

static int read_double(const fc_arguments *arguments, enum fc_argument at, double *value)
{
    if (requires_grad(arguments->given[at])) {
        PyErr_Format(PyExc_TypeError,
                     "%s is a tensor that requires a gradient, and flashcore computes none for it; pass a number, "
                     "%s.item(), and to learn a scale multiply query by it",
                     fc_argument_names[at], fc_argument_names[at]);
        return -1;
    }
    *value = PyFloat_AsDouble(arguments->given[at]);
    if (*value != -1.0 || !PyErr_Occurred()) return 0;
    if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
        PyErr_Clear();
        PyErr_Format(PyExc_ValueError, "%s is an int beyond what a float holds; it must be finite",
                     fc_argument_names[at]);
        return -1;
    }
    if (!PyErr_ExceptionMatches(PyExc_TypeError)) return -1;
    PyErr_Clear();
    return refuse_type(arguments, at, "a number or None");
}

/* An int that must fit 64 bits, from anything with __index__. */
static int read_int64(PyObject *given, const char *name, int64_t *value)
{
    PyObject *index = PyNumber_Index(given);
    if (index == NULL) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_TypeError, "%s is %R; allowed: an int", name, given);
        }
        return -1;
    }
    int overflow;
    *value = PyLong_AsLongLongAndOverflow(index, &overflow);
    Py_DECREF(index);
    if (*value == -1 && PyErr_Occurred()) return -1;
    if (overflow == 0) return 0;
    PyErr_Format(PyExc_ValueError, "%s is %R; allowed: an int of up to 60 bits", name, given);
    return -1;
}

static bool is_word(PyObject *given, const char *word)
{
    return given != NULL && PyUnicode_Check(given) && PyUnicode_CompareWithASCIIString(given, word) == 0;
}

/* One side of window: None and -1 leave it open. */
static int read_side(PyObject *side, const char *name, uint32_t flag, int64_t *value, uint32_t *flags)
{
    if (side == Py_None) return 0;
    if (read_int64(side, name, value) != 0) return -1;
    if (*value == -1) {
        *value = 0;
        return 0;
    }
    *flags |= flag;
    return 0;
}

static int read_window(const fc_arguments *arguments, fc_attention_problem *problem)
{
    static const char allowed[] = "None or a pair (left, right) of ints, None or -1 leaving a side open";
    PyObject *given = arguments->given[FC_ARG_WINDOW];
    if (given == NULL) return 0;
    if (!PyTuple_Check(given) && !PyList_Check(given)) return refuse_type(arguments, FC_ARG_WINDOW, allowed);
    if (PySequence_Size(given) != 2) {
        PyErr_Format(PyExc_ValueError, "window is %R; allowed: %s", given, allowed);
        return -1;
    }
    PyObject *left = PySequence_GetItem(given, 0), *right = PySequence_GetItem(given, 1);
    int error = left == NULL || right == NULL ||
                read_side(left, "window's left side", FC_WINDOW_LEFT, &problem->window_left, &problem->flags) != 0 ||
                read_side(right, "window's right side", FC_WINDOW_RIGHT, &problem->window_right, &problem->flags) != 0;
    Py_XDECREF(left);
    Py_XDECREF(right);
    return error ? -1 : 0;
}

static int read_diagonal(const fc_arguments *arguments, fc_attention_problem *problem)
{
    PyObject *given = arguments->given[FC_ARG_DIAGONAL];
    if (given == NULL) {
        if (arguments->is_none[FC_ARG_DIAGONAL]) {
            PyErr_SetString(PyExc_TypeError, "diagonal is None; allowed: an int or 'lower_right'");
            return -1;
        }
        return 0;
    }
    if (PyUnicode_Check(given)) {
        if (!is_word(given, "lower_right")) {
            PyErr_Format(PyExc_ValueError, "diagonal is %R; allowed: an int or 'lower_right'", given);
            return -1;
        }
        problem->flags |= FC_LOWER_RIGHT;
        return 0;
    }
    return read_int64(given, "diagonal", &problem->diagonal);
}

static int read_causal(const fc_arguments *arguments, fc_attention_problem *problem)
{
    PyObject *given = arguments->given[FC_ARG_IS_CAUSAL];
    bool causal = false;
    if (given != NULL && PyUnicode_Check(given)) {
        if (!is_word(given, "lower_right")) {
            PyErr_Format(PyExc_ValueError, "is_causal is %R; allowed: True, False, 'lower_right'", given);
            return -1;
        }
        if (arguments->given[FC_ARG_DIAGONAL] != NULL && !is_word(arguments->given[FC_ARG_DIAGONAL], "lower_right")) {
            PyErr_Format(PyExc_ValueError, "is_causal is 'lower_right' and diagonal is %R; give one of them",
                         arguments->given[FC_ARG_DIAGONAL]);
            return -1;
        }
        problem->flags |= FC_CAUSAL | FC_LOWER_RIGHT;
        return 0;
    }
    if (read_bool(arguments, FC_ARG_IS_CAUSAL, &causal) != 0) return -1;
    if (causal) problem->flags |= FC_CAUSAL;
    return 0;
}

static int read_block(const fc_arguments *arguments, enum fc_argument at, int32_t *block)
{
    if (arguments->given[at] == NULL) return 0;
    int64_t value;
    if (read_int64(arguments->given[at], fc_argument_names[at], &value) != 0) return -1;
    if (value < 1 || value > INT32_MAX) {
        PyErr_Format(PyExc_ValueError,
                     "%s is %lld; allowed: None to let the library choose, or a size that explain() names",
                     fc_argument_names[at], (long long)value);
        return -1;
    }
    *block = (int32_t)value;
    return 0;
}

static int read_dropout(const fc_arguments *arguments, fc_attention_problem *problem)
{
    if (arguments->given[FC_ARG_DROPOUT_P] == NULL) return 0;
    if (read_double(arguments, FC_ARG_DROPOUT_P, &problem->dropout_p) != 0) return -1;
    if (problem->dropout_p >= 0 && problem->dropout_p <= 1) return 0;
    PyErr_Format(PyExc_ValueError, "dropout_p is %R; allowed: 0.0 to 1.0", arguments->given[FC_ARG_DROPOUT_P]);
    return -1;
}

/* Options into problem->flags and fields. The GIL is held, so nobody's os.environ can change under getenv. */
static int read_options(fc_arguments *arguments, fc_attention_problem *problem)
{
    bool grouped = false, deterministic = false; /* grouped heads need no word here; PyTorch's flag is accepted */
    if (read_dropout(arguments, problem) != 0 || read_causal(arguments, problem) != 0 ||
        read_diagonal(arguments, problem) != 0 || read_window(arguments, problem) != 0 ||
        read_bool(arguments, FC_ARG_ENABLE_GQA, &grouped) != 0 ||
        read_bool(arguments, FC_ARG_RETURN_LSE, &arguments->return_lse) != 0 ||
        read_bool(arguments, FC_ARG_DETERMINISTIC, &deterministic) != 0 ||
        read_block(arguments, FC_ARG_BLOCK_M, &problem->block_m) != 0 ||
        read_block(arguments, FC_ARG_BLOCK_N, &problem->block_n) != 0)
        return -1;
    if (deterministic) problem->flags |= FC_DETERMINISTIC;
    if (arguments->given[FC_ARG_SCALE] != NULL) {
        if (read_double(arguments, FC_ARG_SCALE, &problem->scale) != 0) return -1;
        problem->flags |= FC_SCALE;
    }
    if (arguments->given[FC_ARG_SOFTCAP] != NULL && read_double(arguments, FC_ARG_SOFTCAP, &problem->softcap) != 0)
        return -1;
    const char *forced = getenv("FLASHCORE_FORCE");
    if (forced != NULL && forced[0] != '\0') {
        snprintf(arguments->forced_kernel, sizeof arguments->forced_kernel, "%s", forced);
        problem->kernel = arguments->forced_kernel;
    }
    return 0;
}

static int read_layout(fc_arguments *arguments)
{
    PyObject *given = arguments->given[FC_ARG_LAYOUT];
    arguments->heads_inside = is_word(given, "bshd");
    if (given == NULL || arguments->heads_inside || is_word(given, "bhsd")) return 0;
    PyErr_Format(
        PyUnicode_Check(given) ? PyExc_ValueError : PyExc_TypeError,
        "layout is %R; allowed: 'bhsd' (batch, heads, sequence, head_dim), 'bshd' (batch, sequence, heads, head_dim)",
        given);
    return -1;
}

int fc_arguments_read(fc_state *state, PyObject *const *args, Py_ssize_t num_args, PyObject *keyword_names,
                      fc_arguments *arguments, fc_attention_problem *problem)
{
    if (sort_arguments(state, arguments, args, num_args, keyword_names) != 0) return -1;
    if (read_layout(arguments) != 0) return -1;
    return read_options(arguments, problem);
}
