"""Maps the folders on top to sub-packages of `armillary`, and compiles what is in C; the rest: pyproject.toml."""

from pathlib import Path

from setuptools import Extension, setup

HERE = Path(__file__).parent
TOP = ("launcher", "model", "kernels", "data_pipeline", "training", "planner", "evals", "k8s")

folders = {"armillary": "armillary"}
for top in TOP:
    for init in sorted((HERE / top).rglob("__init__.py")):
        folder = init.parent.relative_to(HERE)
        folders[".".join(("armillary", *folder.parts))] = folder.as_posix()

native = Extension(
    "armillary.data_pipeline.native",
    [f"data_pipeline/native/{name}.c" for name in ("module", "gather", "fill", "lay_out")],
    depends=["data_pipeline/native/native.h"],
    py_limited_api=True,
)

data = {"armillary.planner": ["constants.toml", "hardware/*.toml"], "armillary.launcher": ["templates/*.html"]}

setup(packages=list(folders), package_dir=folders, package_data=data, ext_modules=[native])
