"""The arithmetic that all else is held against: inputs, a float64 reference, error bounds, output buffers.

`reference` is attention stage by stage in float64, `inputs` makes tensors in known patterns and layouts, and
`tolerance` says how large an error may be and counts the values beyond it. `masking` holds and checks the tensors that
masks need beside Q, K and V. `ambient` keeps what is set around a call out of it, `plain` turns its arguments into
plain values, and `transforms` refuses what a forward pass would lose. `instruments` watches that nothing of what judges
is replaced, and `seen` says which keys a query sees. Nothing here knows a backend, a kernel or a GPU.
"""

__all__ = [
    "ambient", "inputs", "instruments", "masking", "outputs", "plain", "reference", "seen", "tolerance",
    "transforms",
]  # fmt: skip
