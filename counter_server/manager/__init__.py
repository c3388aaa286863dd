"""The manager process and its clients: a `multiprocessing.managers` server that speaks MessagePack."""
