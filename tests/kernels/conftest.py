"""Triton kernels on a machine without GPU: run by the interpreter, or compiled ahead of time."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Load a module of Triton kernels so that Triton's interpreter runs them on CPU tensors.

    `interpreted("drama.kernels.pool_triton")` returns the copy, and `importlib.import_module` of
    that name returns it until the test ends.
    """
    triton = pytest.importorskip("triton")
    pytest.importorskip("triton.experimental.gluon")  # copies triton.language when first imported
    from triton.runtime.interpreter import InterpretedFunction

    # kernels that call kernels leave the language patched, and nothing compiles any more
    language = triton.language
    patched = (language, language.core, language.standard, language.math, language.tensor)
    before = [(place, dict(vars(place))) for place in patched]
    monkeypatch.setattr(InterpretedFunction, "rewritten_fn", {})

    def load(name: str) -> ModuleType:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = True  # read where `triton.jit` decorates
            spec.loader.exec_module(module)
        # tl.sum and its like are kernels too, decorated when triton was imported
        for library in (language, language.standard):
            for member, function in list(vars(library).items()):
                if isinstance(function, triton.runtime.JITFunction):
                    setattr(library, member, InterpretedFunction(function.fn))
        monkeypatch.setitem(sys.modules, name, module)
        return module

    yield load
    for place, members in before:
        for member in set(vars(place)) - set(members):
            delattr(place, member)
        for member, value in members.items():
            if vars(place).get(member) is not value:
                setattr(place, member, value)


RULES = {
    "nothing left out": {},
    "margin": {"margin": 0.1},
    "own negatives": {"own_negatives": True},
    "symmetric": {"symmetric": True},
    "all": {"margin": 0.05, "own_negatives": True, "symmetric": True},
}


@pytest.fixture(params=RULES.values(), ids=RULES)
def rules(request: pytest.FixtureRequest) -> dict[str, object]:
    """Options of `infonce` that leave columns out or add a direction, alone and together."""
    return request.param
