"""For programs that tests start: phi3v without what its `__init__` registers."""

from tests.commands import ROOT

# Put it first; the registrations take each process 4 s, and a rank that only ends needs none.
BARE = f"""
import sys, types
sys.modules["phi3v"] = types.ModuleType("phi3v")
sys.modules["phi3v"].__path__ = ["{ROOT / "phi3v"}"]
"""
