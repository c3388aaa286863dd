"""What gunicorn's dirty arbiter wants before it starts, and holds the stash: an app of its own kind."""

from gunicorn.dirty import DirtyApp


class Nothing(DirtyApp):  # type: ignore[misc] # it has no types
    """Does nothing. The stash is in the arbiter."""
