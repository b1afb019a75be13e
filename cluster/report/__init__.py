"""The report of a run: one HTML file from its folder."""

from isthmus.cluster.report.page import Extra, write_report

__all__ = ["Extra", "write_report"]
