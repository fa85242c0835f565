"""The engine's ops as Triton kernels, one op a file. `specengine.kernels.reference` holds them in PyTorch."""
