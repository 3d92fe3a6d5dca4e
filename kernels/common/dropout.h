/*
 * dropout.h - dropout's random numbers, of which every kernel makes the same ones, in either direction.
 *
 * The generator is Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"), a function from
 * a counter and a key to four random words. flashcore.h says how it is used: each head of a call has a key of its own,
 * and the number of (row, column) is then a function of these two. It does not know tiles, threads or kernels.
 *
 * The trick: the four words are those of columns 16 apart. On a CPU the lanes are neighbouring rows or columns, which
 * so take the same word of neighbouring draws; on a GPU a thread holds columns that are 8 or 16 apart. Neither draws a
 * word that it has no use for, or has to sort them.
 *
 * In the part of C that CUDA has too.
 */
#ifndef FC_COMMON_DROPOUT_H
#define FC_COMMON_DROPOUT_H

#include "kernels.h"

#ifdef __CUDACC__
#define FC_EVERYWHERE static __host__ __device__ __forceinline__
#else
#define FC_EVERYWHERE static inline __attribute__((always_inline))
#endif

/* A draw is of FC_DRAW_COLUMNS columns, the first a multiple of it; lane i of it gives i, i + 16, i + 32, i + 48. */
enum { FC_DRAW_LANES = 16, FC_DRAW_WORDS = 4, FC_DRAW_COLUMNS = FC_DRAW_LANES * FC_DRAW_WORDS };

typedef struct fc_random {
    uint32_t word[FC_DRAW_WORDS];
} fc_random;

FC_EVERYWHERE fc_random fc_philox(fc_random counter, uint32_t key_0, uint32_t key_1)
{
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * counter.word[0], b = (uint64_t)0xCD9E8D57u * counter.word[2];
        uint32_t word_1 = counter.word[1], word_3 = counter.word[3];
        counter.word[0] = (uint32_t)(b >> 32) ^ word_1 ^ key_0;
        counter.word[1] = (uint32_t)b;
        counter.word[2] = (uint32_t)(a >> 32) ^ word_3 ^ key_1;
        counter.word[3] = (uint32_t)a;
        key_0 += 0x9E3779B9u; /* 2^32 times the golden ratio, and sqrt(3) - 1 */
        key_1 += 0xBB67AE85u;
    }
    return counter;
}

/* Of two 64-bit numbers. */
FC_EVERYWHERE fc_random fc_philox_of(uint64_t low, uint64_t high, uint32_t key_0, uint32_t key_1)
{
    fc_random counter = {{(uint32_t)low, (uint32_t)(low >> 32), (uint32_t)high, (uint32_t)(high >> 32)}};
    return fc_philox(counter, key_0, key_1);
}

/* A head's key: the first two words. */
FC_EVERYWHERE fc_random fc_draw_key(const fc_forward_args *args, int64_t batch, int64_t head)
{
    uint64_t seed = args->dropout_seed[0], offset = args->dropout_seed[1];
    uint64_t number = (uint64_t)(args->first_batch + batch) * (uint64_t)args->num_heads_q + (uint64_t)head;
    return fc_philox_of(offset, number, (uint32_t)seed, (uint32_t)(seed >> 32));
}

/* The numbers of columns first + lane + 0, 16, 32, 48 of a row. first: a multiple of FC_DRAW_COLUMNS. A weight is kept
 * where its number is below args->keep_below. */
FC_EVERYWHERE fc_random fc_draw(uint32_t key_0, uint32_t key_1, int64_t row, int64_t first, int lane)
{
    return fc_philox_of((uint64_t)(first / FC_DRAW_WORDS + lane), (uint64_t)row, key_0, key_1);
}

#endif /* FC_COMMON_DROPOUT_H */
