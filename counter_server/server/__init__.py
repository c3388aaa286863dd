"""The supervisor and its workers: one port, several processes, none left behind."""
