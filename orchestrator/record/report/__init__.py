"""What became of a run, for people: one page that loads nothing, and Markdown."""

from orchestrator.record.report.gather import leave_report, read_report
from orchestrator.record.report.markdown import to_markdown
from orchestrator.record.report.model import Report
from orchestrator.record.report.page import to_html
from orchestrator.record.report.summary import summary

__all__ = ["Report", "leave_report", "read_report", "summary", "to_html", "to_markdown"]
