"""`make gpu`. Armillary is taken from this checkout where it is not installed: the Python that has PyTorch for a GPU is
another one than that of `make install`."""

import importlib.util
from pathlib import Path

import armillary

if importlib.util.find_spec("armillary.kernels") is None:
    armillary.__path__.append(str(Path(__file__).parents[2]))

from benchmarks.gpu.run import main

main()
