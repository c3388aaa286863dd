"""Why a bar falls short where it does, by its title. The document tells it, and what of it is a guess."""

WHY = {
    "2x16 volatile: times BaseManager proxy, AF_UNIX": (
        "a machine with other work gives each runnable thread its share, and the plain proxy has up to 64 of"
        " them, ours 3 at a time: on a quiet machine it was 6.4"
    ),
    "2x16 volatile: times redis-py INCR, volatile": (
        "most of an increment of ours is waking the thread that waits for it, 1.3 context switches with the"
        " interpreter's lock at each"
    ),
    "2x16 volatile: times pymemcache incr": (
        "most of an increment of ours is waking the thread that waits for it, 1.3 context switches with the"
        " interpreter's lock at each"
    ),
    "2x16 volatile: times multiprocessing.Value": (
        "most of an increment of ours is waking the thread that waits for it, 1.3 context switches with the"
        " interpreter's lock at each; of a lock in shared memory that is mostly free nobody has to be woken, and"
        " it takes 1 us"
    ),
    "2x16 volatile: times SQLite WAL, NORMAL": (
        "SQLite is quick because it is unfair: one thread counts, and others wait for up to half a second"
    ),
    "2x16 durable: times redis-py INCR, fsync always": (
        "Redis, too, shares an fsync among all who wait: little is left to share"
    ),
    "2x16 durable: times PostgreSQL row update": (
        "it commits once for each increment, ours once for about 8: what 16 threads of a process have waiting at a time"
    ),
    "1x1 volatile: median, of the plain proxy's": (
        "our two ends have more to do than the plain proxy's: a batch's sequence, its client's record, the"
        " deadline, the combiner (2.7 us). Where each wake-up has to reach an idle core that hides in its 40 us,"
        " and where cores are busy it shows"
    ),
    "2x16 volatile: p99, of the best networked peer's": (
        "not profiled: the scheduler decides on the slowest of a hundred"
    ),
    "2x16 durable: p99, of the best durable networked peer's": (
        "not profiled: the disk decides on the slowest of a hundred"
    ),
    "HTTP volatile: requests/s, of memory:// (wrong)": ("see the processor time per request below"),
    "HTTP durable: requests/s, of memory:// (wrong)": (
        "each request waits for the disk, and no more than the 8 threads of each worker can wait at the same time"
    ),
    "HTTP volatile: times the view with redis-py": ("see the processor time per request below"),
    "HTTP volatile: processor time per request, of memory:// (wrong)": (
        "the manager takes 20 to 30 us of it; the rest is the lock of the interpreter, which a thread that waits"
        " gives up and has to be given again"
    ),
    "1 to 1,000,000 counters, volatile: slowest median, of the quickest": (
        "not profiled; likely a million names and numbers do not fit into the processor's caches"
    ),
    "1 to 1,000,000 counters, durable: slowest median, of the quickest": (
        "not profiled; likely the disk, which is not always the same: the growth is not steady"
    ),
    "start: python run.py, of bare Flask and waitress": (
        "three generations of Python start one after the other, and each imports everything anew: supervisor 0.36"
        " s of processor time, manager 0.17, each worker 0.33, and the bare script 0.27. A trial that forked the"
        " children from the supervisor came down from 5.8 times to 2.4. It was not taken as it was: a child would"
        " hold its siblings' pipes, and a rolling replacement would run the old code"
    ),
}
