"""Developer tools for the Triton kernels: ahead-of-time compilation for GPUs, register and memory use, counted traffic.

``python -m hybridnas.bench.triton.report`` compiles every kernel for GPUs that need not be here.
"""
