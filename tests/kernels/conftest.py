"""Triton kernels on a machine without GPU: run by the interpreter, or compiled ahead of time."""

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Load a module of Triton kernels so that Triton's interpreter runs them on CPU tensors.

    `interpreted("drama.kernels.pool_triton")` returns the copy, and whoever imports that name until
    the test ends gets it too.
    """
    triton = pytest.importorskip("triton")

    def load(name: str) -> ModuleType:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True  # read where `triton.jit` decorates
            spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return load
