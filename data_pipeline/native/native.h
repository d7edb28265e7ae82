/* What Python's loops over documents and pieces would be too slow for. Each file has one function; what they are given,
   and what they return, are numpy arrays and bytes of one. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

PyObject *gather(PyObject *module, PyObject *args);
PyObject *fill(PyObject *module, PyObject *args);
PyObject *lay_out(PyObject *module, PyObject *args);

/* A result of `count` items: new bytes, and where to write them. */
static inline PyObject *result(void *at, Py_ssize_t count, Py_ssize_t itemsize)
{
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, count * itemsize);
    if (bytes)
        memcpy(at, &(char *){PyBytes_AsString(bytes)}, sizeof(char *));
    return bytes;
}
