/* memory.c: blocks of memory that are kept when given back; see memory.h.
 * Knows mmap and a mutex. Leaves to its callers what a block is for. */
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* madvise */
#endif

#include "memory.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Below this the C library's own allocator neither maps nor returns pages at each call. */
#define SMALL_BYTES ((size_t)64 << 10)
#define HUGE_PAGE ((size_t)2 << 20)
#define PAGE ((size_t)64 << 10) /* a multiple of every page in use */
#define MOST_KEPT 32

/* Sanitizers see neither the ends of what mmap returns nor its use after it was given back. */
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define PLAIN_MALLOC 1
#endif
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define PLAIN_MALLOC 1
#endif
#ifndef PLAIN_MALLOC
#define PLAIN_MALLOC 0
#endif

/* Oldest first. */
static struct {
    pthread_mutex_t mutex;
    rf_block block[MOST_KEPT];
    int n;
    size_t bytes;
} kept = {.mutex = PTHREAD_MUTEX_INITIALIZER};

static int is_small(size_t bytes) { return PLAIN_MALLOC || bytes < SMALL_BYTES; }

static rf_block allocate_small(size_t bytes) {
    rf_block block = {.bytes = bytes};
    if (posix_memalign(&block.data, 64, bytes + !bytes)) block.data = NULL;
    return block;
}

static rf_block allocate_pages(size_t bytes) {
    const size_t unit = bytes < HUGE_PAGE ? PAGE : HUGE_PAGE;
    if (bytes > SIZE_MAX - 2 * unit) return (rf_block){0};
    const size_t whole = (bytes + unit - 1) / unit * unit, mapped = whole + unit;
    char *const base =
        mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return (rf_block){0};
    /* Both ends go back, so that the block begins on a border of its unit. */
    const size_t before = (unit - (uintptr_t)base % unit) % unit;
    if (before) munmap(base, before);
    if (before < unit) munmap(base + before + whole, unit - before);
#ifdef MADV_HUGEPAGE
    if (unit == HUGE_PAGE) madvise(base + before, whole, MADV_HUGEPAGE); /* a wish, no more */
#endif
    return (rf_block){base + before, whole};
}

static void release(rf_block block) {
    if (is_small(block.bytes))
        free(block.data);
    else
        munmap(block.data, block.bytes);
}

static rf_block take_kept(int i) {
    const rf_block block = kept.block[i];
    kept.n--;
    kept.bytes -= block.bytes;
    memmove(kept.block + i, kept.block + i + 1, (size_t)(kept.n - i) * sizeof block);
    return block;
}

/* Whoever finds the mutex taken does without what is kept; also in a child whose parent forked
 * while another of its threads held it. */

rf_block rf_block_take(size_t bytes) {
    if (is_small(bytes)) return allocate_small(bytes);
    rf_block block = {0};
    if (pthread_mutex_trylock(&kept.mutex) == 0) {
        int best = -1;
        for (int i = 0; i < kept.n; i++) {
            const size_t here = kept.block[i].bytes;
            /* Not one that is far too large: somebody else may need just that. */
            if (here < bytes || here / 2 > bytes) continue;
            if (best < 0 || here <= kept.block[best].bytes) best = i;
        }
        if (best >= 0) block = take_kept(best);
        pthread_mutex_unlock(&kept.mutex);
    }
    if (!block.data) block = allocate_pages(bytes);
    if (!block.data) { /* there may be enough in what is kept, here or in another thread's hands */
        rf_blocks_release();
        block = allocate_pages(bytes);
    }
    return block;
}

/* Asked once: the system's answer does not change. */
static size_t most_kept;

__attribute__((constructor)) static void memory_load(void) {
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    most_kept = RF_KEPT_BYTES;
    if (pages > 0 && page > 0 && (size_t)pages / RF_KEPT_SHARE < RF_KEPT_BYTES / (size_t)page)
        most_kept = (size_t)pages / RF_KEPT_SHARE * (size_t)page;
}

void rf_block_give(rf_block block) {
    if (!block.data) return;
    if (is_small(block.bytes) || block.bytes > most_kept ||
        pthread_mutex_trylock(&kept.mutex) != 0) {
        release(block);
        return;
    }
    while (kept.n == MOST_KEPT || kept.bytes + block.bytes > most_kept) release(take_kept(0));
    kept.block[kept.n++] = block;
    kept.bytes += block.bytes;
    pthread_mutex_unlock(&kept.mutex);
}

size_t rf_blocks_release(void) {
    size_t bytes = 0;
    if (pthread_mutex_trylock(&kept.mutex) != 0) return 0;
    while (kept.n > 0) {
        const rf_block block = take_kept(kept.n - 1);
        bytes += block.bytes;
        release(block);
    }
    pthread_mutex_unlock(&kept.mutex);
    return bytes;
}
