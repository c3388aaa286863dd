"""The commands for counters, with the options of a store."""

from ..commands import counter_commands
from .options import with_state

commands = counter_commands(with_state)
