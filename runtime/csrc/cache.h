/* Which stored tokens a forward may look at, and where its own tokens go: rows, not tensors.
 *
 * Rows of a layer's cache:  [2 bridge | max_anchors | sink S*P | ring (W-S)*P]
 * Slots (the paper's view): [0, S*P) the sink, then the youngest tokens in time order, `local_end` of them in all.
 * A slot of the sink has the row of its number; a younger slot's row follows from its absolute token, so nothing moves
 * when tokens are evicted:  row = sink_end + (absolute - base - S*P) mod ring.
 *
 * Plain C11. No Python, no CUDA, no allocation, no global state. Everything is in tokens unless it is named frames.
 */
#ifndef SWIFTVIDEO_CACHE_H
#define SWIFTVIDEO_CACHE_H

#include <stdbool.h>
#include <stdint.h>

enum {
    CACHE_BRIDGE_ROWS = 2,   /* [sink token, recent token] */
    CACHE_SEGMENTS = 6,      /* of a plan: (start, length) */
    CACHE_RANGES = 4,        /* of a commit: (fresh start, row start, length) */
    CACHE_SPANS = 5,         /* last frame, frame before, bridge-recent, sink, anchor-recent */
    CACHE_SPAN_PIECES = 3,   /* sink, ring, ring after its end */
    CACHE_STATE = 9,         /* integers of a saved state */
    CACHE_MESSAGE = 256
};

typedef enum {
    CACHE_OK = 0,
    CACHE_SETTINGS = -1,     /* a size or setting is out of range */
    CACHE_USAGE = -2,        /* this call is impossible in this state */
    CACHE_BROKEN = -3        /* the cache contradicts itself: a bug */
} cache_status;

typedef struct {
    int64_t frame_tokens;    /* P */
    int64_t window;          /* W, frames */
    int64_t sink;            /* S, frames */
    int64_t max_anchors;
    int64_t base;            /* absolute token of slot 0 */
    int64_t local_end;       /* L: slots in use */
    int64_t global_end;      /* G: absolute end */
    int64_t anchors;         /* anchor rows that are keys */
    bool bridge;             /* bridge rows are keys */
} cache;

typedef struct {
    char text[CACHE_MESSAGE];
} cache_error;

cache_status cache_init(cache *self, int64_t frame_tokens, int64_t window, int64_t sink, int64_t max_anchors,
                        cache_error *error);

/* R: rows of a layer's cache. */
int64_t cache_rows(const cache *self);

/* Keys of a forward of `frames` frames from absolute frame `start`, looking back `window` frames: algorithm.md 3.
 * Writes 6 (start, length) pairs, zero padded, in the row space [cache 0..R | fresh R..R+frames*P], and how many keys
 * they hold. Changes nothing. */
cache_status cache_plan(const cache *self, int64_t start, int64_t frames, int64_t window, bool force_sink,
                        int32_t segments[2 * CACHE_SEGMENTS], int64_t *keys, cache_error *error);

/* Rows that the fresh K/V of this forward go to: up to 4 (fresh start, row start, length), zero padded, and how many.
 * Moves the pointers. */
cache_status cache_commit(cache *self, int64_t start, int64_t frames, bool force_sink,
                          int32_t ranges[3 * CACHE_RANGES], int64_t *count, cache_error *error);

/* Rows that the injection averages, as 5 spans of up to 3 (start, length), each in time order, zero padded. */
cache_status cache_spans(const cache *self, int64_t bridge_recent, int64_t anchor_recent,
                         int32_t spans[2 * CACHE_SPANS * CACHE_SPAN_PIECES], cache_error *error);

cache_status cache_set_memory(cache *self, bool bridge, int64_t anchors, cache_error *error);

/* Empties the cache, memory rows included; the next forward starts at absolute frame `start`. */
cache_status cache_clear(cache *self, int64_t start, cache_error *error);

/* Claims every row in use, once each, in `claimed` (cache_rows(self) bytes of scratch). */
cache_status cache_check(const cache *self, uint8_t *claimed, cache_error *error);

void cache_state(const cache *self, int64_t state[CACHE_STATE]);

/* Takes a saved state of a cache of the same sizes; on error nothing changes. */
cache_status cache_restore(cache *self, const int64_t state[CACHE_STATE], cache_error *error);

#endif
