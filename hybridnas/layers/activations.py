"""Nonlinearities by the names that configs use; defined beside the kernels that apply them inside experts."""

from hybridnas.kernels.activations import ACTIVATIONS, activate

__all__ = ["ACTIVATIONS", "activate"]
