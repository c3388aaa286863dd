"""For people who write a store of their own: the contract of a store as pytest tests, and the checker of histories."""

import pytest

from ..history import Operation, assert_exactly_once, violations

pytest.register_assert_rewrite(f"{__name__}.contract")

from .contract import NAMES, RandomBatches, StoreContract, apply  # noqa: E402 - registered first

__all__ = ["NAMES", "Operation", "RandomBatches", "StoreContract", "apply", "assert_exactly_once", "violations"]
