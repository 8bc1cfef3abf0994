"""Settings: what a user configured, by module name, type, operator, node or edge, and which setting a node has."""
