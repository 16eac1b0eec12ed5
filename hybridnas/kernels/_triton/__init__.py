"""What the Triton kernels share: launching with tuning, ahead-of-time compiling and its report, counted traffic.

Importing this package does not import triton; ``launch``, ``compiled`` and every ``kernels/OP/triton.py`` do.
"""
