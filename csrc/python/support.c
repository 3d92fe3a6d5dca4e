/*
 * support.c - what every file of the extension leans on: facts of dtypes, and the way to flashcore/_interop.py.
 */
#include <string.h>

#include "binding.h"

static const struct {
    const char *word;
    int32_t bytes;
    dl_dtype dl;
} dtypes[] = {
    [FC_NONE] = {"none", 0, {0, 0, 0}},
    [FC_FLOAT16] = {"float16", 2, {DL_FLOAT, 16, 1}},
    [FC_BFLOAT16] = {"bfloat16", 2, {DL_BFLOAT, 16, 1}},
    [FC_FLOAT32] = {"float32", 4, {DL_FLOAT, 32, 1}},
    [FC_FLOAT64] = {"float64", 8, {DL_FLOAT, 64, 1}},
    [FC_BOOL] = {"bool", 1, {DL_BOOL, 8, 1}},
};
enum { NUM_DTYPES = sizeof dtypes / sizeof dtypes[0] };

const char *fc_dtype_word(int32_t dtype)
{
    return dtypes[dtype].word;
}

int32_t fc_dtype_size(int32_t dtype)
{
    return dtypes[dtype].bytes;
}

dl_dtype fc_dtype_to_dl(int32_t dtype)
{
    return dtypes[dtype].dl;
}

int32_t fc_dtype_from_dl(dl_dtype dtype)
{
    for (int32_t i = 1; i < NUM_DTYPES; i++)
        if (dtypes[i].dl.code == dtype.code && dtypes[i].dl.bits == dtype.bits && dtype.lanes == 1) return i;
    return FC_NONE;
}

int32_t fc_dtype_of_seed(int bits)
{
    return bits == 64 ? FC_FLOAT64 : bits == 32 ? FC_FLOAT32 : FC_NONE;
}

const char *fc_allowed_dtypes(const fc_array *array)
{
    if (array->is_seed) return "two integers of 64 bits, or four of 32";
    if (strcmp(array->name, fc_argument_names[FC_ARG_ATTN_MASK]) == 0)
        return "bool (True: attend), or query's dtype or float32, added to the score. A tokenizer's mask of 0 and 1, "
               "(batch, keys), is mask.bool()[:, None, None, :] here";
    return "float16, bfloat16, float32, float64";
}

PyObject *fc_interop(fc_state *state, const char *function)
{
    if (state->interop == NULL) {
        state->interop = PyImport_ImportModule("flashcore._interop");
        if (state->interop == NULL) return NULL;
    }
    return PyObject_GetAttrString(state->interop, function);
}
