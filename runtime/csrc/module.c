/* Python binding of cache.c: swiftvideo.runtime._core, limited API of 3.11.
 *
 * The hot calls (plan, commit, spans) parse their arguments in place, write into the caller's buffer and return an int:
 * no allocation of ours and no other Python object. They are short, so the GIL is kept.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cache.h"

typedef struct {
    PyObject *settings_error;
    PyObject *usage_error;
    PyObject *integrity_error;
} module_state;

typedef struct {
    PyObject_HEAD
    cache cache;
} CacheObject;

static module_state *state_of(PyObject *self) { return PyType_GetModuleState(Py_TYPE(self)); }

static PyObject *raise_status(const module_state *state, cache_status status, const cache_error *error)
{
    PyObject *type = status == CACHE_SETTINGS ? state->settings_error
                     : status == CACHE_USAGE  ? state->usage_error
                                              : state->integrity_error;
    PyErr_SetString(type, error->text);
    return NULL;
}

/* Sorts a call's arguments into `out` by `names` (`count` of them, all required). */
static int take_arguments(const char *function, const char *const names[], Py_ssize_t count, PyObject *const *args,
                          Py_ssize_t given, PyObject *keywords, PyObject *out[])
{
    if (given > count) {
        PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments but %zd were given", function, count, given);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        out[i] = i < given ? args[i] : NULL;
    Py_ssize_t named = keywords ? PyTuple_Size(keywords) : 0;
    for (Py_ssize_t k = 0; k < named; k++) {
        PyObject *name = PyTuple_GetItem(keywords, k);
        Py_ssize_t i = 0;
        while (i < count && PyUnicode_CompareWithASCIIString(name, names[i]) != 0)
            i++;
        if (i == count || out[i]) {
            PyErr_Format(PyExc_TypeError, i == count ? "%s() has no argument '%U'" : "%s() got argument '%U' twice",
                         function, name);
            return -1;
        }
        out[i] = args[given + k];
    }
    for (Py_ssize_t i = 0; i < count; i++)
        if (!out[i]) {
            PyErr_Format(PyExc_TypeError, "%s() misses argument '%s'", function, names[i]);
            return -1;
        }
    return 0;
}

/* Raises `error` where the integer is out of range; other objects are a TypeError. */
static int take_int(PyObject *error, const char *name, PyObject *object, int64_t *out)
{
    *out = PyLong_AsLongLong(object);
    if (*out != -1 || !PyErr_Occurred())
        return 0;
    if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
        PyErr_Clear();
        PyErr_Format(error, "%s does not fit 64 bits: pass a smaller integer", name);
    }
    return -1;
}

static int take_bool(PyObject *object, bool *out)
{
    int truth = PyObject_IsTrue(object);
    *out = truth > 0;
    return truth < 0 ? -1 : 0;
}

/* A writable, contiguous int32 buffer of at least `items` items. Release the view after success. */
static int take_buffer(const module_state *state, const char *name, PyObject *object, Py_ssize_t items, Py_buffer *view)
{
    if (PyObject_GetBuffer(object, view, PyBUF_WRITABLE | PyBUF_FORMAT | PyBUF_C_CONTIGUOUS) < 0) {
        if (!PyErr_ExceptionMatches(PyExc_TypeError) && !PyErr_ExceptionMatches(PyExc_BufferError) &&
            !PyErr_ExceptionMatches(PyExc_ValueError))
            return -1; /* an interrupt, or no memory */
        PyErr_Clear();
        PyErr_Format(state->usage_error, "%s is %R: pass a writable, C-contiguous buffer of %zd int32", name,
                     (PyObject *)Py_TYPE(object), items);
        return -1;
    }
    const char *format = view->format ? view->format : "B";
    if (*format == '@' || *format == '=' || (*format == '<' && !PY_BIG_ENDIAN))
        format++;
    bool int32 = view->itemsize == 4 && (*format == 'i' || *format == 'l') && format[1] == '\0';
    if (!int32 || view->len < items * 4) {
        PyErr_Format(state->usage_error, "%s has %zd bytes of format '%s': pass %zd int32 (%zd bytes)", name, view->len,
                     view->format ? view->format : "B", items, items * 4);
        PyBuffer_Release(view);
        return -1;
    }
    if ((uintptr_t)view->buf % _Alignof(int32_t)) {
        PyErr_Format(state->usage_error, "%s does not lie at a multiple of %zd bytes: pass an aligned buffer", name,
                     _Alignof(int32_t));
        PyBuffer_Release(view);
        return -1;
    }
    return 0;
}

static PyObject *cache_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"frame_tokens", "window", "sink", "max_anchors", NULL};
    PyObject *given[4];
    int64_t sizes[4];
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOO:Cache", names, &given[0], &given[1], &given[2], &given[3]))
        return NULL;
    const module_state *state = PyType_GetModuleState(type);
    for (int i = 0; i < 4; i++)
        if (take_int(state->settings_error, names[i], given[i], &sizes[i]) < 0)
            return NULL;
    cache fresh;
    cache_error error;
    cache_status status = cache_init(&fresh, sizes[0], sizes[1], sizes[2], sizes[3], &error);
    if (status != CACHE_OK)
        return raise_status(state, status, &error);
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    CacheObject *self = (CacheObject *)allocate(type, 0);
    if (self)
        self->cache = fresh;
    return (PyObject *)self;
}

static void cache_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyObject *cache_repr(PyObject *object)
{
    const cache *self = &((CacheObject *)object)->cache;
    return PyUnicode_FromFormat("Cache(frame_tokens=%lld, window=%lld, sink=%lld, max_anchors=%lld; base=%lld, "
                                "local_end=%lld, global_end=%lld, anchors=%lld, bridge=%s)",
                                (long long)self->frame_tokens, (long long)self->window, (long long)self->sink,
                                (long long)self->max_anchors, (long long)self->base, (long long)self->local_end,
                                (long long)self->global_end, (long long)self->anchors, self->bridge ? "yes" : "no");
}

static PyObject *cache_plan_call(PyObject *object, PyObject *const *args, Py_ssize_t given, PyObject *keywords)
{
    static const char *const names[] = {"start", "frames", "window", "force_sink", "segments"};
    const module_state *state = state_of(object);
    PyObject *values[5];
    int64_t start, frames, window, keys;
    bool force_sink;
    Py_buffer view;
    if (take_arguments("plan", names, 5, args, given, keywords, values) < 0 ||
        take_int(state->usage_error, names[0], values[0], &start) < 0 ||
        take_int(state->usage_error, names[1], values[1], &frames) < 0 ||
        take_int(state->usage_error, names[2], values[2], &window) < 0 || take_bool(values[3], &force_sink) < 0 ||
        take_buffer(state, names[4], values[4], 2 * CACHE_SEGMENTS, &view) < 0)
        return NULL;
    cache_error error;
    cache_status status =
        cache_plan(&((CacheObject *)object)->cache, start, frames, window, force_sink, view.buf, &keys, &error);
    PyBuffer_Release(&view);
    return status == CACHE_OK ? PyLong_FromLongLong(keys) : raise_status(state, status, &error);
}

static PyObject *cache_commit_call(PyObject *object, PyObject *const *args, Py_ssize_t given, PyObject *keywords)
{
    static const char *const names[] = {"start", "frames", "force_sink", "ranges"};
    const module_state *state = state_of(object);
    PyObject *values[4];
    int64_t start, frames, count;
    bool force_sink;
    Py_buffer view;
    if (take_arguments("commit", names, 4, args, given, keywords, values) < 0 ||
        take_int(state->usage_error, names[0], values[0], &start) < 0 ||
        take_int(state->usage_error, names[1], values[1], &frames) < 0 ||
        take_bool(values[2], &force_sink) < 0 || take_buffer(state, names[3], values[3], 3 * CACHE_RANGES, &view) < 0)
        return NULL;
    cache_error error;
    cache_status status =
        cache_commit(&((CacheObject *)object)->cache, start, frames, force_sink, view.buf, &count, &error);
    PyBuffer_Release(&view);
    return status == CACHE_OK ? PyLong_FromLongLong(count) : raise_status(state, status, &error);
}

static PyObject *cache_spans_call(PyObject *object, PyObject *const *args, Py_ssize_t given, PyObject *keywords)
{
    static const char *const names[] = {"bridge_recent", "anchor_recent", "out"};
    const module_state *state = state_of(object);
    PyObject *values[3];
    int64_t bridge_recent, anchor_recent;
    Py_buffer view;
    if (take_arguments("spans", names, 3, args, given, keywords, values) < 0 ||
        take_int(state->usage_error, names[0], values[0], &bridge_recent) < 0 ||
        take_int(state->usage_error, names[1], values[1], &anchor_recent) < 0 ||
        take_buffer(state, names[2], values[2], 2 * CACHE_SPANS * CACHE_SPAN_PIECES, &view) < 0)
        return NULL;
    cache_error error;
    cache_status status = cache_spans(&((CacheObject *)object)->cache, bridge_recent, anchor_recent, view.buf, &error);
    PyBuffer_Release(&view);
    if (status != CACHE_OK)
        return raise_status(state, status, &error);
    Py_RETURN_NONE;
}

static PyObject *cache_set_memory_call(PyObject *object, PyObject *const *args, Py_ssize_t given, PyObject *keywords)
{
    static const char *const names[] = {"bridge", "anchors"};
    const module_state *state = state_of(object);
    PyObject *values[2];
    int64_t anchors;
    bool bridge;
    if (take_arguments("set_memory", names, 2, args, given, keywords, values) < 0 ||
        take_bool(values[0], &bridge) < 0 || take_int(state->usage_error, names[1], values[1], &anchors) < 0)
        return NULL;
    cache_error error;
    cache_status status = cache_set_memory(&((CacheObject *)object)->cache, bridge, anchors, &error);
    if (status != CACHE_OK)
        return raise_status(state, status, &error);
    Py_RETURN_NONE;
}

static PyObject *cache_clear_call(PyObject *object, PyObject *const *args, Py_ssize_t given, PyObject *keywords)
{
    static const char *const names[] = {"start"};
    const module_state *state = state_of(object);
    PyObject *values[1];
    int64_t start;
    if (take_arguments("clear", names, 1, args, given, keywords, values) < 0 ||
        take_int(state->usage_error, names[0], values[0], &start) < 0)
        return NULL;
    cache_error error;
    cache_status status = cache_clear(&((CacheObject *)object)->cache, start, &error);
    if (status != CACHE_OK)
        return raise_status(state, status, &error);
    Py_RETURN_NONE;
}

static PyObject *cache_check_call(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    const cache *self = &((CacheObject *)object)->cache;
    uint8_t *claimed = PyMem_Malloc((size_t)cache_rows(self));
    if (!claimed)
        return PyErr_NoMemory();
    cache_error error;
    cache_status status = cache_check(self, claimed, &error);
    PyMem_Free(claimed);
    if (status != CACHE_OK)
        return raise_status(state_of(object), status, &error);
    Py_RETURN_NONE;
}

static PyObject *cache_state_call(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    int64_t values[CACHE_STATE];
    cache_state(&((CacheObject *)object)->cache, values);
    PyObject *tuple = PyTuple_New(CACHE_STATE);
    for (Py_ssize_t i = 0; tuple && i < CACHE_STATE; i++) {
        PyObject *value = PyLong_FromLongLong(values[i]);
        if (!value || PyTuple_SetItem(tuple, i, value) < 0)
            Py_CLEAR(tuple);
    }
    return tuple;
}

static PyObject *cache_restore_call(PyObject *object, PyObject *saved)
{
    const module_state *state = state_of(object);
    int64_t values[CACHE_STATE];
    Py_ssize_t size = PySequence_Size(saved);
    if (size != CACHE_STATE) {
        if (size >= 0)
            PyErr_Format(state->usage_error, "the state has %zd integers: pass the %d that state() gave", size,
                         CACHE_STATE);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < CACHE_STATE; i++) {
        PyObject *value = PySequence_GetItem(saved, i);
        int failed = !value || take_int(state->usage_error, "an integer of the state", value, &values[i]) < 0;
        Py_XDECREF(value);
        if (failed)
            return NULL;
    }
    cache_error error;
    cache_status status = cache_restore(&((CacheObject *)object)->cache, values, &error);
    if (status != CACHE_OK)
        return raise_status(state, status, &error);
    Py_RETURN_NONE;
}

typedef enum { ROWS, FRAME_TOKENS, WINDOW, SINK, MAX_ANCHORS, BASE, LOCAL_END, GLOBAL_END, ANCHORS } attribute;

static PyObject *get_attribute(PyObject *object, void *which)
{
    const cache *self = &((CacheObject *)object)->cache;
    const int64_t values[] = {
        [ROWS] = cache_rows(self),       [FRAME_TOKENS] = self->frame_tokens, [WINDOW] = self->window,
        [SINK] = self->sink,             [MAX_ANCHORS] = self->max_anchors,   [BASE] = self->base,
        [LOCAL_END] = self->local_end,   [GLOBAL_END] = self->global_end,     [ANCHORS] = self->anchors,
    };
    return PyLong_FromLongLong(values[(intptr_t)which]);
}

static PyObject *get_bridge(PyObject *object, void *Py_UNUSED(which))
{
    return PyBool_FromLong(((CacheObject *)object)->cache.bridge);
}

#define ATTRIBUTE(name, which, text) {name, get_attribute, NULL, text, (void *)(intptr_t)(which)}

static PyGetSetDef cache_attributes[] = {
    ATTRIBUTE("rows", ROWS, "R: rows of a layer's cache."),
    ATTRIBUTE("frame_tokens", FRAME_TOKENS, "P: tokens of a latent frame."),
    ATTRIBUTE("window", WINDOW, "W: frames that the cache holds, sink included."),
    ATTRIBUTE("sink", SINK, "S: first frames, which stay."),
    ATTRIBUTE("max_anchors", MAX_ANCHORS, "Rows kept for anchors."),
    ATTRIBUTE("base", BASE, "Absolute token of slot 0."),
    ATTRIBUTE("local_end", LOCAL_END, "L: tokens in use."),
    ATTRIBUTE("global_end", GLOBAL_END, "G: absolute end, in tokens."),
    ATTRIBUTE("anchors", ANCHORS, "Anchor rows that are keys."),
    {"has_bridge", get_bridge, NULL, "Whether the bridge rows are keys.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

#define FAST(function) (PyCFunction)(void (*)(void))(function), METH_FASTCALL | METH_KEYWORDS

static PyMethodDef cache_methods[] = {
    {"plan", FAST(cache_plan_call),
     "plan($self, start, frames, window, force_sink, segments)\n--\n\n"
     "Write the keys of a forward as int32 [6,2] (start, length); return how many keys."},
    {"commit", FAST(cache_commit_call),
     "commit($self, start, frames, force_sink, ranges)\n--\n\n"
     "Write int32 [4,3] (fresh start, row start, length) to copy; move the pointers; return how many ranges."},
    {"spans", FAST(cache_spans_call),
     "spans($self, bridge_recent, anchor_recent, out)\n--\n\n"
     "Write int32 [5,3,2] (start, length) of the rows that the injection averages."},
    {"set_memory", FAST(cache_set_memory_call),
     "set_memory($self, bridge, anchors)\n--\n\nSay which memory rows are keys."},
    {"clear", FAST(cache_clear_call),
     "clear($self, start)\n--\n\nEmpty the cache; the next forward starts at absolute frame `start`."},
    {"check_integrity", cache_check_call, METH_NOARGS,
     "check_integrity($self)\n--\n\nRaise IntegrityError unless every row is in its part and used once."},
    {"state", cache_state_call, METH_NOARGS, "state($self)\n--\n\nSizes and pointers, for restore()."},
    {"restore", cache_restore_call, METH_O,
     "restore($self, state)\n--\n\nTake the state() of a cache of the same sizes."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot cache_slots[] = {
    {Py_tp_doc, "Cache(frame_tokens, window, sink, max_anchors)\n--\n\n"
                "Rows of one session's memory cache: which are keys, which take new tokens."},
    {Py_tp_new, cache_new},
    {Py_tp_dealloc, cache_dealloc},
    {Py_tp_repr, cache_repr},
    {Py_tp_methods, cache_methods},
    {Py_tp_getset, cache_attributes},
    {0, NULL},
};

static PyType_Spec cache_spec = {
    .name = "swiftvideo.runtime._core.Cache",
    .basicsize = sizeof(CacheObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = cache_slots,
};

static int module_exec(PyObject *module)
{
    module_state *state = PyModule_GetState(module);
    PyObject *errors = PyImport_ImportModule("swiftvideo.runtime.errors");
    if (!errors)
        return -1;
    state->settings_error = PyObject_GetAttrString(errors, "SettingsError");
    state->usage_error = PyObject_GetAttrString(errors, "UsageError");
    state->integrity_error = PyObject_GetAttrString(errors, "IntegrityError");
    Py_DECREF(errors);
    if (!state->settings_error || !state->usage_error || !state->integrity_error)
        return -1;
    PyObject *type = PyType_FromModuleAndSpec(module, &cache_spec, NULL);
    if (!type)
        return -1;
    int failed = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return failed;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    module_state *state = PyModule_GetState(module);
    Py_VISIT(state->settings_error);
    Py_VISIT(state->usage_error);
    Py_VISIT(state->integrity_error);
    return 0;
}

static int module_clear(PyObject *module)
{
    module_state *state = PyModule_GetState(module);
    Py_CLEAR(state->settings_error);
    Py_CLEAR(state->usage_error);
    Py_CLEAR(state->integrity_error);
    return 0;
}

static void module_free(void *module) { module_clear(module); }

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static struct PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "swiftvideo.runtime._core",
    .m_doc = "The memory core: which cache rows a forward reads and writes (runtime/csrc).",
    .m_size = sizeof(module_state),
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&module_definition); }
