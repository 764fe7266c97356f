import re
from typing import Any

import msgspec
import pytest

from anabranch.edge.runtime.manifest import File
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Column, Contract, Federation, Model, Privacy, Task, Training
from anabranch.server.card import Checks, RunFacts, SitePrivacy, model_card, privacy_statement

CONFIG = RunConfig(
    name="coding",
    task=Task(kind="text-classification", labels=("heart", "bone|joint")),
    data=Contract(
        columns={
            "text": Column(type="text"),
            "age": Column(type="number", optional=True, min=0, max=120),
            "ward": Column(type="category", values=("a", "b")),
            "y": Column(type="label"),
        },
        min_rows=20,
        forbidden=("name",),
    ),
    model=Model(base="owner/encoder", revision="1" * 40),
    federation=Federation(rounds=6, proximal_mu=0.1),
    training=Training(local_steps=40, learning_rate=0.002),
    seed=11,
)
SPEC = AdapterSpec(
    base="b" * 64,
    tokenizer="7" * 64,
    rank=2,
    alpha=4.0,
    targets=("q",),
    tensors=(("q.lora_A.weight", (2, 5)), ("q.lora_B.weight", (3, 2))),
)
CHECKS = Checks(
    num_records=321,
    metrics={"accuracy": 0.81, "macro_f1": 0.79},
    torch_accuracy=0.8123,
    fp32_accuracy=0.8125,
    int8_accuracy=0.8042,
    int8_tolerance=0.01,
    int8_accepted=True,
    fp32_latency_ms=8.71,
    int8_latency_ms=3.25,
    threads=2,
)
SITES = (
    SitePrivacy(
        site="south", epsilon=6.25, delta=2e-4, noise_multiplier=1.25, sample_rate=0.05, steps=240
    ),
    SitePrivacy(
        site="north", epsilon=7.5, delta=1e-4, noise_multiplier=0.875, sample_rate=0.0625, steps=240
    ),
)
FACTS = RunFacts(
    run="run-7",
    base_name="owner/encoder",
    rounds=6,
    best_round=4,
    sites=("north", "south"),
    versions={"torch": "2.13.0"},
)
FILES = {"labels.json": File(bytes=1234, sha256="c" * 64)}


def card(config: RunConfig = CONFIG, facts: RunFacts = FACTS, **checks: Any) -> str:
    measured = Checks(**{f: getattr(CHECKS, f) for f in CHECKS.__dataclass_fields__} | checks)
    return model_card(config, facts, SPEC, measured, FILES)


def private() -> tuple[RunConfig, RunFacts]:
    privacy = Privacy(epsilon=8.0, clipping="automatic", clipping_norm=0.5)
    facts = {f: getattr(FACTS, f) for f in FACTS.__dataclass_fields__}
    private = msgspec.structs.replace(CONFIG, privacy=privacy, federation=Federation(rounds=6))
    return private, RunFacts(**facts | {"privacy": SITES})


@pytest.mark.parametrize(
    "fact",
    [
        "`owner/encoder` at `" + "1" * 40,
        "weights: `" + "b" * 64,
        "tokenizer: `" + "7" * 64,
        CONFIG.digest(),
        "run-7",
        "2 sites (north, south) over 6 rounds",
        "FedProx (Li et al. 2020), μ = 0.1",
        "after round 4",
        "rank 2, α = 4, on 1 linear layers, and the head; 16 values",
        "40 steps, batches of 32, adamw, learning rate 0.002",
        "Seed: 11. Versions: torch 2.13.0.",
        "| age | number | yes | ≥ 0, ≤ 120 |",
        "| ward | category | no | a, b |",
        "At least 20 rows per site",
        "Forbidden columns: name.",
        "On 321 held-out records",
        "with 2 threads",
        "| macro_f1 | 0.7900 |",
        "| accuracy, torch | 0.8123 |",
        "| accuracy, ONNX fp32 | 0.8125 |",
        "| accuracy, ONNX int8 | 0.8042 |",
        "| latency of one record, int8 | 3.25 ms |",
        "| `labels.json` | 1,234 | `" + "c" * 64,
        "the mean over its tokens",
    ],
)
def test_the_card_states(fact: str) -> None:
    assert fact in card()


def test_a_run_without_privacy_says_that_there_is_none() -> None:
    assert "There is no differential privacy" in card()
    assert "ε" not in card()


def test_the_privacy_statement_names_unit_neighbours_accountant_and_every_site() -> None:
    text = card(*private())

    assert "sequence of all messages that it sent in rounds 1 to 6 is (ε, δ)-differentially" in text
    for line in (
        "Unit: one record",
        "one record is added or removed",
        "Poisson sampling, automatic (AUTO-S) clipping to ℓ2 norm 0.5",
        "Accountant: PRV",
        "Target of this run: ε = 8 per site",
        "| north | 7.500 | 0.0001 | 0.8750 | 0.062500 | 240 |\n"
        "| south | 6.250 | 0.0002 | 1.2500 | 0.050000 | 240 |",
    ):
        assert line in text


@pytest.mark.parametrize(
    "thing", ["number of records", "took part", "metrics", "configuration", "k·ε", "floating-point"]
)
def test_the_privacy_statement_says_what_is_not_covered(thing: str) -> None:
    _, _, after = card(*private()).partition("Not covered:")

    assert thing in after.partition("##")[0]


def test_a_private_run_without_the_facts_of_a_site_has_no_card() -> None:
    config, facts = private()
    fields = {f: getattr(facts, f) for f in facts.__dataclass_fields__} | {"privacy": SITES[:1]}

    with pytest.raises(PrivacyError, match="no privacy facts of site 'north'"):
        privacy_statement(config.privacy, RunFacts(**fields))


def test_a_refused_int8_model_is_stated() -> None:
    text = card(int8_accepted=False)

    assert "int8 model was refused: it lost more than 0.01" in text
    assert 'precision="fp32"' in text


def test_names_cannot_break_out_of_a_table_or_become_html() -> None:
    columns = {"<img src=x>": Column(type="text"), "a\n\n# b": Column(type="label")}
    config = msgspec.structs.replace(CONFIG, data=Contract(columns=columns))
    text = card(config)

    assert "<img" not in text
    assert "\n# b" not in text
    assert "heart, bone\\|joint" in text


def test_every_table_row_has_as_many_cells_as_its_head() -> None:
    for block in re.findall(r"(?:^\|.*\n)+", card(*private()), flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
