"""Kernels of y = x W^T (+ bias), their lookups (embeddings) and their experts: one file a family."""
