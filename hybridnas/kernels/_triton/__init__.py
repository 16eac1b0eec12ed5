"""What the Triton kernels share at run time: launches with tuning (``launch``) and common sizes (``shapes``).

Importing this package does not import triton; ``launch`` and every ``kernels/OPERATION/triton.py`` do.
"""
