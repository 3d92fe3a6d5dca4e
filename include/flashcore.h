/*
 * flashcore.h - the public C API of FlashCore: exact attention on CPUs and NVIDIA GPUs.
 *
 * One call does everything: fill an fc_attention_problem, hand it to fc_attention_forward. The library
 * is plain C, links no framework, and starts no GPU context before the first CUDA problem.
 *
 *     fc_attention_problem p = {.struct_size = sizeof p, .device_type = FC_CPU};
 *     p.batch = 1; p.num_heads_q = p.num_heads_kv = 8; ...
 *     p.query = (fc_tensor){.data = q, .strides = {8 * 128 * 64, 128 * 64, 64, 1}, .dtype = FC_FLOAT32};
 *     ...
 *     if (fc_attention_forward(&p, NULL, 0, NULL) != FC_OK) puts(fc_last_error());
 *
 * What is computed, for query row i and key j of one head:
 *
 *     score = softcap(scale * q_i . k_j) + attn_mask_ij - slope * |j - i - diagonal|
 *     out_i = sum_j softmax_j(score) v_j          over the keys that band and bool mask leave visible
 *     lse_i = log(sum_j exp(score_j))             natural logarithm
 *
 * with softcap(x) = softcap * tanh(x / softcap) where a softcap is given, and a sink, where given, one
 * more logit in every row's sum that has no value vector. The formula is that of "Attention Is All You
 * Need" (Vaswani et al., 2017, eq. 1); it is evaluated tile by tile as in FlashAttention (Dao et al.,
 * 2022), so memory is linear in the sequence length. Sums are float32 (float64 for float64 arrays).
 * A row that sees no key gives out 0, and lse -inf (with a sink: the sink); never NaN.
 *
 * Dropout (Srivastava et al., 2014), where dropout_p is not 0, comes after the softmax, and lse knows nothing of it:
 *
 *     out_i = sum_j drop_ij softmax_j(score) v_j       drop_ij = 1 / (1 - dropout_p) where x_ij < keep, else 0
 *     keep  = (1 - dropout_p) 2^32, rounded, at most 2^32 - 1; with dropout_p = 1 nothing is kept, and out is 0
 *
 * x_ij is a random 32-bit number, a function of seed, offset, batch, head, row i and column j alone: the same in each
 * kernel, on each device, in both directions. Of Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy
 * as 1, 2, 3"), with P(c, k) its four words for counter c and key k, a 64-bit number standing for two words, low first:
 *
 *     key  = the first two words of P((offset, (first_batch + batch) * num_heads_q + head), seed)
 *     x_ij = word j / 16 % 4 of P((j / 64 * 16 + j % 16, i), key)
 *
 * Rules for all of it:
 * - Every struct but fc_tensor begins with its own size. Zero in any field means the default. A newer caller's larger
 *   struct is accepted as long as the part this library does not know is all zero.
 * - Strides count elements, not bytes, and may be zero (repeat) or negative. No field is in bytes
 *   unless its name says so.
 * - The caller owns every array. Nothing is kept after a call returns, except that a GPU still reads
 *   and writes the arrays until the stream's work is done.
 * - Functions return a status; fc_last_error() has the words. Nothing exits the process.
 * - All functions may be called from any thread at any time.
 */
#ifndef FLASHCORE_H
#define FLASHCORE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FC_VERSION "0.1.0"

#if defined(__GNUC__)
#define FC_API __attribute__((visibility("default")))
#else
#define FC_API
#endif

typedef enum fc_status {
    FC_OK = 0,
    FC_INVALID = 1,       /* an argument is wrong: shape, stride, dtype, option, null pointer */
    FC_UNSUPPORTED = 2,   /* legal, but no kernel in this build serves it here */
    FC_NO_DEVICE = 3,     /* no such device: no GPU, no driver or one too old, or built without CUDA */
    FC_OUT_OF_MEMORY = 4, /* scratch memory could not be had */
    FC_CUDA_ERROR = 5,    /* the CUDA runtime reported an error */
} fc_status;

/* The numbers are the library's own; zero means "no tensor here". */
typedef enum fc_dtype {
    FC_NONE = 0,
    FC_FLOAT16 = 1,
    FC_BFLOAT16 = 2,
    FC_FLOAT32 = 3,
    FC_FLOAT64 = 4, /* CPU only */
    FC_BOOL = 5,    /* one byte, zero or not; masks only */
} fc_dtype;

/* DLPack's numbers. */
typedef enum fc_device_type {
    FC_CPU = 1,
    FC_CUDA = 2,
} fc_device_type;

/*
 * One array, by value. `data` points at element (0, 0, 0, 0), not at the lowest address.
 * Data must be aligned to its element size; 16-byte alignment and a last stride of 1 are the fast case.
 * This struct is part of others and never grows.
 */
typedef struct fc_tensor {
    void *data;         /* inputs are never written; may be null where the array has no elements */
    int64_t strides[4]; /* elements, of (batch, head, row, column) */
    int32_t dtype;      /* fc_dtype; FC_NONE: not given */
    int32_t reserved;   /* 0 */
} fc_tensor;

/* Bits of fc_attention_problem.flags. */
#define FC_CAUSAL        (1u << 0) /* hide keys with d > 0, d = j - i - diagonal */
#define FC_LOWER_RIGHT   (1u << 1) /* diagonal is seqlen_k - seqlen_q; the field must be 0 */
#define FC_WINDOW_LEFT   (1u << 2) /* hide keys with d < -window_left */
#define FC_WINDOW_RIGHT  (1u << 3) /* hide keys with d > window_right */
#define FC_SCALE         (1u << 4) /* use the field `scale`, whatever it holds; else 1/sqrt(head_dim) */
#define FC_DETERMINISTIC (1u << 5) /* a row's bits do not depend on the batch around it, of arrays that lie alike */

typedef struct fc_attention_problem {
    uint64_t struct_size; /* sizeof(fc_attention_problem) */
    int32_t device_type;  /* fc_device_type, where every array lives */
    int32_t device_id;    /* CUDA ordinal; 0 for the CPU */

    /* Each may be 0 but the two head dimensions. */
    int64_t batch;
    int64_t num_heads_q; /* a multiple of num_heads_kv: query head h reads kv head h / (q / kv) */
    int64_t num_heads_kv;
    int64_t seqlen_q;
    int64_t seqlen_k;
    int64_t head_dim;   /* of query and key, 1 to 256; more is FC_UNSUPPORTED */
    int64_t head_dim_v; /* of value and out, 1 to 256 */

    fc_tensor query;        /* [batch, num_heads_q, seqlen_q, head_dim]; float16, bfloat16, float32, float64 */
    fc_tensor key;          /* [batch, num_heads_kv, seqlen_k, head_dim], query's dtype */
    fc_tensor value;        /* [batch, num_heads_kv, seqlen_k, head_dim_v], query's dtype */
    fc_tensor out;          /* [batch, num_heads_q, seqlen_q, head_dim_v], query's dtype; no two elements at
                               one address, no overlap with an input (the library cannot see that; you can) */
    fc_tensor lse;          /* optional: [batch, num_heads_q, seqlen_q] float32 (float64 for float64) */
    fc_tensor attn_mask;    /* optional: [batch, num_heads_q, seqlen_q, seqlen_k], broadcast by stride 0;
                               bool (true = attend), or query's dtype or float32, added to the score */
    fc_tensor alibi_slopes; /* optional: [batch, num_heads_q]; query's dtype or float32 */
    fc_tensor sinks;        /* optional: [batch, num_heads_q]; query's dtype or float32; a logit */

    uint32_t flags;
    int32_t block_m;      /* force this tile: query rows; 0 lets the planner choose */
    int32_t block_n;      /* force this tile: keys */
    int32_t num_threads;  /* CPU threads at most; 0: OMP_NUM_THREADS, else the affinity mask */
    double scale;         /* finite, also as float32 (of float64 arrays, float64); read only with FC_SCALE */
    double softcap;       /* > 0 and finite, likewise, and so is scale / softcap; 0 for none */
    int64_t window_left;  /* >= 0, read only with FC_WINDOW_LEFT */
    int64_t window_right; /* >= 0, read only with FC_WINDOW_RIGHT */
    int64_t diagonal;     /* d = j - i - diagonal; 0 is PyTorch's (upper left) */
    const char *kernel;   /* force this kernel or family, by the name fc_kernel_name gives; NULL: choose */

    double dropout_p;             /* 0 to 1: how likely a weight is dropped; 0: none */
    const uint64_t *dropout_seed; /* two numbers, seed and offset, on the problem's device, 8-byte aligned; read only
                                     where dropout_p is not 0, and on a GPU when the kernel runs: the replay of a CUDA
                                     graph sees what was written there since. No two calls should share both */
    int64_t first_batch;          /* what batch 0 is called in dropout's numbers: for a problem that is computed in
                                     several calls, the batches of the calls before */
} fc_attention_problem;

/*
 * Device facts, all that planning knows of a device. fc_device_query fills one; tests and cross-device
 * planning may write one by hand.
 */
typedef struct fc_device {
    uint64_t struct_size;
    int32_t type; /* fc_device_type */
    int32_t id;
    char name[64];
    int32_t compute_capability; /* CUDA: 10 * major + minor, 90 for Hopper */
    int32_t num_sms;
    int32_t smem_bytes_per_block; /* the most one block may ask for */
    int32_t driver_version;       /* CUDA: as cuDriverGetVersion, 13000 for 13.0 */
    int32_t isa;                  /* CPU: 0 baseline, 1 AVX2 with FMA and F16C, 2 AVX-512 (F, BW, DQ, VL) */
    int32_t num_threads;          /* CPU: what OMP_NUM_THREADS or the affinity mask gives */
    int64_t l2_bytes;
} fc_device;

/* Reasons why a plan is not the fast path; fc_plan.slow is a set of these bits. */
#define FC_SLOW_NO_FAST_KERNEL (1u << 0) /* a portable kernel serves what this architecture's own cannot */
#define FC_SLOW_BACKWARD       (1u << 1) /* a portable backward, as every GPU's is in this version */

/* What will run. fc_attention_plan fills one. */
typedef struct fc_plan {
    uint64_t struct_size;
    uint64_t workspace_bytes; /* device scratch that the call needs; 0: none */
    int32_t kernel;           /* index for fc_kernel_name */
    int32_t block_m;          /* query rows per tile */
    int32_t block_n;          /* keys per tile */
    int32_t num_splits;       /* ways the keys of one row are divided; 1: not */
    int32_t num_threads;      /* CPU threads at most (a small call wakes none), or CUDA threads per block */
    uint32_t slow;            /* FC_SLOW_* bits */
    int64_t num_tiles;        /* tiles of the output: tasks on the CPU */
    int64_t num_blocks;       /* thread blocks of the launch on a GPU, of which some may have no tile; 0 on the CPU */
    int32_t tuned;            /* 1: fc_tuned_add's choice, not the planner's own */
    int32_t reserved;         /* 0 */
} fc_plan;

/* "0.1.0", of the library that is loaded; FC_VERSION is that of the header. */
FC_API const char *fc_version(void);

/* A digest of the sources, compiler and architectures of this build: what is measured on one may not hold on another.
 */
FC_API const char *fc_revision(void);

/* "FC_OK", "FC_INVALID", ...; never NULL. */
FC_API const char *fc_status_name(fc_status status);

/*
 * Words for this thread's last failed call: what was given, what is allowed, what to do. Valid until
 * the thread's next call into the library; "" when nothing failed yet.
 */
FC_API const char *fc_last_error(void);

/* Kernels in this build, 0 to fc_kernel_count() - 1; the name of one, and of its family, "cpu", "portable", "hopper" or
 * "hopper_short", which its name begins with. NULL past the end. A family's kernels differ in what they serve. */
FC_API int32_t fc_kernel_count(void);
FC_API const char *fc_kernel_name(int32_t kernel);
FC_API const char *fc_kernel_family(int32_t kernel);

/* 1 where a device of these facts can run the kernel, else 0. */
FC_API int32_t fc_kernel_runs_on(int32_t kernel, const fc_device *device);

/* Device architectures that the CUDA kernels were built for, "80 90a 75+PTX"; "" for a CPU-only build. */
FC_API const char *fc_cuda_archs(void);

/* Number of usable CUDA devices; 0 with the reason in fc_last_error() where there is none. */
FC_API int32_t fc_cuda_device_count(void);

/*
 * Facts of one device, cached after the first call. device->struct_size must be set.
 * FC_NO_DEVICE where there is none, or the build has no CUDA kernels.
 */
FC_API fc_status fc_device_query(int32_t device_type, int32_t device_id, fc_device *device);

/*
 * Checks a problem and says what would run, touching no array and launching nothing.
 * device NULL asks for the problem's own device; with a device given, no GPU is needed.
 * plan->struct_size must be set. Array data pointers may be null here.
 * FC_INVALID for a problem that is wrong, FC_UNSUPPORTED for one that no kernel serves.
 */
FC_API fc_status fc_attention_plan(const fc_attention_problem *problem, const fc_device *device, fc_plan *plan);

/*
 * Writes one sentence on the plan to buffer: kernel, tiles, splits, workspace and why. At most size
 * bytes with the final zero; returns the length it wanted, as snprintf does.
 */
FC_API int fc_plan_describe(const fc_attention_problem *problem, const fc_device *device, const fc_plan *plan,
                            char *buffer, size_t size);

/*
 * Computes attention. On the CPU it returns when out is written; on a GPU it enqueues on `stream` (a
 * cudaStream_t; NULL is the legacy default stream) of problem->device_id and returns at once, without
 * synchronizing, also inside a stream capture. The calling thread's current CUDA device is unchanged.
 * workspace: at least plan.workspace_bytes on the device, 256-byte aligned, in use until the stream's work is
 * done; may be NULL where the plan asks for none.
 */
FC_API fc_status fc_attention_forward(const fc_attention_problem *problem, void *workspace, uint64_t workspace_bytes,
                                      void *stream);

/*
 * The same with a plan that fc_attention_plan made for the problem, which spares its making: of all kernels only the
 * plan's is looked at. Arrays may have moved since, by multiples of 16 bytes; a plan of another problem is FC_INVALID
 * where its kernel does not serve this one, and else no more than slow.
 */
FC_API fc_status fc_attention_run(const fc_attention_problem *problem, const fc_plan *plan, void *workspace,
                                  uint64_t workspace_bytes, void *stream);

/*
 * Tuning: which kernel serves a problem best on this device can be measured, and the planner told. Nothing is ever
 * measured but by fc_attention_measure. A tuner asks for the candidates of a problem, measures each with the problem's
 * kernel forced, and adds the fastest under the problem's class.
 */

/*
 * The class of a problem: a number that problems share which differ so little that one choice serves all. Its bits
 * are the dtype, the options, the band, and sizes in steps (docs/tuning.md); they stay what they are within one
 * fc_revision(). words: NULL, or room for its description, cut at size bytes. Array data pointers may be null.
 */
FC_API fc_status fc_attention_class(const fc_attention_problem *problem, uint64_t *shape_class, char *words,
                                    size_t size);

/*
 * Everything that could run a problem on a device: the planner's own choice (whatever is tuned) first, then the other
 * kernels in their order. *count is how many there are, of which at most `capacity` are written to plans; of each, the
 * struct_size must be set. A forced kernel or block leaves those that fit it. Otherwise as fc_attention_plan.
 */
FC_API fc_status fc_attention_candidates(const fc_attention_problem *problem, const fc_device *device, fc_plan *plans,
                                         int32_t capacity, int32_t *count);

/*
 * Computes attention as fc_attention_forward does, num_calls times and more, and says how long one call takes. On a
 * GPU that is device time, of a CUDA graph of num_calls calls on a stream of its own, after `stream`'s work; on the
 * CPU it is wall time. Returns when all is done; inside a stream capture it fails.
 */
FC_API fc_status fc_attention_measure(const fc_attention_problem *problem, void *workspace, uint64_t workspace_bytes,
                                      void *stream, int32_t num_calls, double *microseconds);

/*
 * From now on problems of this class on such a device (its name, capability, number of multiprocessors and isa count)
 * run on this kernel, wherever it serves them, in all threads; a later choice for the class replaces it. Problems
 * that force a kernel or a block, or say FC_DETERMINISTIC, ignore it. All else of their plans, splits too, is the
 * planner's. There is room for about 2,000 classes; FC_OUT_OF_MEMORY then.
 */
FC_API fc_status fc_tuned_add(const fc_device *device, uint64_t shape_class, const char *kernel);

/* Forgets all choices. */
FC_API void fc_tuned_clear(void);

/*
 * The backward pass: from the gradient of a loss with respect to out, and to lse where that was used too, the
 * gradients with respect to the inputs. For query row i and key j of one head, with the scores of above:
 *
 *     p_ij    = exp(score_ij - lse_i)                  recomputed tile by tile, so memory stays linear
 *     delta_i = dout_i . out_i - dlse_i
 *     ds_ij   = p_ij (dout_i . v_j - delta_i)          the gradient of the score; 0 where the key is hidden
 *     dr_ij   = scale (1 - tanh^2) ds_ij               that of q_i . k_j; the tanh is softcap's, where given
 *
 *     dq_i    = sum_j dr_ij k_j        dk_j    = sum_i dr_ij q_i        dv_j    = sum_i p_ij dout_i
 *     dbias_ij = ds_ij                 dsink   = - sum_i exp(sink - lse_i) delta_i
 *
 * With dropout, the same drop_ij as in the forward, and all else as it stands:
 *
 *     ds_ij   = p_ij (drop_ij dout_i . v_j - delta_i)      dv_j = sum_i drop_ij p_ij dout_i
 *
 * (FlashAttention's backward; dout is the literature's dO, a name that C has taken.) dk and dv sum over the query
 * heads that share a key/value head. A row that sees no key gives zero gradients, whatever its dout holds; never NaN.
 *
 * Which gradients are computed is said by which arrays are given: one whose dtype is FC_NONE is neither computed nor
 * written, and costs nothing. What is given is overwritten, every element of it; nothing is added to what it held.
 * Results are bitwise repeatable, and on the CPU the same whatever num_threads is. A gradient's bits do not depend on
 * which others are wanted.
 */
typedef struct fc_backward_problem {
    uint64_t struct_size; /* sizeof(fc_backward_problem) */

    /* The problem as fc_attention_forward was given it, every option included. Its out and lse, which that call
     * wrote, are read here, so lse must have been asked for. Its kernel, block_m and block_n chose a forward kernel
     * and are not read. It is read during the call and belongs to the caller. With dropout, what dropout_seed points
     * at must hold what the forward read there. */
    const fc_attention_problem *forward;

    fc_tensor dout; /* [batch, num_heads_q, seqlen_q, head_dim_v], query's dtype; any strides, 0 too */
    fc_tensor dlse; /* optional: [batch, num_heads_q, seqlen_q], lse's dtype; not given: lse took no part in the loss */

    /* All optional. No two elements of one at one address but as said; no overlap with an input or each other. */
    fc_tensor dq;     /* [batch, num_heads_q, seqlen_q, head_dim], query's dtype */
    fc_tensor dk;     /* [batch, num_heads_kv, seqlen_k, head_dim], query's dtype */
    fc_tensor dv;     /* [batch, num_heads_kv, seqlen_k, head_dim_v], query's dtype */
    fc_tensor dbias;  /* [batch, num_heads_q, seqlen_q, seqlen_k], of an attn_mask that is added; attn_mask's dtype.
                         A stride of 0 means one element, with the sum over that dimension: give the gradient of a
                         broadcast mask the mask's own shape and strides */
    fc_tensor dsinks; /* [batch, num_heads_q], sinks' dtype; a stride of 0 likewise */
    fc_tensor dalibi_slopes; /* must not be given: slopes are constants, and asking is refused rather than ignored */

    int32_t block_m;    /* force this tile of the backward: query rows; 0 lets the planner choose */
    int32_t block_n;    /* force this tile: keys */
    const char *kernel; /* force this kernel or family, by the name fc_kernel_name gives; NULL: choose */
} fc_backward_problem;

/*
 * fc_attention_plan for the backward: checks a problem and says what would run, touching no array. In *plan,
 * workspace_bytes is what fc_attention_backward needs: O(seqlen), and on the CPU once more the elements of a dbias that
 * sums; kernel is that whose backward runs, and block_m, block_n its tile. fc_plan_describe, given problem->forward,
 * says it in words.
 */
FC_API fc_status fc_attention_backward_plan(const fc_backward_problem *problem, const fc_device *device, fc_plan *plan);

/*
 * Computes the gradients; when it returns, and what `stream` means, are as for fc_attention_forward.
 * workspace: at least plan.workspace_bytes, on the arrays' device, 256-byte aligned (64 on the CPU), in use until the
 * call's work is done; what it holds before and after means nothing. The caller owns it; fc_malloc gives one.
 */
FC_API fc_status fc_attention_backward(const fc_backward_problem *problem, void *workspace, uint64_t workspace_bytes,
                                       void *stream);

/* The GPU that an address belongs to; FC_INVALID for an address that is no GPU's. NULL gives 0. */
FC_API fc_status fc_pointer_device(const void *data, int32_t *device_id);

/*
 * Makes later work on `later` wait for all work now on `earlier`, on one CUDA device, by an event: no
 * synchronization, legal in a capture that holds either. Does nothing when they are the same stream.
 */
FC_API fc_status fc_stream_order(int32_t device_id, void *earlier, void *later);

/*
 * Memory for results whose owner has no allocator of its own. On the CPU it is 64-byte aligned; on a
 * GPU it is stream-ordered (cudaMallocAsync), and freeing it waits for the work on its stream.
 */
FC_API fc_status fc_malloc(int32_t device_type, int32_t device_id, uint64_t bytes, void *stream, void **data);
FC_API fc_status fc_free(int32_t device_type, int32_t device_id, void *data, void *stream);

#ifdef __cplusplus
}
#endif

#endif /* FLASHCORE_H */
