"""`counter-server prove`: load, kills and the checker, against a server as its users run it."""
