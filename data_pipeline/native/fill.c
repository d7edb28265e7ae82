/* fill(parts, length, most, alone): put parts of documents into rows of `length` positions and at most `most` images.

   parts: int64 [4, n]; document, start, length and images of each. They come in their order; a part without images is
   cut where a row ends, one with images opens the next row where it has no room. `alone`: each document opens a row.
   What is left of a row becomes a piece of document -1.

   Returns (pieces, row_ends): int64 [3, m], document, start and stop of each; int64 [rows], pieces up to and with each
   row. ValueError where a part has no length, or has images and does not fit in a row. */

#include "native.h"

typedef struct {
    int64_t length, most;           /* positions and images of a row */
    int64_t room, images;           /* what is left of the open one */
    Py_ssize_t pieces, rows;        /* so many there are */
    int64_t *document, *start, *stop, *row_ends; /* NULL while they are counted */
} Rows;

static void put(Rows *to, int64_t document, int64_t start, int64_t length)
{
    if (to->document) {
        to->document[to->pieces] = document;
        to->start[to->pieces] = start;
        to->stop[to->pieces] = start + length;
    }
    to->pieces++;
    to->room -= length;
}

static void close_row(Rows *to)
{
    if (to->room)
        put(to, -1, 0, to->room);
    if (to->row_ends)
        to->row_ends[to->rows] = to->pieces;
    to->rows++;
    to->room = to->length;
    to->images = to->most;
}

static int put_part(Rows *to, int64_t document, int64_t start, int64_t length, int64_t images)
{
    if (length <= 0 || images < 0 || images > to->most || (images && length > to->length))
        return 0;
    if (images && (length > to->room || images > to->images))
        close_row(to);
    to->images -= images;
    for (int64_t here; length; start += here, length -= here) {
        if (!to->room)
            close_row(to);
        here = length < to->room ? length : to->room;
        put(to, document, start, here);
    }
    return 1;
}

static int put_all(Rows *to, const int64_t *parts, Py_ssize_t n, int alone)
{
    const int64_t *document = parts, *start = parts + n, *length = parts + 2 * n, *images = parts + 3 * n;
    to->room = to->length;
    to->images = to->most;
    to->pieces = to->rows = 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        if (alone && i && document[i] != document[i - 1])
            close_row(to);
        if (!put_part(to, document[i], start[i], length[i], images[i]))
            return 0;
    }
    if (n)
        close_row(to);
    return 1;
}

PyObject *fill(PyObject *module, PyObject *args)
{
    Py_buffer parts;
    Rows rows = {0};
    int alone;
    PyObject *pieces = NULL, *row_ends = NULL;
    if (!PyArg_ParseTuple(args, "y*LLp", &parts, &rows.length, &rows.most, &alone))
        return NULL;
    Py_ssize_t n = parts.len / 32;
    if (rows.length <= 0 || parts.len % 32 || !put_all(&rows, parts.buf, n, alone))
        PyErr_SetString(PyExc_ValueError, "fill: a part does not fit in a row");
    else if ((pieces = result(&rows.document, 3 * rows.pieces, 8)) && (row_ends = result(&rows.row_ends, rows.rows, 8))) {
        rows.start = rows.document + rows.pieces;
        rows.stop = rows.start + rows.pieces;
        put_all(&rows, parts.buf, n, alone);
    }
    PyBuffer_Release(&parts);
    if (PyErr_Occurred()) {
        Py_XDECREF(pieces);
        return NULL;
    }
    return Py_BuildValue("NN", pieces, row_ends);
}
