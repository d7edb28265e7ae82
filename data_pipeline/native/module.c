#include "native.h"

static PyMethodDef methods[] = {
    {"gather", gather, METH_VARARGS, "Copy stretches of memory one behind the other."},
    {"fill", fill, METH_VARARGS, "Put parts of documents into rows."},
    {"lay_out", lay_out, METH_VARARGS, "Find the stretches of memory that pieces of documents are made of."},
    {0},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "native", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_native(void)
{
    return PyModuleDef_Init(&module);
}
