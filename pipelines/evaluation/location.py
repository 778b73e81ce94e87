"""Where `tokay eval` finds a model."""

from dataclasses import dataclass

from pipelines.encoders import EncoderConfig


@dataclass(frozen=True, kw_only=True)
class SavedEncoder:
    """An encoder that a run saved.

    Attributes:
        folder: Where; a path or URI.
        trust_remote_code: Whether the run's recipe says that it may bring code.
    """

    folder: str
    trust_remote_code: bool


# A folder, hub id or endpoint that the command line names, or a run's model.
Location = str | EncoderConfig | SavedEncoder
