"""How much is fuzzed: `default` is the same each time; `fuzz`, by TOKAY_FUZZ=1, ten times more."""

import os

from hypothesis import HealthCheck, settings

_SHARED = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
settings.register_profile("default", max_examples=1_000, derandomize=True, **_SHARED)
settings.register_profile("fuzz", max_examples=10_000, **_SHARED)
settings.load_profile("fuzz" if os.environ.get("TOKAY_FUZZ") == "1" else "default")
