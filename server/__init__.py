"""The daemon's outside: protocol, configuration, metrics, and the composition of all rooms."""
