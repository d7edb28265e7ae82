/* gather(address, count, last, width, out, behind): copy stretches of memory one behind the other.

   Stretch i is count[i] tokens of `width` bytes from address[i] on; both are int64 [n]. `out` takes them all, and
   behind[p] the token that stands behind stretch last[p]; int64 [m], rising. ValueError where the sizes do not fit; the
   addresses are believed. Other threads run meanwhile. */

#include "native.h"

enum { PAGE = 4096, AHEAD = 2 };

static int fits(const Py_buffer *address, const Py_buffer *count, const Py_buffer *last, int width, const Py_buffer *out,
                const Py_buffer *behind)
{
    Py_ssize_t n = count->len / 8, m = last->len / 8, room = width > 0 ? out->len / width : -1;
    const int64_t *counts = count->buf, *lasts = last->buf;
    if (address->len != 8 * n || count->len != 8 * n || last->len != 8 * m || behind->len != width * m)
        return 0;
    for (Py_ssize_t p = 0; p < m; p++)
        if (lasts[p] <= (p ? lasts[p - 1] : -1) || lasts[p] >= n)
            return 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        if (counts[i] < 0 || counts[i] > room)
            return 0;
        room -= counts[i];
    }
    return room == 0 && out->len % width == 0;
}

/* Ask for a stretch before its turn: the first line of each page, since what reads ahead in hardware stops at pages. */
static void ask_for(int64_t address, int64_t bytes)
{
    for (int64_t at = address; at < address + bytes; at = (at / PAGE + 1) * PAGE)
        __builtin_prefetch((const char *)(intptr_t)at);
}

static void copy(const int64_t *address, const int64_t *count, Py_ssize_t n, const int64_t *last, Py_ssize_t m, int width,
                 char *out, char *behind)
{
    Py_ssize_t piece = 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        const char *from = (const char *)(intptr_t)address[i];
        size_t bytes = (size_t)count[i] * width;
        if (i + AHEAD < n)
            ask_for(address[i + AHEAD], count[i + AHEAD] * width);
        memcpy(out, from, bytes);
        if (piece < m && last[piece] == i)
            memcpy(behind + width * piece++, from + bytes, width);
        out += bytes;
    }
}

PyObject *gather(PyObject *module, PyObject *args)
{
    Py_buffer address, count, last, out, behind;
    int width, right;
    if (!PyArg_ParseTuple(args, "y*y*y*iw*w*", &address, &count, &last, &width, &out, &behind))
        return NULL;
    if ((right = fits(&address, &count, &last, width, &out, &behind))) {
        Py_BEGIN_ALLOW_THREADS
        copy(address.buf, count.buf, count.len / 8, last.buf, last.len / 8, width, out.buf, behind.buf);
        Py_END_ALLOW_THREADS
    } else
        PyErr_SetString(PyExc_ValueError, "gather: the sizes of its arguments do not fit");
    PyBuffer_Release(&address);
    PyBuffer_Release(&count);
    PyBuffer_Release(&last);
    PyBuffer_Release(&out);
    PyBuffer_Release(&behind);
    if (!right)
        return NULL;
    Py_RETURN_NONE;
}
