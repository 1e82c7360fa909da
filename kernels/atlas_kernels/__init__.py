"""Triton kernels of atlas_rl, each beside its eager reference; `docs/kernels.md` says what each computes and costs.

    verify          the policy's own choice at every drafted position, accepted counts and logprobs
    rejection       the same decisions by rejection sampling, with or without draft probabilities
    draw            one token per row of logits, over the whole or a reduced vocabulary
    truncate        logits without the tokens that top-k, top-p and min-p exclude
    draft_head      k tokens of the recurrent drafter over its reduced vocabulary
    nvfp4           a weight in NVFP4, and a linear layer that reads it
    noise           the random numbers of all kernels: one per (seed, request, position, token)

The modules `verify`, `rejection`, `draw`, `truncate`, `draft_head` and `nvfp4` check their arguments and dispatch: `x` to
`x_triton` for CUDA tensors, to `x_reference` elsewhere. Only modules named `*_triton` import Triton, and they are imported
on first use.

The folder `kernels/` is deliberately not a package: PyPI has a package named `kernels` that transformers imports, and a
`kernels/__init__.py` here would shadow it whenever the repository is on `sys.path`. This package is installed as
`atlas_kernels` (see `package-dir` in `pyproject.toml`).
"""
