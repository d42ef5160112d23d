"""Backend `wmma`: Tensor Cores through nvcuda::wmma."""

from flashcore.backends import register
from flashcore.backends._cuda import CudaBackend


@register
class Wmma(CudaBackend):
    """`kernels/attention_wmma.cu`."""

    id = "wmma"
    title = "Our WMMA kernel ('Phase 3A')"
    kernel = "attention_wmma"
