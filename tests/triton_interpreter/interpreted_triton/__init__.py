"""A Triton backend "cpu" that compiles nothing; with TRITON_INTERPRET=1 kernels run in Triton's interpreter.

vLLM's Model Runner V2 wants a Triton with a CPU backend on a machine without a GPU. Triton finds this one through its
entry-point group `triton.backends` when the parent folder is on the path.
"""
