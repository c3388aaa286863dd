"""`counter-server prove`: load, faults and the checker, against a server that runs as it does for its users."""
