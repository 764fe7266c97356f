"""README.md of a release: the model card.

A pure function of facts; everything a reader needs to judge or to load the model, and
nothing computed from records beyond the metrics it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anabranch.edge.runtime.manifest import FP32, INT8, File
from anabranch.protocols.config import RunConfig
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Column
from anabranch.server.statement.guarantees import (
    LISTED,
    PrivacyStatement,
    RunFacts,
    SitePrivacy,
    state,
)
from anabranch.server.statement.text import (
    DISCLOSURE_HEAD,
    GROUP_HEAD,
    LEGEND,
    SITE_HEAD,
    disclosure_rows,
    group_note,
    group_rows,
    limits,
    paragraphs,
    site_rows,
)

__all__ = ["Checks", "RunFacts", "SitePrivacy", "model_card"]


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What was measured on the held-out records when the release was made."""

    num_records: int
    metrics: Mapping[str, float]  # of the fp32 graph
    torch_accuracy: float
    fp32_accuracy: float
    int8_accuracy: float
    int8_tolerance: float
    int8_accepted: bool
    fp32_latency_ms: float  # median of one record, tokenization included
    int8_latency_ms: float
    threads: int


def model_card(
    config: RunConfig,
    facts: RunFacts,
    spec: AdapterSpec,
    checks: Checks,
    files: Mapping[str, File],
) -> str:
    """Return the card in Markdown; `files` are those of the release but the card itself.

    Raises PrivacyError when the run was private and its statement lacks a number.
    """
    sections = (
        f"# {config.name}",
        _summary(config, facts),
        "## Base\n\n" + _base(config, facts, spec),
        "## Data contract\n\n" + _contract(config),
        "## Training\n\n" + _training(config, facts, spec),
        "## Privacy\n\n" + privacy_section(state(config, facts)),
        "## Metrics\n\n" + _metrics(checks),
        "## Use\n\n" + _use(config, checks),
        "## Files\n\n" + _files(files),
    )
    return "\n\n".join(sections) + "\n"


def privacy_section(statement: PrivacyStatement) -> str:
    """Return both guarantees, what else is released, and what is not covered, in Markdown."""
    parts = paragraphs(statement)
    if not statement.disclosures:
        return "\n\n".join(parts)
    if site_rows(statement):
        parts += [
            "### Every site",
            _table(SITE_HEAD, site_rows(statement)),
            _bullets(LEGEND),
        ]
    if group_rows(statement):
        parts += [
            "### Several records of one patient",
            *filter(None, (group_note(statement),)),
            _table(GROUP_HEAD, group_rows(statement)),
        ]
    parts += [
        "### Everything else that leaves or is published",
        _table(DISCLOSURE_HEAD, disclosure_rows(statement)),
        "### Not covered by any guarantee",
        _bullets(limits(statement)),
    ]
    return "\n\n".join(parts)


def _summary(config: RunConfig, facts: RunFacts) -> str:
    kind = config.task.kind.replace("-", " ")
    rest = len(facts.sites) - LISTED
    named = _cells(facts.sites[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
    who = f"{_count(len(facts.sites), 'site')} ({named})"
    if config.client_privacy is not None:  # names would tell who took part
        who = f"clients, drawn from {config.client_privacy.population},"
    return (
        f"A model for {kind} with {len(config.task.labels)} labels, fine-tuned by {who} over "
        f"{_count(facts.rounds, 'round')}; the records never left them. "
        f"Run `{facts.run}`, configuration `{config.digest()}`."
    )


def _base(config: RunConfig, facts: RunFacts, spec: AdapterSpec) -> str:
    revision = f" at `{config.model.revision}`" if config.model.revision else ""
    lines = [
        f"* Name: `{facts.base_name}`{revision}, frozen during training.",
        f"* SHA-256 of its weights: `{spec.base}`.",
    ]
    if spec.tokenizer:
        lines.append(f"* SHA-256 of its tokenizer: `{spec.tokenizer}`.")
    return "\n".join(lines)


def _contract(config: RunConfig) -> str:
    data = config.data
    rows = [
        (name, column.type, "yes" if column.optional else "no", _allowed(column))
        for name, column in data.columns.items()
    ]
    lines = [
        _table(("column", "type", "may be empty", "allowed"), rows),
        "",
        f"At least {_count(data.min_rows, 'row')} per site, at most {data.max_characters} "
        "characters per text. "
        + (f"Forbidden columns: {_cells(data.forbidden)}." if data.forbidden else ""),
        "",
        f"Labels, in the order of the logits: {_cells(config.task.labels)}.",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _allowed(column: Column) -> str:
    if column.values:
        return ", ".join(column.values)
    low = "" if column.min is None else f"≥ {column.min:g}"
    high = "" if column.max is None else f"≤ {column.max:g}"
    return ", ".join(filter(None, (low, high)))


def _training(config: RunConfig, facts: RunFacts, spec: AdapterSpec) -> str:
    federation, training = config.federation, config.training
    method = "FedAvg (McMahan et al. 2017)"
    if federation.proximal_mu:
        method = f"FedProx (Li et al. 2020), μ = {federation.proximal_mu:g}"
    if config.server is not None:
        method += f", then FedAdam (Reddi et al. 2021), η = {config.server.learning_rate:g}"
    work = _count(training.local_epochs, "epoch")
    if training.local_steps is not None:
        work = _count(training.local_steps, "step")
    lora = "head only"
    if spec.targets:
        lora = (
            f"LoRA of rank {spec.rank}, α = {spec.alpha:g}, on {len(spec.targets)} linear layers, "
            "and the head"
        )
    head_rate = training.head_learning_rate
    head = "" if head_rate is None else f", {head_rate:g} for the head"
    versions = ", ".join(f"{name} {version}" for name, version in sorted(facts.versions.items()))
    lines = [
        f"* Method: {method}, deltas weighted by {federation.weighting}.",
        f"* Rounds: {facts.rounds}; this is the adapter after round {facts.best_round}.",
        f"* Trained: {lora}; {spec.num_values:,} values.",
        f"* Each round, each site: {work}, batches of {training.batch_size}, "
        f"{training.optimizer}, learning rate {training.learning_rate:g}{head} "
        f"({training.schedule}).",
        f"* Seed: {config.seed}." + (f" Versions: {versions}." if versions else ""),
    ]
    return "\n".join(lines)


def _metrics(checks: Checks) -> str:
    rows = [(name, f"{value:.4f}") for name, value in sorted(checks.metrics.items())]
    rows += [
        ("accuracy, torch", f"{checks.torch_accuracy:.4f}"),
        ("accuracy, ONNX fp32", f"{checks.fp32_accuracy:.4f}"),
        ("accuracy, ONNX int8", f"{checks.int8_accuracy:.4f}"),
        ("latency of one record, fp32", f"{checks.fp32_latency_ms:.2f} ms"),
        ("latency of one record, int8", f"{checks.int8_latency_ms:.2f} ms"),
    ]
    verdict = "" if checks.int8_accepted else (
        f"\n\nThe int8 model was refused: it lost more than {checks.int8_tolerance:g} of accuracy. "
        "It is not part of this release."
    )  # fmt: skip
    return (
        f"On {checks.num_records} held-out records of the coordinator; latency is the median, with "
        f"{_count(checks.threads, 'thread')}, on the machine that made the release.\n\n"
        + _table(("figure", "value"), rows)
        + verdict
    )


def _use(config: RunConfig, checks: Checks) -> str:
    example = '["a text"]' if config.task.kind == "text-classification" else "array"
    precision = "" if checks.int8_accepted else ', precision="fp32"'
    lines = [
        "```python",
        "from pathlib import Path",
        "from anabranch.edge.runtime.classify import Model",
        "",
        f'Model.open(Path("release"){precision}).classify({example})',
        "```",
        "",
        "`adapter/` is a PEFT folder for the base. `merged/` is the base with the adapter folded "
        "in, and the head in `head.safetensors`.",
    ]
    if config.task.kind == "text-classification":
        pooled = "the mean over its tokens" if config.model.pooling == "mean" else "its first token"
        lines.append(
            f"`AutoModel.from_pretrained` loads it. A text's vector is {pooled}, scaled to length "
            "√d; logits = head.weight · vector + head.bias. BERT's own pooler is not used."
        )
    return "\n".join(lines)


def _files(files: Mapping[str, File]) -> str:
    rows = [(f"`{name}`", f"{file.bytes:,}", f"`{file.sha256}`") for name, file in files.items()]
    note = {FP32: "fp32", INT8: "int8"}
    kinds = ", ".join(f"`{name}` is {kind}" for name, kind in note.items() if name in files)
    return _table(("file", "bytes", "SHA-256"), rows) + f"\n\n{kinds}. All inputs: batch first."


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"* {line};" for line in lines).removesuffix(";") + "."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """Return text that cannot break out of a table cell, or become HTML or a link."""
    plain = " ".join(text.split()).replace("\\", "&#92;").replace("<", "&lt;")
    return plain.replace("](", "&#93;(").replace("|", "\\|")


def _cells(names: Sequence[str]) -> str:
    return ", ".join(map(_cell, names))
