"""Early exit inside a Hugging Face decoder in PyTorch, and the reference for the chain's exits.

The model's own layers compute everything. By the propagate rule a token that has exited keeps its
hidden state as every deeper layer's input and output, so the deeper layers' keys and values come
from that state; layers that every token of a pass has left skip their MLP. With defer it goes on,
and only what it predicts is of the state at its exit.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sedac_export.arrays import Floats, Mask
from sedac_export.bundle import Bundle
from sedac_export.bundle.exit_config import ExitConfig
from sedac_export.bundle.sessions import load_engine
from sedac_export.errors import SedacError
from sedac_export.exits.replay.pass_exits import PassExits
from sedac_export.exits.replay.probes_file import risk_probes
from sedac_export.exits.replay.signals import Signals
from sedac_export.model.decoder import CACHE_ARGUMENTS, find_layers, find_mlp, replaced
from sedac_export.pytorch.environment import config_from_environment
from sedac_runtime._core import PolicySettings
from sedac_runtime.choices import KvFill

_T = TypeVar("_T")
# what policies need
_PROBE, _EXIT = "an entropy probe", "an exit engine"


@dataclass
class Statistics:
    """How many tokens ran how many layers, first tokens and prompts of generations included."""

    num_layers: int
    depths: dict[int, int] = field(default_factory=dict)
    last_depths: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens that passed through the model."""
        return sum(self.depths.values())

    @property
    def mean_exit_layer(self) -> float:
        """The mean number of layers run."""
        return sum(depth * count for depth, count in self.depths.items()) / max(1, self.tokens)

    @property
    def layer_ratio(self) -> float:
        """The model's layers over the mean number of layers run."""
        return self.num_layers / self.mean_exit_layer if self.tokens else 1.0


def create_universal_accelerator(
    model: PreTrainedModel,
    tau: float | None = None,
    consecutive_k: int | None = None,
    *,
    min_layer_ratio: float | None = None,
    config: ExitConfig | None = None,
    exit_layers: Sequence[int] | None = None,
    bundle: Path | None = None,
    kv_fill: KvFill | None = None,
) -> "Accelerator":
    """A context manager in which `model` exits early; outputs are as without it.

    tau, consecutive_k and min_layer_ratio configure policy stability; what is None comes from the
    environment (SEDAC_METHOD, SEDAC_V7_TAU, ...), then from the defaults 0.98, 2 and 0.2. config
    chooses any other policy. exit_layers: depths at which tokens may exit, None for all
    or the bundle's. bundle holds the probes that policies other than stability need. kv_fill is
    config's unless given: with "defer" tokens that exited go on for their keys and values.

    A direct call of the model runs the first position of an empty cache at full depth, generate
    the whole prompt. Raises SedacError when a setting is out of range, or a probe is missing or of
    another model.
    """
    layers = find_layers(model)
    _check_exits(len(layers), exit_layers, kv_fill)
    chosen = config or _stability(len(layers), tau, consecutive_k, min_layer_ratio)
    return Accelerator(
        model,
        layers,
        chosen.policy_settings(),
        exit_layers,
        None if bundle is None else _Probes(bundle, model),
        kv_fill or chosen.kv_fill,
    )


class Accelerator:
    """Early exits of one model; `create_universal_accelerator` makes it."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[nn.Module],
        policy: PolicySettings,
        exit_layers: Sequence[int] | None,
        probes: "_Probes | None",
        kv_fill: KvFill,
    ) -> None:
        self.propagate = kv_fill == "propagate"
        self.model, self.layers, self.policy, self.probes = model, layers, policy, probes
        allowed = exit_layers
        if allowed is None:
            allowed = probes.exit_layers if probes else range(1, len(layers))
        self.exit_layers = {depth for depth in allowed if depth < len(layers)}
        self._check()
        self._statistics = Statistics(len(layers))
        # positions before this one run at full depth
        self._prompt_end = 1
        self._exits: PassExits | None = None
        # what each token's prediction is made of so far
        self._predicting = torch.empty(0)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Accelerator":
        with contextlib.ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                hook = partial(self._after_layer, index)
                stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
                mlp = find_mlp(layer)
                stack.enter_context(replaced(mlp, partial(self._mlp, index, mlp.forward)))
            before = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)
            stack.callback(before.remove)
            stack.callback(self.model.register_forward_hook(self._end, always_call=True).remove)
            original: Callable[..., Any] = self.model.generate  # type: ignore[assignment]
            generate = partial(self._generate, original)
            stack.enter_context(replaced(self.model, generate, "generate"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._exits, self._predicting = None, torch.empty(0)

    def stats(self) -> Statistics:
        """What has happened since the accelerator was made."""
        return self._statistics

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._prompt_end = _prompt_length(*args, **kwargs)
        try:
            return generate(*args, **kwargs)
        finally:
            self._prompt_end = 1

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start a pass: which of its tokens run at full depth whatever the policy says."""
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"][..., 0]
        batch, length = tokens.shape
        full_depth = np.zeros((batch, length), dtype=bool)
        given = (kwargs.get(name) for name in CACHE_ARGUMENTS)
        cache = next((cache for cache in given if cache is not None), None)
        start = 0 if cache is None else int(cache.get_seq_length())
        full_depth[:, : max(0, self._prompt_end - start)] = True
        self._exits = self._start_pass(full_depth.reshape(-1))

    def _check(self) -> None:
        """Refuse settings that are out of range and missing probes now, not in the first pass."""
        exits, probes = self._start_pass(np.zeros(1, dtype=bool)), self.probes
        for depth in sorted(self.exit_layers):
            if exits.reads_risk(depth):
                _need(probes and probes.probes.get(depth), _PROBE, depth)
            if exits.reads_exit_head(depth):
                _need(probes and probes.exits.get(depth), _EXIT, depth)

    def _start_pass(self, full_depth: Mask) -> PassExits:
        return PassExits(self.policy, len(self.layers), self.exit_layers, full_depth)

    def _end(self, *_: object) -> None:
        exits, self._exits = self._exits, None
        if exits is None:
            return
        self._statistics.last_depths = exits.depths().tolist()
        for depth in self._statistics.last_depths:
            self._statistics.depths[depth] = self._statistics.depths.get(depth, 0) + 1

    def _mlp(self, index: int, forward: Callable[..., Tensor], x: Tensor) -> Tensor:
        """The layer's MLP, zero for tokens that have exited or skip it."""
        exits = self._exits
        if exits is None:
            return forward(x)
        done = exits.skip_from <= index
        if self.propagate:
            done = done | exits.exited
        if not done.any():
            return forward(x)
        if done.all():
            hidden = self.model.config.get_text_config().hidden_size
            return x.new_zeros(*x.shape[:-1], hidden)
        output = forward(x).clone()
        output.view(-1, output.shape[-1])[torch.from_numpy(done).to(x.device)] = 0
        return output

    def _after_layer(self, index: int, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        exits = self._exits
        if exits is None:
            return output
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        exited = torch.tensor(exits.exited).to(after.device).view(*after.shape[:-1], 1)
        if self.propagate:
            after = torch.where(exited, before, after)
        self._predicting = after if index == 0 else torch.where(exited, self._predicting, after)
        self._decide(exits, index + 1, before, after)
        if index + 1 == len(self.layers):
            after = self._predicting
            after = self.probes.through_lens(after, exits) if self.probes else after
        return (after, *output[1:]) if isinstance(output, tuple) else after

    def _decide(self, exits: PassExits, depth: int, before: Tensor, after: Tensor) -> None:
        exits.stabilities[:, depth - 1] = _flat(stability(before, after))[:, 0]
        probes = self.probes
        x = after.detach()
        signals = Signals(
            depth,
            exits.stabilities[:, depth - 1],
            probes.risk(depth, x) if probes else None,
            lambda: _need(probes, _EXIT, depth).signals(depth, x, exits.last_stabilities(depth)),
        )
        exits.observe(signals)


class _Probes:
    """The trained parts of a bundle: V6 probes in torch, exit engines and lenses as they are."""

    def __init__(self, bundle: Path, model: PreTrainedModel) -> None:
        opened = Bundle.open(bundle)
        manifest = opened.manifest
        facts = (manifest.model.hidden_size, manifest.model.num_layers)
        config = model.config.get_text_config()
        if facts != (config.hidden_size, config.num_hidden_layers):
            raise SedacError(
                f"{bundle} is of another model: hidden size and layers {facts}, not"
                f" {(config.hidden_size, config.num_hidden_layers)}"
            )
        self.exit_layers = manifest.exit_layers
        entries = manifest.engines.exits
        self.exits = {entry.depth: load_engine(opened, entry.file) for entry in entries}
        self.lenses = {e.depth: load_engine(opened, e.lens) for e in entries if e.lens is not None}
        self.probes = risk_probes(opened)

    def risk(self, depth: int, x: Tensor) -> Floats | None:
        if depth not in self.probes:
            return None
        with torch.no_grad():
            return _flat(self.probes[depth].to(x.device)(x.float()))[:, 0]

    def signals(self, depth: int, x: Tensor, stabilities: Floats) -> Floats:
        feeds = {"x": _flat(x)[None], "stability": stabilities[None]}
        signals: Floats = self.exits[depth].run(feeds)["signals"][0]
        return signals

    def through_lens(self, x: Tensor, exits: PassExits) -> Tensor:
        heads = exits.head_depths()
        result = x.clone().view(-1, x.shape[-1])
        for depth, lens in self.lenses.items():
            here = torch.from_numpy(heads == depth)
            if here.any():
                seen = lens.run({"x": _flat(result[here])[None]})["y"][0]
                result[here] = torch.from_numpy(seen).to(x)
        return result.view(x.shape)


def stability(before: Tensor, after: Tensor) -> Tensor:
    """(cos + 1) / 2 of the residual stream before and after a layer, fp32 [.., 1]."""
    cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
    return ((cosine + 1) / 2)[..., None]


def _stability(
    layers: int, tau: float | None, k: int | None, min_layer_ratio: float | None
) -> ExitConfig:
    """What the arguments set, the rest from the environment."""
    given = {"tau": tau, "consecutive_k": k, "min_layer_ratio": min_layer_ratio}
    given = {name: value for name, value in given.items() if value is not None}
    base = config_from_environment(layers)
    if not given:
        return base
    defaults = base.settings() if base.policy == "stability" else {}
    try:
        return ExitConfig(**(defaults | given))
    except ValueError as error:
        raise SedacError(
            f"{given} is out of range: tau and ratio 0 or more, K 1 or more"
        ) from error


def _check_exits(layers: int, exit_layers: Sequence[int] | None, kv_fill: str | None) -> None:
    for depth in exit_layers or ():
        if not 1 <= depth <= layers:
            raise SedacError(f"exit_layers: depth {depth} is out of range: 1 to {layers}")
    if kv_fill is not None and kv_fill not in get_args(KvFill):
        raise SedacError(f"kv_fill {kv_fill} is unknown: {', '.join(get_args(KvFill))}")


def _flat(x: Tensor) -> Floats:
    """[.., size] as fp32 [n, size] on the host."""
    result: Floats = x.detach().float().reshape(-1, x.shape[-1]).cpu().numpy()
    return result


def _prompt_length(inputs: Tensor | None = None, *_: Any, **kwargs: Any) -> int:
    """Positions of the prompt in these arguments of generate, 1 where there is none."""
    for given in (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids")):
        if given is not None:
            return int(given.shape[1])
    return 1


def _need(value: _T | None, what: str, depth: int) -> _T:
    if value is None:
        raise SedacError(
            f"this policy needs {what} at depth {depth}: pass bundle=, trained with"
            " sedac-export train-probes"
        )
    return value
