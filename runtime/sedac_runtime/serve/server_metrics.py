"""What /metrics shows, in the format of Prometheus."""

import math
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sedac_runtime._core import Progress, Scheduler, SchedulerStatistics
from sedac_runtime.serve.engine_thread import StepObserver

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN_TOKENS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_REQUEST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_GAUGES: dict[str, tuple[str, Callable[[SchedulerStatistics], int]]] = {
    "sedac_sequences_running": ("Sequences that are generated.", lambda state: state.running),
    "sedac_sequences_waiting": ("Sequences in the queue.", lambda state: state.waiting),
    "sedac_cache_tokens_used": ("Tokens in KV caches.", lambda state: state.used_cache_tokens),
    "sedac_cache_tokens_total": (
        "Tokens that KV caches have room for.",
        lambda state: state.cache_tokens,
    ),
}
_TOTALS: dict[str, tuple[str, Callable[[SchedulerStatistics], int]]] = {
    "sedac_preemptions": (
        "Sequences whose KV cache was given up, to be computed again.",
        lambda state: state.preemptions,
    ),
    "sedac_prefix_hits": (
        "Sequences whose prompt begins like one in the KV cache.",
        lambda state: state.prefix_hits,
    ),
}


class ServerMetrics:
    """The metrics of a server. most_layers: of the deepest model that it serves."""

    def __init__(self, most_layers: int) -> None:
        self.registry = CollectorRegistry()
        self.schedulers = _Schedulers()
        self.registry.register(self.schedulers)
        self.requests = self._counter("requests", "Responses.", "path", "status")
        self.request_seconds = self._histogram(
            "request_seconds", "From a request to the end of its response.", "path", _REQUEST
        )
        self.first_token = self._histogram(
            "time_to_first_token_seconds",
            "From when a sequence is queued to its first token.",
            "model",
            _FIRST_TOKEN,
        )
        self.between_tokens = self._histogram(
            "inter_token_seconds",
            "Between the steps that give a sequence tokens, for each of these tokens.",
            "model",
            _BETWEEN_TOKENS,
        )
        self.exit_layer = self._histogram(
            "exit_layer", "Layers executed for a token.", "model", range(1, most_layers + 1)
        )
        self.generated = self._counter("generated_tokens", "Tokens generated.", "model")
        self.prompt = self._counter("prompt_tokens", "Tokens of prompts.", "model")
        self.cached = self._counter(
            "cached_prompt_tokens", "Tokens of prompts that were in the KV cache.", "model"
        )
        self.drafts = self._counter(
            "draft_tokens", "Tokens drafted, accepted or rejected.", "model", "result"
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"sedac_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, label: str, buckets: "range | tuple[float, ...]"
    ) -> Histogram:
        ends = (*buckets, math.inf)
        return Histogram(f"sedac_{name}", text, [label], buckets=ends, registry=self.registry)


class ModelMetrics(StepObserver):
    """Records what the engine thread of one model does."""

    def __init__(self, metrics: ServerMetrics, model: str) -> None:
        self._first_token = metrics.first_token.labels(model)
        self._between_tokens = metrics.between_tokens.labels(model)
        self._exit_layer = metrics.exit_layer.labels(model)
        self._generated = metrics.generated.labels(model)
        self._prompt = metrics.prompt.labels(model)
        self._cached = metrics.cached.labels(model)
        self._accepted = metrics.drafts.labels(model, "accepted")
        self._rejected = metrics.drafts.labels(model, "rejected")

    def progressed(self, progress: Progress, prompt_tokens: int, first: bool) -> None:
        """Count tokens and times."""
        count = len(progress.tokens)
        if first:
            self._first_token.observe(progress.waited)
            self._prompt.inc(prompt_tokens)
            self._cached.inc(progress.cached_prompt_tokens)
        else:
            for _ in range(count):
                self._between_tokens.observe(progress.waited / count)
        self._generated.inc(count)
        for token in progress.tokens:
            self._exit_layer.observe(token.exit_layer)
        self._accepted.inc(progress.drafts.accepted)
        self._rejected.inc(progress.drafts.drafted - progress.drafts.accepted)


class _Schedulers(Collector):
    """How each model's scheduler stands."""

    def __init__(self) -> None:
        self._schedulers: dict[str, Scheduler] = {}

    def watch(self, model: str, scheduler: Scheduler) -> None:
        """Show the scheduler of a model, too."""
        self._schedulers[model] = scheduler

    def collect(self) -> Iterator[Metric]:
        states = {name: each.statistics() for name, each in self._schedulers.items()}
        for name, (text, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=["model"])
            for model, state in states.items():
                gauge.add_metric([model], value(state))
            yield gauge
        for name, (text, value) in _TOTALS.items():
            total = CounterMetricFamily(name, text, labels=["model"])
            for model, state in states.items():
                total.add_metric([model], value(state))
            yield total
