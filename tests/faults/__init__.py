"""Inputs, numbers and machines that are broken on purpose: an error that says so, or a correct result."""
