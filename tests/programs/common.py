"""What the modules of the caching program have in common: its cache."""

from flask_caching import Cache

cache = Cache()
