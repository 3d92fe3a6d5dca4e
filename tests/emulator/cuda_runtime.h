/* cuda_runtime.h - in place of the CUDA Toolkit's. */
#include "emulator.h"
