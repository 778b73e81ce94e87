"""What a recipe or a request may set: checked where it comes in, and not changed afterwards."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A group of keys, each described where it is declared; an unknown key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
