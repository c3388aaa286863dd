"""What PostgreSQL says of itself, and what that means for the numbers. No connection here.

The settings are those of https://www.postgresql.org/docs/current/runtime-config-wal.html and
https://www.postgresql.org/docs/current/runtime-config-replication.html.
"""

from collections.abc import Mapping

from ..store import Finding

QUERY = """
SELECT name, setting FROM pg_settings
WHERE name IN ('server_version', 'fsync', 'full_page_writes', 'synchronous_commit', 'synchronous_standby_names')
UNION ALL SELECT 'in_recovery', pg_is_in_recovery()::text
UNION ALL SELECT 'standbys', count(*)::text FROM pg_stat_replication
"""

_WAITS = {  # what a commit waits for, of a standby that is a synchronous one
    "on": Finding("ok", "synchronous_commit on: a number is on a synchronous standby's disk, too"),
    "remote_apply": Finding("ok", "synchronous_commit remote_apply: a synchronous standby has and shows a number, too"),
    "remote_write": Finding(
        "may lose", "synchronous_commit remote_write: a failover to a standby whose machine fails as well loses numbers"
    ),
    "local": Finding("may lose", "synchronous_commit local: a failover may lose the last numbers, and give them again"),
}


def judge(told: Mapping[str, str]) -> list[Finding]:
    """The findings, in the order in which a person asks.

    :param told: the answer to `QUERY`, in which ``synchronous_commit off`` means "on": our transactions set it so.
    """
    found = [Finding("ok", f"PostgreSQL {told['server_version']}")]
    if told["in_recovery"] == "true":
        return [*found, Finding("problem", "it is a standby, which takes no writes: name the primary")]
    if told["fsync"] == "on":
        found.append(Finding("ok", "fsync on: a number is on its disk before it is answered"))
    else:
        found.append(Finding("may lose", "fsync off: a power cut may destroy the whole database"))
    if told["full_page_writes"] != "on":
        found.append(Finding("may lose", "full_page_writes off: a power cut may destroy pages of it"))
    if told["standbys"] == "0" and not told["synchronous_standby_names"]:
        found.append(Finding("ok", "no standbys: no failover that could lose numbers"))
    elif told["synchronous_standby_names"]:
        found.append(_WAITS[told["synchronous_commit"].replace("off", "on")])
    else:
        found.append(
            Finding(
                "may lose",
                f"{told['standbys']} standbys, none of them synchronous: a failover may lose the last numbers,"
                " and give them again",
            )
        )
    return found
