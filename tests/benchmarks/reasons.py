"""Why a bar falls short where it does, by its title: the document tells it. Its figures are of one run."""

WHY = {
    "2x16 volatile: times BaseManager proxy, AF_UNIX": (
        "what takes the time is to wake the thread that waits, with the interpreter's lock to be handed over each"
        " time: 1.3 context switches for each increment. As many threads that only send some bytes over such a socket"
        " and wait for an answer (AF_UNIX ping-pong) get 101,104 of them in a second, ours 100,240 increments, and the"
        " bar is 153,000"
    ),
    "2x16 volatile: times redis-py INCR, volatile": "the same as for the plain proxy; the bar is 178,000",
    "2x16 volatile: times pymemcache incr": "the same as for the plain proxy; the bar is 122,000",
    "2x16 volatile: times multiprocessing.Value": (
        "of a lock in shared memory that is mostly free nobody has to be woken, and it takes 1 us"
    ),
    "2x16 volatile: times SQLite WAL, NORMAL": (
        "SQLite is quick because it is unfair: one thread counts, and others wait for up to half a second"
    ),
    "2x16 durable: times redis-py INCR, fsync always": (
        "Redis, too, shares an fsync among all who wait: little is left to share"
    ),
    "2x16 durable: times PostgreSQL row update": (
        "it commits once for each increment, ours once for about 8, half of what 16 threads of a process have to"
        " ask, and as often as the disk takes it. All 16 in each commit were tried: 5 % more here, and 5 to 15 %"
        " less at 4x4 and 2x64"
    ),
    "1x1 volatile: median, of the plain proxy's": (
        "how the two processes wake each other decides, not what they do: a ping-pong of some bytes takes 63.8 us"
        " in this run, the plain proxy, which does much more, 38.6. With client and manager on one core (taskset)"
        " ours takes 24.0 us and the plain proxy 20.4, 1.18 times; with one core for each 28 to 54 and 38 to 46"
    ),
    "2x16 volatile: p99, of the best networked peer's": (
        "not profiled: the scheduler decides on the slowest of a hundred"
    ),
    "2x16 durable: p99, of the best durable networked peer's": (
        "not profiled: the disk decides on the slowest of a hundred"
    ),
    "HTTP volatile: requests/s, of memory:// (wrong)": (
        "the processor time below. It goes up and down with what else the host of this machine does: in eight other"
        " runs of these two alone, with rounds of 1 to 4 seconds, 0.73 to 1.18"
    ),
    "HTTP durable: requests/s, of memory:// (wrong)": (
        "each request waits for the disk, and no more than the 8 threads of each worker can wait at the same time:"
        " with 4 threads it is a third less, with 12 a fifth"
    ),
    "HTTP volatile: times the view with redis-py": ("the processor time below"),
    "HTTP volatile: processor time per request, of memory:// (wrong)": (
        "17 us of it are the manager's, 13 the client's half of a round trip. The rest is what a thread pays that"
        " waits: it gives the interpreter's lock away and has to be given it again, while its worker's other"
        " threads want it too. In the other runs it was 0.89 to 1.32 times"
    ),
    "1 to 1,000,000 counters, volatile: slowest median, of the quickest": (
        "memory that the processor's caches do not hold: one counter that is used again and again takes as long"
        " among 100,000 as alone (22.2 us), one in turn of 10,000 takes 4 us more"
    ),
    "1 to 1,000,000 counters, durable: slowest median, of the quickest": (
        "the disk, which is not always the same: the growth is not steady"
    ),
    "start: python run.py, of bare Flask and waitress": (
        "importing takes most of it; manager and workers are forks of the supervisor and take 15 ms each"
    ),
}
