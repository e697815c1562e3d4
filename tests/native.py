"""Whether the native library is there, and the mark of tests that need it."""

import pytest

from fastmp.backends import cpu

NATIVE = cpu.load()[0] is not None
needs_native = pytest.mark.skipif(
    not NATIVE, reason="there is no native library: it was built without a compiler"
)
