"""Triton kernels of atlas_rl, each beside its eager reference.

The folder `kernels/` is deliberately not a package: PyPI has a package named `kernels` that transformers imports, and a
`kernels/__init__.py` here would shadow it whenever the repository is on `sys.path`. This package is installed as
`atlas_kernels` (see `package-dir` in `pyproject.toml`).
"""
