"""The typed configuration. Default values are in the YAML files under `conf/` alone; types, units and rules
are here.

A group with several choices (`model=mlp`) has one dataclass a choice in `choices`; a group that is always
the same (`trainer`) has its dataclass in `sections`; `run_config` puts them together, and `rules` checks
fields. `compose` asks Hydra for a configuration, `command_line` reads what was typed, and `parser` turns
the result into a `RunConfig`. `typed_text` keeps paths and names as they are typed. `resume_rules` says what
a resumed run may change, `redaction` removes secrets before anything is written, and `import_path` finds the
user's own classes.

Import `compose_run` from `mlx_ring.config.compose`, not from here: it loads Hydra, which takes a while.
"""

from mlx_ring.config.rules import Section, require
from mlx_ring.config.run_config import RunConfig

__all__ = ["RunConfig", "Section", "require"]
