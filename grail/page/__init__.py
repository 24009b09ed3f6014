"""What a run tells of itself: report.html (one run, or several side by side), recipe.yaml and README.md, its
model card."""

from .write import REPORT, write_report, write_told

__all__ = ["REPORT", "write_report", "write_told"]
