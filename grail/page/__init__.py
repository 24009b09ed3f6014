"""report.html: what a run was asked and reached, as one page; several runs side by side."""

from .write import REPORT, page_of, write_report

__all__ = ["REPORT", "page_of", "write_report"]
