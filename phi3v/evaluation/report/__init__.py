"""report.html: one file that says how a run went, fit to be sent to a colleague."""

from phi3v.evaluation.report.examples import Example
from phi3v.evaluation.report.page import Report, write_report
from phi3v.evaluation.report.records import Saved

__all__ = ["Example", "Report", "Saved", "write_report"]
