"""`make gpu`."""

from benchmarks.gpu import checkout  # noqa: F401  # isort: skip

from benchmarks.gpu.run import main

main()
