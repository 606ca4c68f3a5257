"""What happened in a run, as events in the store."""

from orchestrator.record.events import Event, EventLog, EventReader

__all__ = ["Event", "EventLog", "EventReader"]
