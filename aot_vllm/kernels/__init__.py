"""The same method on a GPU: Triton kernels for the parts of `aot_vllm.core.algorithms`.

Importing this package or `dispatch` does not load triton. The other modules do.
"""
