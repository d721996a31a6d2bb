/* A small pool of threads whose caller never waits for one that has not begun.
 *
 * Work is a function that takes items from an atomic counter until none is left, so any number of threads may run it.
 * Workers that are awake enter through the gate; when the caller has found the counter empty it shuts the gate and waits
 * for those inside only. OpenMP's teams wait for all their threads at every call, which on a busy machine takes the
 * scheduler's milliseconds (torch's libgomp, two cores under load: a tenth of the speed). A thread that calls while
 * another one does works alone; so does a child after fork, whose workers are gone.
 */
#ifndef ANYBIT_POOL_H
#define ANYBIT_POOL_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#define POOL_MOST 256
#define POOL_SPINS 4000 /* some tens of microseconds: the pause between two layers of a model */
#define POOL_OPEN (1u << 31)
#define POOL_STACK (1 << 20) /* bytes: decoded rows lie there, and some systems give a thread 128 KiB */

static struct {
    pthread_mutex_t caller, sleep; /* one call at a time; guards the condition */
    pthread_cond_t wake;
    atomic_uint sleepers;
    unsigned workers;
    _Alignas(64) atomic_uint call; /* changes with every call; a line of its own: workers keep reading it */
    _Alignas(64) atomic_uint gate; /* POOL_OPEN | workers inside */
    atomic_uint limit;             /* workers that may take part */
    void (*work)(void *);
    void *job;
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER, .sleep = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static inline void pool_pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void *pool_worker(void *index) {
    const unsigned self = (unsigned)(uintptr_t)index;
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < POOL_SPINS && atomic_load(&pool.call) == seen; i++) pool_pause();
        if (atomic_load(&pool.call) == seen) {
            pthread_mutex_lock(&pool.sleep);
            atomic_fetch_add(&pool.sleepers, 1);
            while (atomic_load(&pool.call) == seen) pthread_cond_wait(&pool.wake, &pool.sleep);
            atomic_fetch_sub(&pool.sleepers, 1);
            pthread_mutex_unlock(&pool.sleep);
        }
        seen = atomic_load(&pool.call);
        unsigned gate = atomic_load(&pool.gate);
        while ((gate & POOL_OPEN) && self < atomic_load(&pool.limit))
            if (atomic_compare_exchange_weak(&pool.gate, &gate, gate + 1)) {
                pool.work(pool.job);
                atomic_fetch_sub(&pool.gate, 1);
                break;
            }
    }
    return NULL;
}

/* Runs `work` on up to `threads` threads, this one included; alone while another thread uses the pool. */
static void pool_run(void (*work)(void *), void *job, unsigned threads) {
    if (pthread_mutex_trylock(&pool.caller)) {
        work(job);
        return;
    }
    const unsigned wanted = threads - 1 < POOL_MOST ? threads - 1 : POOL_MOST;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, POOL_STACK);
    for (pthread_t thread; pool.workers < wanted; pool.workers++) {
        if (pthread_create(&thread, &attributes, pool_worker, (void *)(uintptr_t)pool.workers)) break;
        pthread_detach(thread);
    }
    pthread_attr_destroy(&attributes);
    pool.work = work;
    pool.job = job;
    atomic_store_explicit(&pool.limit, wanted, memory_order_relaxed);
    atomic_store_explicit(&pool.gate, POOL_OPEN, memory_order_release); /* what a late worker enters by */
    atomic_fetch_add(&pool.call, 1);
    if (atomic_load(&pool.sleepers)) {
        pthread_mutex_lock(&pool.sleep);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.sleep);
    }
    work(job);
    atomic_fetch_and(&pool.gate, ~POOL_OPEN);
    for (int i = 0; atomic_load(&pool.gate); i++) { /* those inside finish their item */
        pool_pause();
        if (i > POOL_SPINS) sched_yield();
    }
    pthread_mutex_unlock(&pool.caller);
}

#endif
