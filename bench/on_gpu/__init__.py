"""The parts of the GPU benchmark, `bench/gpu.py`. They need torch and `aot_vllm`; Triton, where there are kernels."""
