/*
 * error.c - status codes and the words that go with them, and the small facts about dtypes that every
 * message needs.
 */
#include <stdarg.h>
#include <stdio.h>

#include "internal.h"

/* The longest message names two shapes and a rule; a longer one is cut, never overrun. */
static _Thread_local char last_error[2048];

fc_status fc_fail(fc_status status, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    vsnprintf(last_error, sizeof last_error, format, values);
    va_end(values);
    return status;
}

const char *fc_last_error(void)
{
    return last_error;
}

const char *fc_version(void)
{
    return FC_VERSION;
}

#ifndef FC_REVISION
#define FC_REVISION "unknown" /* setup.py gives a digest */
#endif

const char *fc_revision(void)
{
    return FC_REVISION;
}

const char *fc_status_name(fc_status status)
{
    switch (status) {
    case FC_OK:
        return "FC_OK";
    case FC_INVALID:
        return "FC_INVALID";
    case FC_UNSUPPORTED:
        return "FC_UNSUPPORTED";
    case FC_NO_DEVICE:
        return "FC_NO_DEVICE";
    case FC_OUT_OF_MEMORY:
        return "FC_OUT_OF_MEMORY";
    case FC_CUDA_ERROR:
        return "FC_CUDA_ERROR";
    }
    return "unknown status";
}

static const struct {
    const char *name;
    int32_t bytes;
} dtypes[] = {
    [FC_NONE] = {"none", 0},       [FC_FLOAT16] = {"float16", 2}, [FC_BFLOAT16] = {"bfloat16", 2},
    [FC_FLOAT32] = {"float32", 4}, [FC_FLOAT64] = {"float64", 8}, [FC_BOOL] = {"bool", 1},
};

static bool is_known(int32_t dtype)
{
    return dtype >= 0 && dtype < (int32_t)(sizeof dtypes / sizeof dtypes[0]);
}

const char *fc_dtype_name(int32_t dtype)
{
    return is_known(dtype) ? dtypes[dtype].name : "unknown";
}

int32_t fc_dtype_bytes(int32_t dtype)
{
    return is_known(dtype) ? dtypes[dtype].bytes : 0;
}
