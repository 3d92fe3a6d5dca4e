/*
 * pool.c - runs numbered tasks on the caller and on worker threads that are kept between calls.
 *
 * One job at a time has the workers; a caller that finds them taken does its own work alone. A job offers
 * `seats`; a worker that takes one draws task numbers from the job's counter until they run out. The trick
 * is the order of two counters: a worker raises `active` before it tries for a seat, and the caller takes the
 * seats away before it waits for `active` to fall to zero, so that no worker can enter a job that is over.
 *
 * Workers are detached and sleep for ever when nobody calls. A forked child has none of its parent's
 * threads: it forgets them and makes its own when it needs them.
 */
#if defined(__linux__)
#define _GNU_SOURCE /* sched_getcpu, pthread_setaffinity_np */
#endif
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "cpu.h"

#if defined(__x86_64__)
#define pause_briefly() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define pause_briefly() __asm__ __volatile__("yield")
#else
#define pause_briefly() ((void)0)
#endif

/* Polls before a thread sleeps: a pause is 40 to 140 cycles, so some 5 to 20 microseconds, the cost of a sleep and a
 * wake-up. */
enum { SPINS = 400 };

/* A call that follows another in less time than a worker polls finds it awake. After so many in a row the workers are
 * woken even for calls that are not worth it by themselves. */
enum { FAST_FOLLOW_NS = 5000, FAST_CALLS = 8 };

enum { MAX_WORKERS = 1023 };

static struct {
    /* Written by the caller that holds `taken`, before it offers seats. */
    void (*task)(void *context, int64_t index);
    void *context;
    int64_t num_tasks;
    int32_t num_workers; /* threads that exist */
    pthread_t workers[MAX_WORKERS];
    int caller_cpu; /* that the workers are kept away from; -1: none */
    int64_t last_end;
    int32_t fast_calls; /* in a row */

    atomic_bool taken;
    atomic_llong next; /* the first task that nobody has drawn */
    atomic_int seats;
    atomic_int active;

    pthread_mutex_t mutex; /* guards only the going to sleep */
    pthread_cond_t offered, left;
    atomic_int asleep;
    atomic_bool waiting; /* the caller, for `left` */
} pool = {.caller_cpu = -1,
          .mutex = PTHREAD_MUTEX_INITIALIZER,
          .offered = PTHREAD_COND_INITIALIZER,
          .left = PTHREAD_COND_INITIALIZER};

static void draw_tasks(void)
{
    for (int64_t index; (index = atomic_fetch_add(&pool.next, 1)) < pool.num_tasks;) pool.task(pool.context, index);
}

static bool take_seat(void)
{
    int seats = atomic_load(&pool.seats);
    while (seats > 0)
        if (atomic_compare_exchange_weak(&pool.seats, &seats, seats - 1)) return true;
    return false;
}

/* `asleep` is raised before the last look at `seats`, and the caller offers seats before it looks at `asleep`: one of
 * the two sees the other. The same holds for `waiting` and `active`. */
static void wait_for_offer(void)
{
    for (int spin = 0; spin < SPINS; spin++) {
        if (atomic_load(&pool.seats) > 0) return;
        pause_briefly();
    }
    pthread_mutex_lock(&pool.mutex);
    atomic_fetch_add(&pool.asleep, 1);
    while (atomic_load(&pool.seats) <= 0) pthread_cond_wait(&pool.offered, &pool.mutex);
    atomic_fetch_sub(&pool.asleep, 1);
    pthread_mutex_unlock(&pool.mutex);
}

static void wait_for_workers(void)
{
    for (int spin = 0; spin < SPINS; spin++) {
        if (atomic_load(&pool.active) == 0) return;
        pause_briefly();
    }
    pthread_mutex_lock(&pool.mutex);
    atomic_store(&pool.waiting, true);
    while (atomic_load(&pool.active) != 0) pthread_cond_wait(&pool.left, &pool.mutex);
    atomic_store(&pool.waiting, false);
    pthread_mutex_unlock(&pool.mutex);
}

static void *work(void *unused)
{
    (void)unused;
    for (;;) {
        wait_for_offer();
        atomic_fetch_add(&pool.active, 1);
        if (take_seat()) draw_tasks();
        if (atomic_fetch_sub(&pool.active, 1) == 1 && atomic_load(&pool.waiting)) {
            pthread_mutex_lock(&pool.mutex);
            pthread_cond_signal(&pool.left);
            pthread_mutex_unlock(&pool.mutex);
        }
    }
    return NULL;
}

static void forget_workers(void)
{
    pool.num_workers = 0;
    pool.caller_cpu = -1;
    atomic_store(&pool.seats, 0);
    atomic_store(&pool.active, 0);
    atomic_store(&pool.asleep, 0);
    atomic_store(&pool.waiting, false);
    pthread_mutex_init(&pool.mutex, NULL);
    pthread_cond_init(&pool.offered, NULL);
    pthread_cond_init(&pool.left, NULL);
    atomic_store(&pool.taken, false);
}

static void watch_for_forks(void)
{
    pthread_atfork(NULL, NULL, forget_workers);
}

/* Workers take no signals, so that a program's handlers run on its own threads. */
static void hire_workers(int32_t wanted)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_for_forks);

    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (; pool.num_workers < wanted; pool.num_workers++) {
        pthread_t *worker = &pool.workers[pool.num_workers];
        if (pthread_create(worker, NULL, work, NULL) != 0) break;
        pthread_detach(*worker);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pool.caller_cpu = -1; /* the new ones may run anywhere */
}

/* A sleeper may be woken onto the caller's own processor and wait there for milliseconds, behind the caller, until the
 * scheduler balances its load. So the workers are kept off that processor; told again only when the caller has moved.
 */
static void keep_workers_away(void)
{
#if defined(__linux__)
    int cpu = sched_getcpu();
    cpu_set_t allowed;
    if (cpu < 0 || cpu >= CPU_SETSIZE || cpu == pool.caller_cpu) return;
    if (pthread_getaffinity_np(pthread_self(), sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < 2) return;
    CPU_CLR(cpu, &allowed);
    for (int32_t i = 0; i < pool.num_workers; i++)
        pthread_setaffinity_np(pool.workers[i], sizeof allowed, &allowed); /* a wish: failing, it runs anywhere */
    pool.caller_cpu = cpu;
#endif
}

static int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void wake_workers(int32_t count)
{
    keep_workers_away();
    pthread_mutex_lock(&pool.mutex);
    for (int32_t i = 0; i < count; i++) pthread_cond_signal(&pool.offered);
    pthread_mutex_unlock(&pool.mutex);
}

void fc_cpu_run(void (*task)(void *context, int64_t index), void *context, int64_t num_tasks, int32_t num_threads,
                int32_t num_to_wake)
{
    if (num_threads > num_tasks) num_threads = (int32_t)num_tasks;
    if (num_threads <= 1 || atomic_exchange(&pool.taken, true)) {
        for (int64_t index = 0; index < num_tasks; index++) task(context, index);
        return;
    }
    pool.fast_calls = nanoseconds() - pool.last_end < FAST_FOLLOW_NS ? pool.fast_calls + 1 : 0;
    if (pool.fast_calls >= FAST_CALLS) num_to_wake = num_threads;
    int32_t seats = num_threads - 1 < MAX_WORKERS ? num_threads - 1 : MAX_WORKERS;
    int32_t wanted = num_to_wake - 1 < seats ? num_to_wake - 1 : seats;
    if (pool.num_workers < wanted) hire_workers(wanted);

    pool.task = task;
    pool.context = context;
    pool.num_tasks = num_tasks;
    atomic_store(&pool.next, 0);
    atomic_store(&pool.seats, seats);
    if (wanted > 0 && atomic_load(&pool.asleep) > 0) wake_workers(wanted);

    draw_tasks();
    atomic_store(&pool.seats, 0);
    wait_for_workers();
    pool.last_end = nanoseconds();
    atomic_store(&pool.taken, false);
}

void fc_cpu_wait_for(const atomic_int *counter, int value, const atomic_bool *given_up)
{
    for (int spin = 0; atomic_load(counter) != value && !atomic_load(given_up); spin++) {
        if (spin < SPINS)
            pause_briefly();
        else
            sched_yield(); /* its thread may be waiting for this very processor */
    }
}

/* Scratch: one growing allocation per thread, freed by the key's destructor when the thread ends. */
static _Thread_local struct {
    void *data;
    uint64_t bytes;
} scratch;
static pthread_key_t scratch_key;
static bool has_scratch_key; /* a process has some 1,000 keys; without one, scratch outlives its thread */

static void make_scratch_key(void)
{
    has_scratch_key = pthread_key_create(&scratch_key, free) == 0;
}

void *fc_cpu_scratch(uint64_t bytes)
{
    if (bytes <= scratch.bytes) return scratch.data;
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_scratch_key);

    free(scratch.data);
    scratch.bytes = 0;
    if (posix_memalign(&scratch.data, 64, bytes) != 0) scratch.data = NULL;
    if (has_scratch_key) pthread_setspecific(scratch_key, scratch.data);
    if (scratch.data) scratch.bytes = bytes;
    return scratch.data;
}
