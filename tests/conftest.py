"""What every test finds: quiet libraries, a skip for what needs a GPU."""

import pytest
import torch

from drama.console import quiet_libraries

quiet_libraries()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
