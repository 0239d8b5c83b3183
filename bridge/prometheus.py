"""The run's newest metrics as Prometheus reads them."""

import re

from report import numbers


def prometheus_text(status: dict, record: dict) -> str:
    """The hub's status and the last step's record in Prometheus' text format, version 0.0.4."""
    escape = lambda text: str(text).replace("\\", "\\\\").replace("\n", "\\n")
    lines: list[str] = []

    def metric(name: str, what: str, values, label: str = "", kind: str = "gauge") -> None:
        lines.extend([f"# HELP cispo_{name} {escape(what)}", f"# TYPE cispo_{name} {kind}"])
        for value_of, value in values.items():
            quoted = escape(value_of).replace('"', '\\"')
            lines.append(
                f"cispo_{name}" + (f'{{{label}="{quoted}"}}' if label else "") + f" {float(value)}"
            )

    states = ("handed_out", "taken", "buffered", "leased", "returned", "set_aside", "skipped")
    metric("version", "Steps that the trainer has finished.", {"": status["version"]})
    metric("published_version", "Newest version of the weights.", {"": status["published"]})
    metric(
        "prompts",
        "Prompts of the ledger by state; handed_out is the sum of the others.",
        {s: status[s] for s in states},
        "state",
    )
    metric(
        "events_total", "What did not go straight through.", status["counts"], "event", "counter"
    )
    rounds = status["validation"]["rounds"]
    metric(
        "validation_open_prompts",
        "Held-out prompts that are not answered yet.",
        {"": sum(r["of"] - r["answered"] for r in rounds)},
    )
    nodes = {name: {**seen, **seen.get("vllm", {})} for name, seen in status["nodes"].items()}
    for name, what in [
        ("version", "version of its weights"),
        ("behind", "versions that it is behind"),
        ("last_seen_s", "seconds since its last request"),
        ("running", "samples in vLLM"),
        ("waiting", "samples queued in vLLM"),
        ("kv", "share of vLLM's KV cache in use"),
        ("limit", "prompts that it takes at once"),
        ("made", "tokens made between its last two beats"),
        ("over_s", "seconds between them"),
        ("idle_s", "of which vLLM had nothing to do"),
    ]:
        metric(
            f"node_{name}",
            f"Of a rollout node: {what}.",
            {n: x[name] for n, x in nodes.items() if name in x},
            "node",
        )
    for name, value in numbers(record).items():
        metric(
            re.sub(r"\W", "_", name), f"{name} of the last step, as in metrics.jsonl.", {"": value}
        )
    return "\n".join(lines) + "\n"
