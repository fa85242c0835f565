"""The only dispatcher: one `Backend` holds every op, in Triton, native C++ or plain PyTorch.

`native` and `triton` promise bits: a row's result never depends on the rows computed with it. `reference`
promises mathematics only.
"""
