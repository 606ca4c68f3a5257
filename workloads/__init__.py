"""Programs that run inside Ray. They import orchestrator; orchestrator never imports them."""
