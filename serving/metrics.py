"""What an operator watches, in Prometheus' words.

Serve sends each scrape to one replica, so every series carries the replica's name: a scrape of
several replicas gives several honest series and never one that jumps.
"""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The counters of one replica, in a registry of their own."""

    def __init__(self, replica: str = "0") -> None:
        self._replica = replica
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "tokay_requests",
            "Requests by path and HTTP status",
            ["replica", "path", "status"],
            registry=self._registry,
        )
        self._latency = Histogram(
            "tokay_request_seconds",
            "Seconds from the request's arrival in the replica to its last byte",
            ["replica", "path"],
            buckets=_SECONDS,
            registry=self._registry,
        )

        def of_replica(kind: Any, name: str, description: str, **options: Any) -> Any:
            return kind(name, description, ["replica"], registry=self._registry, **options).labels(
                replica
            )

        self._texts = of_replica(Counter, "tokay_texts", "Texts embedded")
        self._tokens = of_replica(
            Counter, "tokay_tokens", "Tokens embedded, special tokens included"
        )
        self._batch_texts = of_replica(
            Histogram, "tokay_batch_texts", "Texts taken from the queue at once", buckets=_TEXTS
        )
        self._queued = of_replica(
            Gauge, "tokay_queued_tokens", "Tokens that wait or are being embedded"
        )

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Counts one answered request."""
        self._requests.labels(self._replica, path, str(status)).inc()
        self._latency.labels(self._replica, path).observe(seconds)

    def count_batch(self, texts: int, tokens: int) -> None:
        """Counts one batch."""
        self._texts.inc(texts)
        self._tokens.inc(tokens)
        self._batch_texts.observe(texts)

    def exposition(self, queued_tokens: int) -> bytes:
        """Returns all series in Prometheus' text format."""
        self._queued.set(queued_tokens)
        return generate_latest(self._registry)
