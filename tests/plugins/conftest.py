from collections.abc import Iterator

import pytest

from quantplug.megatron.parallel import destroy_parallel, initialize_parallel


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    initialize_parallel()
    yield
    destroy_parallel()
