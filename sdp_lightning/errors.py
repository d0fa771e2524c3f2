"""The error tree: ``except SDPError`` catches everything that this package raises on purpose."""


class SDPError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(SDPError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class EngineError(SDPError):
    """An inference engine failed, or refuses what it was asked."""


class RolloutError(SDPError):
    """A rollout (workflow, reward or the data they returned) failed."""


class RolloutTimeout(SDPError, TimeoutError):
    """A wait for rollouts passed its deadline; nothing was lost."""


class VersionError(SDPError, ValueError):
    """A policy version is malformed, or is not the next one."""


class RankError(SDPError):
    """Another process of this training failed, is late, or is gone."""


class CheckpointError(SDPError):
    """A checkpoint is torn or damaged."""


class RecordingError(SDPError):
    """A recording of rollouts is missing, damaged, or does not go with what is to be trained."""
