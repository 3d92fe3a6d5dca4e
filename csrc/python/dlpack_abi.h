/*
 * dlpack_abi.h - the part of the DLPack 1.3 binary interface that the importers use.
 *
 * Structs and numbers as fixed by the DLPack specification (dmlc.github.io/dlpack); names are our own, since a
 * process may hold several copies of the official header.
 */
#ifndef FC_DLPACK_ABI_H
#define FC_DLPACK_ABI_H

#include <stdint.h>

enum { DL_MAJOR = 1, DL_MINOR = 3 };

enum dl_device_type {
    DL_CPU = 1,
    DL_CUDA = 2,
    DL_CUDA_HOST = 3,    /* pinned: CPU memory */
    DL_CUDA_MANAGED = 13 /* GPU memory that the CPU may touch */
};

enum dl_type_code { DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4, DL_BOOL = 6 };

typedef struct dl_device {
    int32_t type;
    int32_t id;
} dl_device;

typedef struct dl_dtype {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
} dl_dtype;

typedef struct dl_tensor {
    void *data;
    dl_device device;
    int32_t ndim;
    dl_dtype dtype;
    int64_t *shape;
    int64_t *strides; /* elements; NULL from old producers means row-major */
    uint64_t byte_offset;
} dl_tensor;

/* Capsules named "dltensor" hold one of these. */
typedef struct dl_managed {
    dl_tensor tensor;
    void *manager;
    void (*deleter)(struct dl_managed *self);
} dl_managed;

typedef struct dl_version {
    uint32_t major, minor;
} dl_version;

#define DL_FLAG_READ_ONLY UINT64_C(1)

/* Capsules named "dltensor_versioned" hold one of these. Of another major version only the first
 * three fields may be read. */
typedef struct dl_managed_versioned {
    dl_version version;
    void *manager;
    void (*deleter)(struct dl_managed_versioned *self);
    uint64_t flags;
    dl_tensor tensor;
} dl_managed_versioned;

/* What a type's attribute __dlpack_c_exchange_api__ points to. Functions return 0, or -1 with a
 * Python exception set (the allocator reports through set_error instead). */
typedef struct dl_exchange_api {
    dl_version version;
    struct dl_exchange_api *previous;
    int (*allocate)(dl_tensor *prototype, dl_managed_versioned **out, void *context,
                    void (*set_error)(void *context, const char *kind, const char *message));
    int (*managed_from_object)(void *object, dl_managed_versioned **out);
    int (*object_from_managed)(dl_managed_versioned *tensor, void **out); /* takes the tensor over */
    int (*borrow_from_object)(void *object, dl_tensor *out);              /* may be NULL */
    int (*current_stream)(int32_t device_type, int32_t device_id, void **out);
} dl_exchange_api;

#endif /* FC_DLPACK_ABI_H */
