"""The configuration, typed. Defaults live in the YAML files under `conf/` alone; types, units and rules
live here.

`choices` holds the groups of which one is chosen (`model=mlp`), `sections` those that are always there
(`trainer`), `run_config` the whole; `rules` checks fields. `compose` asks Hydra for a configuration,
`parser` turns it into a `RunConfig`; `resume_rules` says what a resumed run may change, and `redaction`
what must not reach the disk.

Import `compose_run` from `mlx_ring.config.compose`: it loads Hydra, which this face does not.
"""

from mlx_ring.config.rules import Section, require
from mlx_ring.config.run_config import RunConfig

__all__ = ["RunConfig", "Section", "require"]
