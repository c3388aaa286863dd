"""Reasons why a bar was missed, by its title, for the document. Their figures are from one run."""

WHY = {
    "2x16 volatile: times BaseManager proxy, AF_UNIX": (
        "waking the waiting thread takes the time, because the interpreter's lock changes hands each time: 1.3"
        " context switches per increment. As many threads that only send some bytes over such a socket and wait for an"
        " answer (AF_UNIX ping-pong) make 101,104 exchanges per second. Ours makes 100,240 increments, and the bar is"
        " 153,000"
    ),
    "2x16 volatile: times redis-py INCR, volatile": "the same as for the plain proxy; the bar is 178,000",
    "2x16 volatile: times pymemcache incr": "the same as for the plain proxy; the bar is 122,000",
    "2x16 volatile: times multiprocessing.Value": (
        "a lock in shared memory is mostly free, so it wakes no thread and takes 1 us"
    ),
    "2x16 volatile: times SQLite WAL, NORMAL": (
        "SQLite is quick because it is unfair: one thread counts, and others wait for up to half a second"
    ),
    "2x16 durable: times redis-py INCR, fsync always": (
        "Redis, too, shares one fsync among all waiting clients, so little is left to share"
    ),
    "2x16 durable: times PostgreSQL row update": (
        "PostgreSQL commits once per increment. Ours commits once per 8 or so, half of the 16 threads of a process,"
        " and as often as the disk allows. All 16 in each commit were tried: 5 % more here, and 5 to 15 % less at 4x4"
        " and 2x64"
    ),
    "1x1 volatile: median, of the plain proxy's": (
        "how the two processes wake each other decides, not their work. A ping-pong of some bytes takes 63.8 us in"
        " this run, and the plain proxy, which does much more, 38.6. With client and manager on one core (taskset) ours"
        " takes 24.0 us and the plain proxy 20.4, 1.18 times; with one core for each, 28 to 54 and 38 to 46"
    ),
    "2x16 volatile: p99, of the best networked peer's": (
        "not profiled: the scheduler decides on the slowest of a hundred"
    ),
    "2x16 durable: p99, of the best durable networked peer's": (
        "not profiled: the disk decides on the slowest of a hundred"
    ),
    "HTTP volatile: requests/s, of memory:// (wrong)": (
        "the processor time below. It varies with the other load of this machine's host: 0.73 to 1.18 in eight other"
        " runs of these two alone, with rounds of 1 to 4 seconds"
    ),
    "HTTP durable: requests/s, of memory:// (wrong)": (
        "each request waits for the disk, and only the 8 threads of each worker can wait at the same time. With 4"
        " threads it is a third less, with 12 a fifth"
    ),
    "HTTP volatile: times the view with redis-py": ("the processor time below"),
    "HTTP volatile: processor time per request, of memory:// (wrong)": (
        "the manager takes 17 us of it, and the client's half of a round trip 13. The rest is the cost of a waiting"
        " thread: it releases the interpreter's lock and must acquire it again, while its worker's other threads want"
        " it too. In the other runs it was 0.89 to 1.32 times"
    ),
    "1 to 1,000,000 counters, volatile: slowest median, of the quickest": (
        "memory that is not in the processor's caches: a counter that is used again and again takes as long among"
        " 100,000 as alone (22.2 us), and each of 10,000 used in turn takes 4 us more"
    ),
    "1 to 1,000,000 counters, durable: slowest median, of the quickest": (
        "the speed of the disk varies, so the growth is not steady"
    ),
    "start: python run.py, of bare Flask and waitress": (
        "importing takes most of it; manager and workers are forks of the supervisor and take 15 ms each"
    ),
}
