"""The arithmetic that everything is held against: inputs, the float64 reference, bounds on errors, output buffers.

`reference` is attention stage by stage in float64, `inputs` makes tensors in known patterns and layouts, and
`tolerance` says how large an error may be and counts the values beyond it. Nothing here knows a
backend, a kernel or a GPU.
"""

__all__ = ["inputs", "outputs", "reference", "tolerance"]
