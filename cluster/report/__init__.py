"""The report of a run: one HTML file from its folder."""

from isthmus.cluster.report.page import ReportExtras, write_report

__all__ = ["ReportExtras", "write_report"]
