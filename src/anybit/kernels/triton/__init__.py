"""Triton kernels: one source for CUDA and ROCm. Specs that name them stand in `kernels/linear`, torch-free."""
