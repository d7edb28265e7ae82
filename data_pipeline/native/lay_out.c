/* lay_out(documents, tables, learned, document, start, stop, width, itemsize, image, padding): where in memory the tokens
   of pieces are.

   documents: int64 [4, n]; of each the address of its first token, how many tokens it has, its table and its row there,
   where -1 stands for one of nothing but tokens.
   tables: int64 [tables, 9], struct Table; learned: bool [roles]. document, start and stop: int64 [m], of each piece, in
   positions; document -1 is padding, of which `padding` is the address.

   An image takes `width` positions, of which each holds the image token, and a document has one such token for each
   image: its positions are its tokens, with width - 1 image tokens more before each image's own. They are at `image`.
   `itemsize` is a token's bytes.

   Returns the arrays of layout.Layout as bytes. LookupError(i) where the table of document i contradicts itself, or a
   piece reaches over the document's end; OverflowError where there are 2^31 positions or more. */

#include "native.h"

typedef struct {
    int64_t rows;
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
    int32_t *bounds, *mask_bounds;
    int64_t *address, *count, *last, *image_place, *image_number, *image_piece;
    float *mask_value; /* all of these NULL while they are counted */
    Py_ssize_t stretches, runs, images;
    int64_t at, piece; /* positions so far, and pieces */
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
    if (row == -1)
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
        to->mask_bounds[to->runs] = (int32_t)place;
        to->mask_value[to->runs] = value;
    }
    to->runs++;
}

static void add_image(Layout *to, int64_t place, int64_t number)
{
    if (to->image_place) {
        to->image_place[to->images] = place;
        to->image_number[to->images] = number;
        to->image_piece[to->images] = to->piece;
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
                       const int64_t *numbers, const int64_t *starts, const int64_t *stops, Py_ssize_t m)
{
    to->at = to->stretches = to->runs = to->images = 0;
    for (Py_ssize_t i = 0; i < m; i++) {
        int64_t number = numbers[i], start = starts[i], stop = stops[i];
        to->piece = i;
        if (to->bounds)
            to->bounds[i] = (int32_t)to->at;
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
        if (to->last)
            to->last[i] = to->stretches - 1;
    }
    if (to->bounds)
        to->bounds[m] = to->mask_bounds[to->runs] = (int32_t)to->at;
    return -1;
}

static PyObject *results(Layout *to, Py_ssize_t m)
{
    PyObject *found = PyTuple_New(9), *bytes;
    struct { void *at; Py_ssize_t count, itemsize; } wanted[] = {
        {&to->bounds, m + 1, 4},
        {&to->address, to->stretches, 8},
        {&to->count, to->stretches, 8},
        {&to->last, m, 8},
        {&to->mask_bounds, to->runs + 1, 4},
        {&to->mask_value, to->runs, 4},
        {&to->image_place, to->images, 8},
        {&to->image_number, to->images, 8},
        {&to->image_piece, to->images, 8},
    };
    for (int i = 0; found && i < 9; i++) {
        if (!(bytes = result(wanted[i].at, wanted[i].count, wanted[i].itemsize)) || PyTuple_SetItem(found, i, bytes)) {
            Py_DECREF(found);
            return NULL;
        }
    }
    return found;
}

PyObject *lay_out(PyObject *module, PyObject *args)
{
    Py_buffer given[6]; /* documents, tables, learned, document, start, stop */
    Layout to = {0};
    PyObject *found = NULL;
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*y*LLLL", &given[0], &given[1], &given[2], &given[3], &given[4], &given[5],
                          &to.width, &to.itemsize, &to.image, &to.padding))
        return NULL;
    Py_ssize_t n = given[0].len / 32, m = given[3].len / 8, count = given[1].len / sizeof(Table);
    to.learned = given[2].buf;
    to.roles = given[2].len;
    if (given[4].len != given[3].len || given[5].len != given[3].len)
        PyErr_SetString(PyExc_ValueError, "lay_out: the columns of its pieces are not of one length");
    else {
        int64_t wrong = add_all(&to, given[0].buf, n, given[1].buf, count, given[3].buf, given[4].buf, given[5].buf, m);
        if (wrong >= 0) {
            PyObject *number = PyLong_FromLongLong(wrong);
            PyErr_SetObject(PyExc_LookupError, number);
            Py_XDECREF(number);
        } else if (to.at > INT32_MAX)
            PyErr_SetString(PyExc_OverflowError, "lay_out: too many positions");
        else if ((found = results(&to, m)))
            add_all(&to, given[0].buf, n, given[1].buf, count, given[3].buf, given[4].buf, given[5].buf, m);
    }
    for (int i = 0; i < 6; i++)
        PyBuffer_Release(&given[i]);
    return found;
}
