"""drafter.safetensors: a trained drafter, its vocabulary, and which model it drafts for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sedac_export.drafter.draft_model import DrafterShape, DraftModel
from sedac_export.errors import SedacError

DRAFTER = "drafter.safetensors"
TOKENS = "tokens"
HEAD_SAMPLE = "head_sample"
# rows of the head that say which model it is; weights of another model correlate with none of them
SAMPLED_ROWS = 32
MIN_SIMILARITY = 0.9


@dataclass
class DrafterFile:
    """A drafter, on the CPU in fp32, and what it is for.

    tokens: int64 [draft vocabulary], ascending. head_sample: rows of the model's head, those of the
    first of `tokens`. metadata: of the file.
    """

    drafter: DraftModel
    tokens: Tensor
    head_sample: Tensor
    metadata: dict[str, str]

    def save(self, path: Path) -> None:
        """Write it, weights in fp16."""
        weights = {
            name: value.detach().cpu().half().contiguous()
            for name, value in self.drafter.state_dict().items()
        }
        tensors = weights | {
            TOKENS: self.tokens.cpu().to(torch.int32),
            HEAD_SAMPLE: self.head_sample.detach().cpu().half().contiguous(),
        }
        shape = json.dumps(self.drafter.shape.metadata())
        # unlike save_file, which leaves a file that only its owner reads
        path.write_bytes(save(tensors, self.metadata | {"shape": shape}))

    @classmethod
    def load(cls, path: Path) -> "DrafterFile":
        """The drafter in `path`. Raises SedacError when it is none, or damaged."""
        try:
            with safe_open(path, framework="pt") as handle:
                metadata: dict[str, str] = handle.metadata() or {}
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            fields: dict[str, Any] = json.loads(metadata.pop("shape"))
            layers = tuple(fields.pop("feature_layers"))
            drafter = DraftModel(DrafterShape(**fields, feature_layers=layers)).eval()
            tokens = tensors.pop(TOKENS).long()
            sample = tensors.pop(HEAD_SAMPLE).float()
            drafter.load_state_dict({name: value.float() for name, value in tensors.items()})
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise SedacError(
                f"{path} is not a drafter ({reason}); train it with sedac-export train-drafter"
            ) from error
        return cls(drafter, tokens, sample, metadata)

    def check_head(self, rows: Tensor, name: str) -> None:
        """Check that the sampled `rows` of a model's head, fp32, are those it was trained with.

        The model may be quantized. Raises SedacError naming the model `name` otherwise.
        """
        fits = rows.shape == self.head_sample.shape
        if not fits or float(torch.cosine_similarity(rows, self.head_sample).mean()) < (
            MIN_SIMILARITY
        ):
            raise SedacError(
                f"the drafter was trained for another model than {name}; train one for it with"
                " sedac-export train-drafter"
            )
