/*
 * check_backward.c - the rules on gradients: what fc_attention_backward is given beyond the forward's problem, which
 * check.c checks first and as strictly.
 */
#include <inttypes.h>
#include <string.h>

#include "internal.h"

static fc_status check_dtype(const char *name, const fc_tensor *tensor, const char *like, int32_t dtype)
{
    if (tensor->dtype == dtype) return FC_OK;
    return fc_fail(FC_INVALID, "%s has dtype %s; it must be that of %s, %s", name, fc_dtype_name(tensor->dtype), like,
                   fc_dtype_name(dtype));
}

/* An optional array is absent only as a whole. */
static fc_status check_absent(const char *name, const fc_tensor *tensor)
{
    if (tensor->data == NULL) return FC_OK;
    return fc_fail(FC_INVALID, "%s.data is given, but %s.dtype is not; set it to its fc_dtype", name, name);
}

static fc_status check_gradient(const char *name, const fc_tensor *tensor, const char *like, int32_t dtype,
                                const int64_t shape[4], bool need_data)
{
    if (tensor->dtype == FC_NONE) return check_absent(name, tensor);
    fc_status status = check_dtype(name, tensor, like, dtype);
    if (status != FC_OK) return status;
    return fc_check_output(name, tensor, shape, need_data);
}

/* A gradient that may sum: a dimension of stride 0 has one element. */
static fc_status check_sum(const char *name, const fc_tensor *tensor, const char *like, int32_t dtype,
                           const int64_t shape[4], bool need_data)
{
    int64_t stored[4];
    for (int i = 0; i < 4; i++) stored[i] = tensor->strides[i] == 0 ? 1 : shape[i];
    return check_gradient(name, tensor, like, dtype, stored, need_data);
}

static fc_status check_dbias(const fc_backward_problem *b, const fc_attention_problem *f, bool need_data)
{
    const int64_t shape[4] = {f->batch, f->num_heads_q, f->seqlen_q, f->seqlen_k};
    if (b->dbias.dtype != FC_NONE && (f->attn_mask.dtype == FC_NONE || f->attn_mask.dtype == FC_BOOL))
        return fc_fail(FC_INVALID,
                       "dbias is given, but forward's attn_mask is %s; only a mask that is added to the scores has a "
                       "gradient: leave dbias.dtype FC_NONE",
                       f->attn_mask.dtype == FC_BOOL ? "bool" : "not given");
    return check_sum("dbias", &b->dbias, "attn_mask", f->attn_mask.dtype, shape, need_data);
}

static fc_status check_dsinks(const fc_backward_problem *b, const fc_attention_problem *f, bool need_data)
{
    const int64_t shape[4] = {f->batch, f->num_heads_q, 1, 1};
    if (b->dsinks.dtype != FC_NONE && f->sinks.dtype == FC_NONE)
        return fc_fail(FC_INVALID, "dsinks is given, but forward's sinks are not; leave dsinks.dtype FC_NONE");
    return check_sum("dsinks", &b->dsinks, "sinks", f->sinks.dtype, shape, need_data);
}

static fc_status check_inputs(const fc_backward_problem *b, const fc_attention_problem *f, bool need_data)
{
    const int64_t out[4] = {f->batch, f->num_heads_q, f->seqlen_q, f->head_dim_v};
    const int64_t lse[4] = {f->batch, f->num_heads_q, f->seqlen_q, 1};
    fc_status status;
    if (f->lse.dtype == FC_NONE)
        return fc_fail(FC_INVALID, "forward's lse is not given, and the backward needs it; ask fc_attention_forward "
                                   "for lse and give both calls the same problem");
    if ((status = check_dtype("dout", &b->dout, "query", f->query.dtype)) != FC_OK) return status;
    if ((status = fc_check_tensor("dout", &b->dout, out, need_data)) != FC_OK) return status;
    if (b->dlse.dtype == FC_NONE) return check_absent("dlse", &b->dlse);
    if ((status = check_dtype("dlse", &b->dlse, "lse", f->lse.dtype)) != FC_OK) return status;
    return fc_check_tensor("dlse", &b->dlse, lse, need_data);
}

static fc_status check_outputs(const fc_backward_problem *b, const fc_attention_problem *f, bool need_data)
{
    const int64_t query[4] = {f->batch, f->num_heads_q, f->seqlen_q, f->head_dim};
    const int64_t key[4] = {f->batch, f->num_heads_kv, f->seqlen_k, f->head_dim};
    const int64_t value[4] = {f->batch, f->num_heads_kv, f->seqlen_k, f->head_dim_v};
    int32_t dtype = f->query.dtype;
    fc_status status;
    if ((status = check_gradient("dq", &b->dq, "query", dtype, query, need_data)) != FC_OK) return status;
    if ((status = check_gradient("dk", &b->dk, "query", dtype, key, need_data)) != FC_OK) return status;
    if ((status = check_gradient("dv", &b->dv, "query", dtype, value, need_data)) != FC_OK) return status;
    if ((status = check_dbias(b, f, need_data)) != FC_OK) return status;
    if ((status = check_dsinks(b, f, need_data)) != FC_OK) return status;
    if (b->dalibi_slopes.dtype != FC_NONE || b->dalibi_slopes.data != NULL)
        return fc_fail(FC_INVALID, "dalibi_slopes is given, but alibi_slopes have no gradient here; leave its dtype "
                                   "FC_NONE, or give the slopes' term as an attn_mask and ask for dbias");
    return FC_OK;
}

fc_status fc_check_backward(const fc_backward_problem *given, bool need_data, fc_backward_problem *problem,
                            fc_attention_problem *forward, fc_backward_args *args)
{
    fc_status status = fc_copy_struct("fc_backward_problem", given, problem, sizeof *problem, sizeof *problem);
    if (status != FC_OK) return status;
    const fc_backward_problem *b = problem;
    if (b->forward == NULL)
        return fc_fail(FC_INVALID, "fc_backward_problem.forward is NULL; set it to the problem that "
                                   "fc_attention_forward was given");
    memset(args, 0, sizeof *args);
    if ((status = fc_check(b->forward, need_data, forward, &args->forward)) != FC_OK) return status;
    if ((status = check_inputs(b, forward, need_data)) != FC_OK) return status;
    if ((status = check_outputs(b, forward, need_data)) != FC_OK) return status;
    if ((status = fc_check_blocks(b->block_m, b->block_n)) != FC_OK) return status;

    args->dout = b->dout;
    args->dlse = b->dlse;
    args->dq = b->dq;
    args->dk = b->dk;
    args->dv = b->dv;
    args->dbias = b->dbias;
    args->dsinks = b->dsinks;
    return FC_OK;
}
