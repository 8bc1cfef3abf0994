"""Reports and records: what happened to every op, and with which numbers."""
