/* cuda.h - in place of the CUDA Toolkit's: what a tensor map says, plainly. */
#ifndef FC_EMULATOR_CUDA_H
#define FC_EMULATOR_CUDA_H

#include "emulator.h"

struct CUtensorMap {
    const unsigned char *data;
    int64_t sizes[4];                      /* column, row, head, batch */
    int64_t strides[4];                    /* bytes */
    int number_bytes, box_bytes, box_rows; /* box_bytes: of a row */
};

#endif /* FC_EMULATOR_CUDA_H */
