"""Backend `scalar`: the readable truth on the GPU."""

from flashcore.backends._cuda import CudaBackend
from flashcore.backends._registry import register


@register
class Scalar(CudaBackend):
    """`kernels/attention_scalar.cu`."""

    id = "scalar"
    title = "Our readable kernel, no Tensor Cores"
    kernel = "attention_scalar"
    swept = False  # seconds a call at long rows, and nobody would choose it for speed
