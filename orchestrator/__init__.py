"""Headway: from one run file to a served model."""

__version__ = "0.1.0"
