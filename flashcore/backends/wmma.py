"""Backend `wmma`: Tensor Cores through nvcuda::wmma."""

from flashcore.backends._cuda import CudaBackend
from flashcore.backends._registry import register


@register
class Wmma(CudaBackend):
    """`kernels/attention_wmma.cu`."""

    id = "wmma"
    title = "Our WMMA kernel ('Phase 3A')"
    kernel = "attention_wmma"
