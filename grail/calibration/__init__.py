"""Calibration and evaluation text: built-in, local files, hub data sets; always as windows of token ids."""

from .text import Windows, evaluation_windows, load_calibration

__all__ = ["Windows", "evaluation_windows", "load_calibration"]
