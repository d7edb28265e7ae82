/* gather(address, count, width, out, behind): copy stretches of memory one behind the other.

   Stretch i is count[i] tokens of `width` bytes from address[i] on; both are int64 [n]. `out` takes them all, and
   behind[i] the token that stands behind stretch i. ValueError where the sizes do not fit; the addresses are believed.
   Other threads run meanwhile. */

#include "native.h"

enum { PAGE = 4096, AHEAD = 2 };

static int fits(const Py_buffer *address, const Py_buffer *count, int width, const Py_buffer *out, const Py_buffer *behind)
{
    Py_ssize_t n = count->len / 8, room = width > 0 ? out->len / width : -1;
    const int64_t *counts = count->buf;
    if (address->len != 8 * n || count->len != 8 * n || behind->len != width * n)
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

static void copy(const int64_t *address, const int64_t *count, Py_ssize_t n, int width, char *out, char *behind)
{
    for (Py_ssize_t i = 0; i < n; i++) {
        const char *from = (const char *)(intptr_t)address[i];
        size_t bytes = (size_t)count[i] * width;
        if (i + AHEAD < n)
            ask_for(address[i + AHEAD], count[i + AHEAD] * width);
        memcpy(out, from, bytes);
        memcpy(behind, from + bytes, width);
        out += bytes;
        behind += width;
    }
}

PyObject *gather(PyObject *module, PyObject *args)
{
    Py_buffer address, count, out, behind;
    int width, right;
    if (!PyArg_ParseTuple(args, "y*y*iw*w*", &address, &count, &width, &out, &behind))
        return NULL;
    if ((right = fits(&address, &count, width, &out, &behind))) {
        Py_BEGIN_ALLOW_THREADS
        copy(address.buf, count.buf, count.len / 8, width, out.buf, behind.buf);
        Py_END_ALLOW_THREADS
    } else
        PyErr_SetString(PyExc_ValueError, "gather: the sizes of its arguments do not fit");
    PyBuffer_Release(&address);
    PyBuffer_Release(&count);
    PyBuffer_Release(&out);
    PyBuffer_Release(&behind);
    if (!right)
        return NULL;
    Py_RETURN_NONE;
}
