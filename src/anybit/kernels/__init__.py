"""Kernels: each a spec (torch-free: what it can run, how it stores, what it costs) and an implementation.

Specs are rows of `catalogue.KERNELS`; an implementation is a string there and imported only when chosen.
"""
