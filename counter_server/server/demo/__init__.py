"""See the race: one small app, behind the servers and with the ways to share a number that people use."""
