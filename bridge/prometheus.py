"""The hub's status and the last step's record, as Prometheus reads them (GET /metrics)."""

import re

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

STATES = ("handed_out", "taken", "buffered", "leased", "returned", "set_aside", "skipped")
OF_A_NODE = {
    "version": "version of its weights",
    "behind": "versions that it is behind",
    "last_seen_s": "seconds since its last request",
    "running": "samples in vLLM",
    "waiting": "samples queued in vLLM",
    "kv": "share of vLLM's KV cache in use",
    "limit": "prompts that it takes at once",
    "made": "tokens made between its last two beats",
    "over_s": "seconds between them",
    "gpu_s": "the same times the GPUs of its vLLM",
    "idle_s": "of which vLLM had nothing to do",
}


def numbers(record: dict) -> dict[str, float]:
    """The metrics of a record that are one number."""
    return {name: x for name, x in record.items() if "/" in name and isinstance(x, int | float)}


class _Collector:
    """One look at a run."""

    def __init__(self, status: dict, record: dict):
        self.status, self.record = status, record

    def collect(self):
        status, rounds = self.status, self.status["validation"]["rounds"]
        yield gauge("version", "Steps that the trainer has finished.", status["version"])
        yield gauge("published_version", "Newest version of the weights.", status["published"])
        yield family(
            GaugeMetricFamily("cispo_prompts", "Prompts of the ledger by state.", labels=["state"]),
            {state: status[state] for state in STATES},
        )
        yield family(
            CounterMetricFamily("cispo_events", "What did not go through.", labels=["event"]),
            status["counts"],
        )
        unanswered = sum(r["of"] - r["answered"] for r in rounds)
        yield gauge("validation_open_prompts", "Held-out prompts without an answer.", unanswered)
        nodes = {name: {**seen, **seen.get("vllm", {})} for name, seen in status["nodes"].items()}
        for name, what in OF_A_NODE.items():
            yield family(
                GaugeMetricFamily(f"cispo_node_{name}", f"Of a node: {what}.", labels=["node"]),
                {node: seen[name] for node, seen in nodes.items() if name in seen},
            )
        for name, value in numbers(self.record).items():
            yield gauge(re.sub(r"\W", "_", name), f"{name} of the last step.", value)


def gauge(name: str, what: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"cispo_{name}", what, value=value)


def family(metric, values: dict[str, float]):
    for label, value in values.items():
        metric.add_metric([str(label)], value)
    return metric


def prometheus_text(status: dict, record: dict) -> str:
    """In the text format, version 0.0.4."""
    registry = CollectorRegistry()
    registry.register(_Collector(status, record))
    return generate_latest(registry).decode()
