/*
 * both_reals.h - compiles FC_CPU_TEMPLATE twice, for float and for double.
 */
#define FC_CPU_REAL       float
#define FC_CPU_REAL_BYTES 4
#include FC_CPU_TEMPLATE

#undef FC_CPU_REAL
#undef FC_CPU_REAL_BYTES
#define FC_CPU_REAL       double
#define FC_CPU_REAL_BYTES 8
#include FC_CPU_TEMPLATE
