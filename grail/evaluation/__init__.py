"""Figures of merit of a written checkpoint."""
