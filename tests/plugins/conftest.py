import pytest


@pytest.fixture
def one_rank(single_rank: None) -> None:
    """Megatron's parallel state of one rank."""
