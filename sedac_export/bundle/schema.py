"""What the JSON files of a bundle have in common."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """An object in which no field may be unknown."""

    model_config = ConfigDict(extra="forbid")
