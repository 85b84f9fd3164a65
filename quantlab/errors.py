"""What quantlab raises when it is asked for something it cannot do."""

from __future__ import annotations


class QuantlabError(Exception):
    """Bad input, in one paragraph: it names the layer, the value and the remedy."""


class RecipeError(QuantlabError):
    """A recipe that cannot be read, or that does not fit the model."""


class PreflightError(QuantlabError):
    """Something that would have gone wrong later, refused before any work."""


class CheckpointError(QuantlabError):
    """A model folder or file that cannot be read or written."""


class VerificationError(QuantlabError):
    """A quantized model that does not load, or does not say what was quantized."""


class DataError(QuantlabError):
    """Text that cannot be found, or that is too short."""


class MissingStatisticsError(QuantlabError):
    """A method was given a layer without the statistics that it declared to need."""


class LostRankError(QuantlabError):
    """Another process of a run that several share has ended, or does not answer."""
