"""The errors a user can meet, each with what is wrong, where, and what to do.

Everything that is the user's to mend derives from :class:`UserError`; the command line prints it in one or two lines
and exits with 2, without a traceback. Anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Something the user can mend. ``problems`` holds every finding, so that all of them are shown at once."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(UserError):
    """A setting that does not exist, has a bad value, or contradicts another one."""


class DataError(UserError):
    """A problem set that cannot be found, read or understood."""


class ModelError(UserError):
    """A model folder or id that cannot be loaded as a causal language model with a tokenizer."""


class RewardError(UserError):
    """A reward that cannot be imported, or returned something that is not a list of finite numbers."""


class SamplerError(UserError):
    """A sampling engine that cannot be started, cannot hold the adapter, or died."""


class UpdateError(UserError):
    """An update that this machine cannot compute: one completion does not fit, or float16 overflows again and again."""


class RunFolderError(UserError):
    """A run folder that belongs to another configuration, cannot be written, or holds no usable checkpoint."""
