"""Kernels of our own for a CPU, in C++, where they beat torch's: `native` calls them, `build` compiles them.

They know tensors and nothing of networks. Where they cannot be had, whoever calls them takes torch's way.
"""
