"""Takes armillary from this checkout where it is not installed: the Python that has PyTorch for a GPU is not
that of `make install`. To be imported before anything of armillary.
"""

import importlib.util
from pathlib import Path

import armillary

if importlib.util.find_spec("armillary.kernels") is None:
    armillary.__path__.append(str(Path(__file__).parents[2]))
