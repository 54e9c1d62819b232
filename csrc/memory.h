/* memory.h: blocks of memory for callers of the engine: workspaces, packs, tapes.
 * Knows the operating system's pages; nothing of what a block holds. Fresh pages are dear: the
 * system clears each one when it is first touched, which costs as much as computing on it. So a
 * block that is given back is kept for the next one who asks, up to a stated sum, and a large one
 * asks for huge pages. Safe to call from any thread, and in a child after fork. */
#ifndef RF_MEMORY_H
#define RF_MEMORY_H

#include <stddef.h>

/* Most bytes that are kept in all; on a machine with little memory, a share of that. */
#define RF_KEPT_BYTES ((size_t)512 << 20)
#define RF_KEPT_SHARE 32

typedef struct {
    void *data; /* 64-byte aligned; NULL: there is no memory */
    size_t bytes;
} rf_block;

/* At least so many bytes, with any contents. */
rf_block rf_block_take(size_t bytes);

/* Gives back what rf_block_take returned, or a block without data. */
void rf_block_give(rf_block block);

/* Returns to the system what is kept; how many bytes that were. */
size_t rf_blocks_release(void);

#endif
