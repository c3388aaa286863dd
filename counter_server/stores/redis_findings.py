"""What Redis and Valkey say of themselves, and what that means for the numbers. No connection here.

The settings and figures are those of https://redis.io/docs/latest/operate/oss_and_stack/management/persistence/ and of
https://redis.io/docs/latest/operate/oss_and_stack/management/replication/.
"""

from collections.abc import Mapping

from ..store import Finding

SETTINGS = ("appendfsync", "no-appendfsync-on-rewrite", "save", "min-replicas-to-write")

_FSYNC = {
    "always": Finding("ok", "appendonly yes, appendfsync always: a number is on its disk before it is answered"),
    "everysec": Finding("may lose", "appendfsync everysec: a power cut may take the last second or two"),
    "no": Finding("may lose", "appendfsync no: a power cut may take all that the kernel had not written yet"),
}


def judge(info: Mapping[str, str], config: Mapping[str, str] | None, refusal: str = "") -> list[Finding]:
    """The findings, in the order in which a person asks.

    :param info: the answer to ``INFO``.
    :param config: those of `SETTINGS` that the server knows; None if it refuses to tell.
    :param refusal: its words.
    """
    product = "Valkey" if "valkey_version" in info else "Redis"
    version = info.get("valkey_version") or info.get("redis_version", "of an unknown version")
    found = [Finding("ok", f"{product} {version}, a {info.get('role', 'server')}")]
    if config is None:
        found.append(Finding("may lose", f"CONFIG is not permitted, so how it writes cannot be told: {refusal}"))
    found += _kept(info, config)
    found.append(eviction(info))
    found += _replicated(info, config)
    return found


def _kept(info: Mapping[str, str], config: Mapping[str, str] | None) -> list[Finding]:
    found = []
    if info.get("aof_enabled") != "1":
        points = None if config is None else config.get("save")
        since = (
            "what was counted since its last snapshot" if points is None else f"what came since a snapshot ({points})"
        )
        lost = "everything: there are no snapshots either" if points == "" else since
        found.append(Finding("may lose", f"appendonly no: a restart loses {lost}"))
    elif config is not None:
        fsync = config.get("appendfsync", "?")
        found.append(_FSYNC.get(fsync, Finding("problem", f"appendfsync is {fsync!r}, of which nothing is known here")))
        if fsync == "always" and config.get("no-appendfsync-on-rewrite") == "yes":
            found.append(
                Finding("may lose", "no-appendfsync-on-rewrite yes: not on the disk while the file is rewritten")
            )
    found.extend(
        Finding("problem", f"{name} is {info[name]}: its disk has a fault, or is full")
        for name in ("aof_last_write_status", "rdb_last_bgsave_status")
        if info.get(name, "ok") != "ok"
    )
    return found


def eviction(info: Mapping[str, str]) -> Finding:
    """Whether a full server deletes what it holds."""
    most, policy = info.get("maxmemory", "?"), info.get("maxmemory_policy", "?")
    if most == "0":
        return Finding("ok", "maxmemory 0: nothing is evicted")
    if policy == "noeviction":
        return Finding("ok", f"maxmemory {most}, noeviction: a full server refuses to count, and loses nothing")
    if policy.startswith("volatile"):
        lost = "counters stay, but idempotency keys and the memory of clients go, so a repeated call may count twice"
    else:
        lost = "a full server deletes counters, all of them at once"
    return Finding("problem", f"maxmemory {most}, {policy}: {lost}; run CONFIG SET maxmemory-policy noeviction")


def _replicated(info: Mapping[str, str], config: Mapping[str, str] | None) -> list[Finding]:
    if info.get("role") != "master":
        return [Finding("problem", "it is a replica, which takes no writes: name the master")]
    replicas = info.get("connected_slaves", "0")
    if replicas == "0":
        return [Finding("ok", "no replicas: no failover that could lose numbers")]
    needed = "?" if config is None else config.get("min-replicas-to-write", "?")
    return [
        Finding(
            "may lose",
            f"{replicas} connected replicas, min-replicas-to-write {needed}: replication is asynchronous, so a failover"
            " may lose the last numbers, and give them again",
        )
    ]
