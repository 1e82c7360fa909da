"""A CUDA device that is not there: what would crash, copy and wait on a GPU, found on a CPU.

    with PretendCuda() as cuda:
        policy = cuda.move(tiny_qwen3())                    # parameters and buffers say `cuda:0`
        engine = AtlasRolloutEngine(model=policy, ...)
        with cuda.section("decode"):
            engine.generate(...)
    print(cuda.table())                                     # every copy, wait and launch, by place

Inside, tensors made with `device="cuda"` or moved there are `CudaTensor`s: their numbers live on the CPU, everything else
behaves as it would on a GPU. `.device` says `cuda:0`, `.numpy()` raises, an operation that mixes them with CPU tensors
raises as torch would, and whatever makes the host wait is recorded with file and line:

    sync    the host waits: `.item()`, `.tolist()`, `if tensor`, `nonzero`, indexing by a mask, `unique`, `synchronize()`,
            of the device, of a stream, or of an event
    d2h     copy to the host, which waits as well
    h2d     blocking copy to the device (torch waits for the stream after a copy from pageable memory)
    h2d_async   from pinned memory with `non_blocking=True`: nobody waits
    d2h_async   likewise to pinned memory: whoever reads it must wait for an event first, which is not checked
    launch  an operation that starts at least one kernel (views and allocations start none)
    triton  a Triton kernel, see `kernels.py` (set TRITON_INTERPRET=1 before triton is first imported)
    build   something is compiled or planned for shapes or arguments that were not seen before, while everybody waits: a
            Triton kernel (0.3 to 3 s where its cache on disk is empty), an attention plan of cuDNN (25 ms to 1 s)

Triton's launches and graphs go to the current device, wherever the tensors are: `astray` lists those that went elsewhere.

Where it is blind: numbers are the CPU's; nothing takes time; streams run nothing apart, `torch.compile` and memory limits
are absent, graphs are there where they are asked for (`graphs.py`); of composite operations the CPU's decomposition is
counted, so launches are good to some tens of percent. Attention is computed by the CPU, and recorded as the backend that
CUDA would take (`attention.py`). C++ that groups tensors by device (`clip_grad_norm_`, `foreach` optimizers) sees the CPU:
copies to it that are recorded there are none on a GPU.

Needs no GPU build of torch: device indices, guards and streams of CUDA are never touched, because to C++ a `CudaTensor` is a
CPU tensor without memory of its own.
"""

from tests.pretend_cuda.device import PretendCuda
from tests.pretend_cuda.record import WAITS, Event
from tests.pretend_cuda.tensors import CUDA, CudaTensor

__all__ = ["CUDA", "WAITS", "CudaTensor", "Event", "PretendCuda"]
