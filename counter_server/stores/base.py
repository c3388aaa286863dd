"""The seam: what an engine has to do to be a store. One method is the whole of it."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from ..objects import Declaration
from ..operations import Batch, Result
from ..status import Status


class Store(Protocol):
    """Applies batches exactly once.

    (Where an engine cannot, at most once: a batch that may have reached it is `OutcomeUnknown`, never `Disconnected`.)
    """

    together: bool  # a call takes longer than to wake the threads that it answers: see `Combiner`

    def apply(self, batch: Batch, deadline: float) -> list[Result]:
        """Execute `batch`, or answer again what it was answered before.

        In one atomic step, by the last sequence remembered of the batch's client: that sequence again is
        answered with the remembered results and executes nothing; the next one (1 for a client not known) is
        executed and remembered; any other is refused. Sequence 0, reads only, is just read.

        Called by one thread at a time with what writes; a batch of reads may come beside it.

        :param deadline: in `time.monotonic` seconds.
        :raises Disconnected: when there is no answer; the caller may send the same batch again.
        :raises BatchRefused: when the sequence does not follow; nothing was executed.
        :raises StateLost: when the store has begun anew without its memory.
        """
        ...

    def after_fork(self) -> None:
        """In the child of a fork: let go of what belongs to the parent, without disturbing it."""
        ...

    def close(self) -> None:
        """Let go of connections. The store may be used again; it will connect again."""
        ...

    def __str__(self) -> str:
        """The store's URL, without secrets: it stands in messages for people."""
        ...


@runtime_checkable
class HostsObjects(Protocol):
    """What a store has beside, if it can host shared objects."""

    def object(self, declaration: Declaration) -> Store:
        """A store of its own for the calls of one shared object."""
        ...


@dataclass(frozen=True)
class Finding:
    """What a store's server says of itself that decides whether numbers can be lost, in a sentence for people."""

    level: Literal["ok", "may lose", "problem"]
    sentence: str


@runtime_checkable
class Examined(Protocol):
    """What a store has beside, if it can tell what its server promises."""

    def findings(self, deadline: float) -> list[Finding]:
        """Ask the live server. Nothing is changed.

        :param deadline: in `time.monotonic` seconds.
        :raises Disconnected: when there is no answer.
        :raises CounterServerError: when it does not let this process in.
        """
        ...


@runtime_checkable
class TellsStatus(Protocol):
    """What a store has beside, if its server has figures to tell."""

    def status(self, deadline: float) -> Status:
        """The server's figures, from itself. Nothing is started or changed, and no other call is held up.

        :param deadline: in `time.monotonic` seconds.
        :raises Disconnected: when there is no answer.
        :raises CounterServerError: when it does not let this process in.
        """
        ...
