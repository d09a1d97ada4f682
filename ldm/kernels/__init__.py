"""What a CPU computes faster than by torch's own: `convolution` by products of matrices, and kernels in C++.

`native` calls those, `build` compiles them, `packed` keeps weights in their order. All know tensors
and nothing of networks. Where kernels cannot be had, whoever calls them takes torch's way.
"""
