"""Reasons why a bar was missed, by its title, for the document. Their figures are from one run."""

WHY = {
    "2x16 volatile: times BaseManager proxy, AF_UNIX": (
        "waking the waiting thread takes the time, because the interpreter's lock changes hands each time: 1.3"
        " context switches per increment. As many threads that only send some bytes over such a socket and wait for an"
        " answer (AF_UNIX ping-pong) made 61,119 exchanges per second when ours made 39,161 increments, and the bar was"
        " 59,000"
    ),
    "2x16 volatile: times redis-py INCR, volatile": "the same as for the plain proxy",
    "2x16 volatile: times pymemcache incr": "the same as for the plain proxy",
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
        "PostgreSQL commits once per increment, and so 1,600 times per second. Ours commits once for 15, nearly all"
        " threads of a process, and as often"
    ),
    "2x16 durable: commits, of raw append and fdatasync": (
        "a commit has 15 increments since all threads of a process go together. In halves, commits were 0.61 of the raw"
        " appends, and increments a third fewer"
    ),
    "1x1 volatile: median, of the plain proxy's": (
        "how the two processes wake each other decides, not their work. In three runs of one day it was"
        " 1.06, 1.10 and 1.33 times. With client and manager on one core (taskset) ours"
        " takes 24.0 us and the plain proxy 20.4, 1.18 times; with one core for each, 28 to 54 and 38 to 46"
    ),
    "2x16 volatile: p99, of the best networked peer's": (
        "not profiled: the scheduler decides on the slowest of a hundred"
    ),
    "2x16 durable: p99, of the best durable networked peer's": (
        "not profiled: the disk decides on the slowest of a hundred"
    ),
    "HTTP, our API, volatile: requests/s, of the bare view's": "the processor time below; 0.64 to 0.83 in seven runs",
    "HTTP, our API, volatile: processor time, of the bare view's": (
        "the manager takes 40 us of it and our layers 40. The rest is the cost of threads that wait: the same functions"
        " of Flask and waitress take longer while manager, workers and load share two cores, and each thread wakes on"
        " another one. With each worker bound to a core all were 15 to 25 % quicker, the bare view too. A server must"
        " not do that: another program would then hold up a worker"
    ),
    "HTTP, our API, durable: requests/s, of the bare view's": "the processor time below; 0.56 to 0.61 in three runs",
    "HTTP, our API, durable: processor time, of the bare view's": (
        "the manager takes 70 us, our layers take 40, and the rest is the cost of threads that wait: the same"
        " functions of Flask and waitress take longer while manager, workers and load share two cores. A commit takes"
        " 480 us of the manager's processor time, from the batch's arrival to its answer, and has 6.9 increments,"
        " nearly all 8 threads of a worker. 10 to 16 threads, and a manager that interrupts no worker (SCHED_BATCH),"
        " gave nothing. In longer runs it was 1.60 and 1.62"
    ),
    "HTTP, the view with our counter, volatile: requests/s, of the bare view's": (
        "as for our API. A run is above or below by chance: seven others of one day had 0.66 to 0.85, and 0.79 in the"
        " middle"
    ),
    "HTTP, the view with our counter, durable: requests/s, of the bare view's": "as for our API",
    "one thread, our API: processor time, of the bare view": (
        "it is at the bar, and a run is above or below by chance: the least of many rounds are 1.43 to 1.50"
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
