#include "cache.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Absolute tokens stay below this, so that no sum of two of them and a cache's size can overflow. */
#define TOKEN_LIMIT (INT64_MAX / 4)

static cache_status fail(cache_error *error, cache_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->text, sizeof error->text, format, arguments);
    va_end(arguments);
    return status;
}

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t sink_tokens(const cache *self) { return self->sink * self->frame_tokens; }
static int64_t capacity(const cache *self) { return self->window * self->frame_tokens; }
static int64_t ring_tokens(const cache *self) { return capacity(self) - sink_tokens(self); }
static int64_t memory_rows(const cache *self) { return CACHE_BRIDGE_ROWS + self->max_anchors; }

int64_t cache_rows(const cache *self) { return memory_rows(self) + capacity(self); }

/* A list of (start, length) pairs in a caller's buffer. Neighbours are joined, but never a cache row and a fresh one:
 * they are different tensors. */
typedef struct {
    int32_t *pairs;
    int64_t fresh;  /* first fresh row */
    int used;
} row_list;

static void append(row_list *list, int64_t start, int64_t length)
{
    if (length <= 0)
        return;
    if (list->used > 0) {
        int32_t *last = list->pairs + 2 * (list->used - 1);
        if ((int64_t)last[0] + last[1] == start && start != list->fresh) {
            last[1] += (int32_t)length;
            return;
        }
    }
    list->pairs[2 * list->used] = (int32_t)start;
    list->pairs[2 * list->used + 1] = (int32_t)length;
    list->used++;
}

/* Row of an absolute token that lies in the ring: no older than the first token after the cache's first sink. */
static int64_t ring_row(const cache *self, int64_t absolute)
{
    int64_t first = self->base + sink_tokens(self);
    return memory_rows(self) + sink_tokens(self) + (absolute - first) % ring_tokens(self);
}

/* Rows of the absolute tokens [start, start + length) of the ring: one or two pieces, none without a length. */
static void append_ring(const cache *self, row_list *list, int64_t start, int64_t length)
{
    int64_t row = ring_row(self, start);
    int64_t before_end = min64(length, cache_rows(self) - row);
    append(list, row, before_end);
    append(list, memory_rows(self) + sink_tokens(self), length - before_end);
}

/* Rows of the slots [begin, end) of a cache whose slot `local_end` would hold the absolute token `global_end`. */
static void append_slots(const cache *self, row_list *list, int64_t begin, int64_t end, int64_t local_end,
                         int64_t global_end)
{
    int64_t sink = sink_tokens(self);
    append(list, memory_rows(self) + begin, min64(end, sink) - begin);
    begin = max64(begin, sink);
    append_ring(self, list, global_end - (local_end - begin), end - begin);
}

/* One forward, placed: algorithm.md 3, steps 1 and 2. */
typedef struct {
    int64_t tokens;       /* new */
    int64_t end;          /* absolute end */
    int64_t local_start;  /* ls */
    int64_t local_end;    /* le */
    int64_t write_start;  /* ws; le or more: nothing is written */
    bool recompute;       /* rec */
} placement;

static cache_status place(const cache *self, int64_t start, int64_t frames, bool force_sink, placement *out,
                          cache_error *error)
{
    int64_t P = self->frame_tokens, sink = sink_tokens(self), cap = capacity(self);
    *out = (placement){0}; /* read after CACHE_OK alone, which GCC does not see */
    if (frames < 1 || frames > self->window)
        return fail(error, CACHE_USAGE, "a forward of %" PRId64 " frames: use 1 to %" PRId64 ", the cache's window",
                    frames, self->window);
    if (start < self->base / P || start > TOKEN_LIMIT / P - frames)
        return fail(error, CACHE_USAGE,
                    "start is frame %" PRId64 ": this cache begins at frame %" PRId64 " and ends at %" PRId64
                    "; start between them",
                    start, self->base / P, self->global_end / P);
    int64_t first = start * P;
    if (first > self->global_end)
        return fail(error, CACHE_USAGE,
                    "start is frame %" PRId64 " but the cache ends at frame %" PRId64
                    ": frames cannot be skipped; commit those between first, or clear",
                    start, self->global_end / P);
    out->tokens = frames * P;
    out->end = first + out->tokens;
    out->recompute = out->end <= self->global_end && first > self->base;
    int64_t evicted = 0;
    if (out->end > self->global_end && out->tokens + self->local_end > cap)
        evicted = out->tokens + self->local_end - cap;
    out->local_end = self->local_end + (out->end - self->global_end) - evicted;
    out->local_start = out->local_end - out->tokens;
    if (evicted > 0 && out->local_start < sink)
        return fail(error, CACHE_USAGE,
                    "a forward of %" PRId64 " frames does not fit beside the sink of %" PRId64 " in a window of %" PRId64
                    ": use at most %" PRId64 " frames",
                    frames, self->sink, self->window, self->window - self->sink);
    if (out->local_start < 0)
        return fail(error, CACHE_USAGE,
                    "start is frame %" PRId64 ": those frames were evicted; start at frame %" PRId64 " or later", start,
                    (self->global_end - self->local_end) / P);
    if (!out->recompute && out->local_end < sink)
        return fail(error, CACHE_USAGE,
                    "a first forward of %" PRId64 " frames leaves the sink of %" PRId64
                    " unwritten: use at least that many frames",
                    frames, self->sink);
    out->write_start =
        out->recompute && !force_sink ? max64(out->local_start, sink) : out->local_start;
    return CACHE_OK;
}

cache_status cache_init(cache *self, int64_t frame_tokens, int64_t window, int64_t sink, int64_t max_anchors,
                        cache_error *error)
{
    if (frame_tokens < 1 || sink < 0 || sink >= window || max_anchors < 0)
        return fail(error, CACHE_SETTINGS,
                    "frame_tokens %" PRId64 ", window %" PRId64 ", sink %" PRId64 ", max_anchors %" PRId64
                    ": need frame_tokens >= 1, sink >= 0, window > sink and max_anchors >= 0",
                    frame_tokens, window, sink, max_anchors);
    /* Segments are int32 in [cache rows | fresh rows], and a forward has at most `window` frames. */
    if (max_anchors > INT32_MAX / 4 || window > INT32_MAX / 4 || frame_tokens > INT32_MAX / 4 / window)
        return fail(error, CACHE_SETTINGS,
                    "frame_tokens %" PRId64 ", window %" PRId64 ", max_anchors %" PRId64
                    ": rows are numbered with 32 bits; lower frame_tokens * window or max_anchors below %d",
                    frame_tokens, window, max_anchors, INT32_MAX / 4);
    memset(self, 0, sizeof *self);
    self->frame_tokens = frame_tokens;
    self->window = window;
    self->sink = sink;
    self->max_anchors = max_anchors;
    return CACHE_OK;
}

cache_status cache_plan(const cache *self, int64_t start, int64_t frames, int64_t window, bool force_sink,
                        int32_t segments[2 * CACHE_SEGMENTS], int64_t *keys, cache_error *error)
{
    placement at;
    cache_status status = place(self, start, frames, force_sink, &at, error);
    if (status != CACHE_OK)
        return status;
    if (window < 1)
        return fail(error, CACHE_USAGE, "window is %" PRId64 " frames: use 1 to %" PRId64, window, self->window);

    int64_t sink = sink_tokens(self), fresh = cache_rows(self);
    int64_t extra = self->anchors + (self->bridge ? CACHE_BRIDGE_ROWS : 0);
    int64_t budget = min64(window, self->window) * self->frame_tokens - sink - extra;
    int64_t recent = max64(sink, at.local_end - max64(budget, 0));  /* first slot of the last part */

    memset(segments, 0, 2 * CACHE_SEGMENTS * sizeof *segments);
    row_list list = {segments, fresh, 0};
    append(&list, self->bridge ? 0 : CACHE_BRIDGE_ROWS, extra);
    /* Slots below write_start are read from the cache, [write_start, local_end) from the fresh rows. Where a forward
     * rewrites only a part of the sink (write_start < local_end < sink) the sink's rest follows its fresh part. */
    append_slots(self, &list, 0, min64(at.write_start, sink), 0, 0);
    append_slots(self, &list, max64(at.local_end, at.write_start), sink, 0, 0);
    append_slots(self, &list, recent, min64(at.write_start, at.local_end), at.local_end, at.end);
    int64_t shift = fresh - at.local_start;
    append(&list, shift + at.write_start, min64(at.local_end, sink) - at.write_start);
    int64_t visible = max64(recent, at.write_start);
    append(&list, shift + visible, at.local_end - visible);

    *keys = 0;
    for (int i = 0; i < list.used; i++)
        *keys += segments[2 * i + 1];
    return CACHE_OK;
}

cache_status cache_commit(cache *self, int64_t start, int64_t frames, bool force_sink,
                          int32_t ranges[3 * CACHE_RANGES], int64_t *count, cache_error *error)
{
    placement at;
    cache_status status = place(self, start, frames, force_sink, &at, error);
    if (status != CACHE_OK)
        return status;

    int32_t pairs[2 * CACHE_RANGES] = {0};
    row_list list = {pairs, cache_rows(self), 0};
    append_slots(self, &list, at.write_start, at.local_end, at.local_end, at.end);
    memset(ranges, 0, 3 * CACHE_RANGES * sizeof *ranges);
    int64_t from = at.write_start - at.local_start;
    for (int i = 0; i < list.used; i++) {
        ranges[3 * i] = (int32_t)from;
        ranges[3 * i + 1] = pairs[2 * i];
        ranges[3 * i + 2] = pairs[2 * i + 1];
        from += pairs[2 * i + 1];
    }
    *count = list.used;
    if (!at.recompute) {
        self->global_end = at.end;
        self->local_end = at.local_end;
    }
    return CACHE_OK;
}

cache_status cache_spans(const cache *self, int64_t bridge_recent, int64_t anchor_recent,
                         int32_t spans[2 * CACHE_SPANS * CACHE_SPAN_PIECES], cache_error *error)
{
    if (bridge_recent < 1 || anchor_recent < 1)
        return fail(error, CACHE_USAGE, "bridge_recent %" PRId64 ", anchor_recent %" PRId64 ": use at least 1 frame",
                    bridge_recent, anchor_recent);
    int64_t P = self->frame_tokens, filled = self->local_end;
    int64_t begin[CACHE_SPANS] = {
        filled - P,
        filled - 2 * P,
        filled - min64(filled, min64(bridge_recent, self->window) * P),
        0,
        filled - min64(filled, min64(anchor_recent, self->window) * P),
    };
    int64_t end[CACHE_SPANS] = {filled, filled - P, filled, min64(filled, sink_tokens(self)), filled};

    memset(spans, 0, 2 * CACHE_SPANS * CACHE_SPAN_PIECES * sizeof *spans);
    for (int i = 0; i < CACHE_SPANS; i++) {
        row_list list = {spans + 2 * CACHE_SPAN_PIECES * i, cache_rows(self), 0};
        if (begin[i] >= 0)
            append_slots(self, &list, begin[i], end[i], filled, self->global_end);
    }
    return CACHE_OK;
}

cache_status cache_set_memory(cache *self, bool bridge, int64_t anchors, cache_error *error)
{
    if (anchors < 0 || anchors > self->max_anchors)
        return fail(error, CACHE_SETTINGS, "anchors is %" PRId64 ": this cache has rows for 0 to %" PRId64, anchors,
                    self->max_anchors);
    self->bridge = bridge;
    self->anchors = anchors;
    return CACHE_OK;
}

cache_status cache_clear(cache *self, int64_t start, cache_error *error)
{
    if (start < 0 || start > TOKEN_LIMIT / self->frame_tokens - self->window)
        return fail(error, CACHE_USAGE, "start is frame %" PRId64 ": use 0 to %" PRId64, start,
                    TOKEN_LIMIT / self->frame_tokens - self->window);
    self->base = self->global_end = start * self->frame_tokens;
    self->local_end = self->anchors = 0;
    self->bridge = false;
    return CACHE_OK;
}

/* The pointers fit each other and the sizes. */
static cache_status check_pointers(const cache *self, cache_error *error)
{
    int64_t P = self->frame_tokens, L = self->local_end, G = self->global_end, base = self->base;
    if (base < 0 || base % P || G < base || G % P || G > TOKEN_LIMIT || L < 0 || L % P || L > capacity(self) ||
        L > G - base || (L == 0) != (G == base) || (L > 0 && L < sink_tokens(self)))
        return fail(error, CACHE_BROKEN,
                    "pointers contradict each other: base %" PRId64 ", local_end %" PRId64 ", global_end %" PRId64
                    " with %" PRId64 " tokens a frame, window %" PRId64 ", sink %" PRId64,
                    base, L, G, P, self->window, self->sink);
    if (self->anchors < 0 || self->anchors > self->max_anchors)
        return fail(error, CACHE_BROKEN, "%" PRId64 " anchors are in use but there are rows for %" PRId64, self->anchors,
                    self->max_anchors);
    return CACHE_OK;
}

static cache_status claim(const cache *self, uint8_t *claimed, int64_t row, int64_t low, int64_t high,
                          cache_error *error)
{
    if (row < low || row >= high)
        return fail(error, CACHE_BROKEN, "row %" PRId64 " is used outside of its part [%" PRId64 ", %" PRId64 ") of %" PRId64
                    " rows", row, low, high, cache_rows(self));
    if (claimed[row])
        return fail(error, CACHE_BROKEN, "row %" PRId64 " is used twice", row);
    claimed[row] = 1;
    return CACHE_OK;
}

cache_status cache_check(const cache *self, uint8_t *claimed, cache_error *error)
{
    cache_status status = check_pointers(self, error);
    int64_t rows = cache_rows(self), sink = sink_tokens(self), sink_row = memory_rows(self);
    memset(claimed, 0, (size_t)rows);
    for (int64_t i = 0; status == CACHE_OK && self->bridge && i < CACHE_BRIDGE_ROWS; i++)
        status = claim(self, claimed, i, 0, CACHE_BRIDGE_ROWS, error);
    for (int64_t i = 0; status == CACHE_OK && i < self->anchors; i++)
        status = claim(self, claimed, CACHE_BRIDGE_ROWS + i, CACHE_BRIDGE_ROWS, sink_row, error);
    for (int64_t i = 0; status == CACHE_OK && i < min64(sink, self->local_end); i++)
        status = claim(self, claimed, sink_row + i, sink_row, sink_row + sink, error);
    for (int64_t i = sink; status == CACHE_OK && i < self->local_end; i++)
        status = claim(self, claimed, ring_row(self, self->global_end - (self->local_end - i)), sink_row + sink, rows,
                       error);
    return status;
}

void cache_state(const cache *self, int64_t state[CACHE_STATE])
{
    const int64_t values[CACHE_STATE] = {
        self->frame_tokens, self->window,     self->sink,   self->max_anchors, self->base,
        self->local_end,    self->global_end, self->anchors, self->bridge ? 1 : 0,
    };
    memcpy(state, values, sizeof values);
}

cache_status cache_restore(cache *self, const int64_t state[CACHE_STATE], cache_error *error)
{
    if (state[0] != self->frame_tokens || state[1] != self->window || state[2] != self->sink ||
        state[3] != self->max_anchors)
        return fail(error, CACHE_USAGE,
                    "the state is of a cache with frame_tokens %" PRId64 ", window %" PRId64 ", sink %" PRId64
                    ", max_anchors %" PRId64 ", this one has %" PRId64 ", %" PRId64 ", %" PRId64 ", %" PRId64
                    ": restore it into a cache of its own sizes",
                    state[0], state[1], state[2], state[3], self->frame_tokens, self->window, self->sink,
                    self->max_anchors);
    if (state[8] != 0 && state[8] != 1)
        return fail(error, CACHE_BROKEN, "the state's bridge flag is %" PRId64 ", not 0 or 1", state[8]);
    cache next = *self;
    next.base = state[4];
    next.local_end = state[5];
    next.global_end = state[6];
    next.anchors = state[7];
    next.bridge = state[8] == 1;
    cache_status status = check_pointers(&next, error);
    if (status == CACHE_OK)
        *self = next;
    return status;
}
