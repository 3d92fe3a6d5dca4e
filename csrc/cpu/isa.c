/*
 * isa.c - what this processor can do and how many threads the process should use.
 */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* sched_getaffinity, CPU_COUNT_S */
#endif
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

#include "cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>

/* Leaf 1, ECX bit 29. Older compilers cannot ask __builtin_cpu_supports for it. */
static bool has_f16c(void)
{
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & 1u << 29);
}

/* __builtin_cpu_supports also asks whether the operating system saves the wider registers. */
int32_t fc_cpu_isa(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !has_f16c()) return 0;
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? 2 : 1;
}
#else
int32_t fc_cpu_isa(void)
{
    return 0;
}
#endif

static int32_t affinity_count(void)
{
#if defined(__linux__)
    /* The kernel refuses a set smaller than its own: grow until it fits. */
    for (int cpus = CPU_SETSIZE; cpus <= CPU_SETSIZE << 8; cpus *= 2) {
        cpu_set_t *set = CPU_ALLOC(cpus);
        if (!set) break;
        size_t bytes = CPU_ALLOC_SIZE(cpus);
        int failed = sched_getaffinity(0, bytes, set), error = errno, count = failed ? 0 : CPU_COUNT_S(bytes, set);
        CPU_FREE(set);
        if (count > 0) return count;
        if (error != EINVAL) break;
    }
#endif
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int32_t)online : 1;
}

int32_t fc_cpu_num_threads(void)
{
    const char *wish = getenv("OMP_NUM_THREADS"); /* "4", or a list for nested regions, "4,2": the first counts */
    long threads = wish ? strtol(wish, NULL, 10) : 0;
    if (threads > 0) return threads < INT32_MAX ? (int32_t)threads : INT32_MAX;
    return affinity_count();
}
