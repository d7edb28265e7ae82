/* lay_out(documents, tables, learned, pieces, width, itemsize, image, padding): where in memory the tokens of pieces are.

   documents: int64 [4, n]; of each the address of its first token, how many tokens it has, its table and its row there.
   tables: int64 [tables, 9], struct Table; learned: bool [roles]. pieces: int64 [3, m]; document, start and stop, in
   positions, of each; document -1 is padding, of which `padding` is the address.

   An image takes `width` positions, of which each holds the image token, and a document has one such token for each
   image: its positions are its tokens, with width - 1 image tokens more before each image's own. They are at `image`.
   `itemsize` is a token's bytes.

   Returns the arrays of layout.Layout as bytes. LookupError(i) where the table of document i contradicts itself, or a
   piece reaches over the document's end. */

#include "native.h"

typedef struct {
    int64_t rows; /* 0: documents of this table are plain tokens */
    const int32_t *image_offsets;
    const uint32_t *image_at; /* the token that stands for each image */
    int64_t images;
    const int32_t *span_offsets;
    const uint32_t *span_ends; /* tokens up to and with each span */
    const uint8_t *span_roles;
    int64_t spans;
    const float *weight;
} Table;
_Static_assert(sizeof(Table) == 72, "a table is nine numbers of 64 bits");

typedef struct {
    int64_t address, tokens, images, spans;
    const uint32_t *image_at, *span_ends;
    const uint8_t *span_roles;
    float weight;
} Document;

typedef struct {
    int64_t *bounds, *address, *count, *stretch_ends, *mask_bounds, *mask_ends, *image_place, *image_number, *image_ends;
    float *mask_value; /* all of these NULL while they are counted */
    Py_ssize_t stretches, runs, images;
    int64_t at; /* positions so far */
    int64_t width, itemsize, image, padding;
    const uint8_t *learned;
    Py_ssize_t roles;
} Layout;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Items [begin, begin + count) of a column of lists are those of `row`. */
static int listed(const int32_t *offsets, int64_t row, int64_t items, int64_t *begin, int64_t *count)
{
    *begin = offsets[row];
    *count = offsets[row + 1] - *begin;
    return *begin >= 0 && *count >= 0 && *begin + *count <= items;
}

static int look_up(Document *found, const Table *table, int64_t row, const Layout *to)
{
    int64_t image, span;
    if (!table->rows)
        return 1;
    if (row < 0 || row >= table->rows || !listed(table->image_offsets, row, table->images, &image, &found->images) ||
        !listed(table->span_offsets, row, table->spans, &span, &found->spans))
        return 0;
    found->image_at = table->image_at + image;
    found->span_ends = table->span_ends + span;
    found->span_roles = table->span_roles + span;
    found->weight = table->weight[row];
    for (int64_t i = 0; i < found->images; i++)
        if (found->image_at[i] >= found->tokens || (i && found->image_at[i] <= found->image_at[i - 1]))
            return 0;
    for (int64_t i = 0; i < found->spans; i++)
        if (found->span_roles[i] >= to->roles || (i && found->span_ends[i] < found->span_ends[i - 1]))
            return 0;
    return 1;
}

static void add_stretch(Layout *to, int64_t address, int64_t count)
{
    if (count <= 0)
        return;
    if (to->address) {
        to->address[to->stretches] = address;
        to->count[to->stretches] = count;
    }
    to->stretches++;
}

static void add_run(Layout *to, int64_t place, float value)
{
    if (to->mask_bounds) {
        to->mask_bounds[to->runs] = place;
        to->mask_value[to->runs] = value;
    }
    to->runs++;
}

static void add_image(Layout *to, int64_t place, int64_t number)
{
    if (to->image_place) {
        to->image_place[to->images] = place;
        to->image_number[to->images] = number;
    }
    to->images++;
}

/* Positions [start, stop) of a document: its tokens, and the image tokens that stand before each image's own. */
static void add_tokens(Layout *to, const Document *document, int64_t start, int64_t stop)
{
    int64_t token = 0, place = 0; /* the next stretch of tokens begins with this token, at this position */
    for (int64_t i = 0; place < stop; i++) {
        int64_t until = i < document->images ? document->image_at[i] : document->tokens, end = place + until - token;
        int64_t from = most(place, start);
        add_stretch(to, document->address + (token + from - place) * to->itemsize, least(end, stop) - from);
        if (i == document->images)
            return;
        if (start <= end && end < stop)
            add_image(to, to->at + end - start, i);
        token = until;
        place = end + to->width - 1;
        from = most(end, start);
        add_stretch(to, to->image, least(place, stop) - from);
    }
}

/* The weights of the labels of these positions. The label of a position is the token behind it. */
static void add_runs(Layout *to, const Document *document, int64_t start, int64_t stop)
{
    int64_t from = 0, image = 0; /* the position that the span begins at, the first image that is not before its end */
    if (!document->spans)
        add_run(to, to->at, document->weight);
    for (int64_t i = 0; i < document->spans && from < stop; i++) {
        int64_t end = document->span_ends[i], until = stop;
        while (image < document->images && document->image_at[image] < end)
            image++;
        if (i + 1 < document->spans)
            until = most(end + image * (to->width - 1) - 1, from);
        if (most(from, start) < least(until, stop))
            add_run(to, to->at + most(from, start) - start, to->learned[document->span_roles[i]] ? document->weight : 0);
        from = until;
    }
}

static int64_t positions(const Document *document, int64_t width)
{
    return document->tokens - 1 + document->images * (width - 1);
}

/* -1, or the document that is wrong. */
static int64_t add_all(Layout *to, const int64_t *documents, Py_ssize_t n, const Table *tables, Py_ssize_t table_count,
                       const int64_t *pieces, Py_ssize_t m)
{
    to->at = to->stretches = to->runs = to->images = 0;
    for (Py_ssize_t i = 0; i < m; i++) {
        int64_t number = pieces[i], start = pieces[m + i], stop = pieces[2 * m + i];
        if (to->bounds)
            to->bounds[i] = to->at;
        if (number < 0) {
            add_stretch(to, to->padding, stop - start);
            add_run(to, to->at, 0);
        } else {
            if (number >= n)
                return number;
            int64_t table = documents[2 * n + number];
            Document document = {.address = documents[number], .tokens = documents[n + number], .weight = 1};
            if (table < 0 || table >= table_count || !look_up(&document, &tables[table], documents[3 * n + number], to))
                return number;
            if (start < 0 || start >= stop || stop > positions(&document, to->width))
                return number;
            add_tokens(to, &document, start, stop);
            add_runs(to, &document, start, stop);
        }
        to->at += stop - start;
        if (to->bounds) {
            to->stretch_ends[i] = to->stretches;
            to->mask_ends[i] = to->runs;
            to->image_ends[i] = to->images;
        }
    }
    if (to->bounds)
        to->bounds[m] = to->mask_bounds[to->runs] = to->at;
    return -1;
}

static PyObject *results(Layout *to, Py_ssize_t m)
{
    PyObject *found = PyTuple_New(10), *bytes;
    struct { void *at; Py_ssize_t count, itemsize; } wanted[] = {
        {&to->bounds, m + 1, 8},
        {&to->address, to->stretches, 8},
        {&to->count, to->stretches, 8},
        {&to->stretch_ends, m, 8},
        {&to->mask_bounds, to->runs + 1, 8},
        {&to->mask_ends, m, 8},
        {&to->image_place, to->images, 8},
        {&to->image_number, to->images, 8},
        {&to->image_ends, m, 8},
        {&to->mask_value, to->runs, 4},
    };
    for (int i = 0; found && i < 10; i++) {
        if (!(bytes = result(wanted[i].at, wanted[i].count, wanted[i].itemsize)) || PyTuple_SetItem(found, i, bytes)) {
            Py_DECREF(found);
            return NULL;
        }
    }
    return found;
}

PyObject *lay_out(PyObject *module, PyObject *args)
{
    Py_buffer documents, tables, learned, pieces;
    Layout to = {0};
    PyObject *found = NULL;
    if (!PyArg_ParseTuple(args, "y*y*y*y*LLLL", &documents, &tables, &learned, &pieces, &to.width, &to.itemsize, &to.image,
                          &to.padding))
        return NULL;
    Py_ssize_t n = documents.len / 32, m = pieces.len / 24, count = tables.len / sizeof(Table);
    to.learned = learned.buf;
    to.roles = learned.len;
    int64_t wrong;
    Py_BEGIN_ALLOW_THREADS
    wrong = add_all(&to, documents.buf, n, tables.buf, count, pieces.buf, m);
    Py_END_ALLOW_THREADS
    if (wrong >= 0) {
        PyObject *number = PyLong_FromLongLong(wrong);
        PyErr_SetObject(PyExc_LookupError, number);
        Py_XDECREF(number);
    } else if ((found = results(&to, m)))
        add_all(&to, documents.buf, n, tables.buf, count, pieces.buf, m);
    PyBuffer_Release(&documents);
    PyBuffer_Release(&tables);
    PyBuffer_Release(&learned);
    PyBuffer_Release(&pieces);
    return found;
}
