import re
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from anabranch.edge.runtime.manifest import File
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.spec import AdapterSpec
from anabranch.protocols.tables import Column, Contract, Federation, Model, Privacy, Task, Training
from anabranch.server.card import Checks, RunFacts, SitePrivacy, model_card
from tests.privacy_cases import client_config, client_plan

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
        site="south",
        epsilon=6.25,
        delta=2e-4,
        noise_multiplier=1.25,
        sample_rate=0.05,
        steps=240,
        engine="opacus",
        ledger="ab12",
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
    private = msgspec.structs.replace(CONFIG, privacy=privacy, federation=Federation(rounds=6))
    return private, replace(FACTS, privacy=SITES)


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


def test_the_privacy_section_states_unit_target_mechanism_and_every_site() -> None:
    text = card(*private())

    for line in (
        "the sequence of all messages that it sent in rounds 1 to 6 is (ε_k, δ_k)-differentially",
        "with respect to adding or removing one record of its training set",
        "Poisson sample",
        "an ℓ2 norm below C = 0.5 (automatic, AUTO-S)",
        "Accountant: PRV",
        "Target of this run: ε = 8 per site",
        "| north | 7.500 | 7.380 | 0.0001 | 0.8750 | 0.062500 | 240 | \u2013 | \u2013 |\n"
        "| south | 6.250 | 2.746 | 0.0002 | 1.2500 | 0.050000 | 240 | opacus | ab12 |",
        "Client level: none.",
    ):
        assert line in text, line


@pytest.mark.parametrize(
    "thing",
    [
        "| number of training and of held-out records of a site | not covered |",
        "| that a site takes part, when, for how long, and how often it fails | not covered |",
        "| choice of the best round | not covered |",
        "| normalisation (mean, std) of age | fixed in advance |",
        "* the choice of this configuration",
        "floating-point noise",
    ],
)
def test_the_privacy_section_says_what_is_not_covered(thing: str) -> None:
    section = card(*private()).split("## Privacy")[1].split("## Metrics")[0]

    assert thing in section


def test_a_private_run_without_the_facts_of_a_site_has_no_card() -> None:
    config, facts = private()

    with pytest.raises(PrivacyError, match="no privacy facts of site 'north'"):
        card(config, replace(facts, privacy=SITES[:1]))


@pytest.mark.parametrize("record", [False, True])
def test_a_card_of_a_client_private_run_names_no_client(record: bool) -> None:
    protected = client_config(privacy=private()[0].privacy if record else None)
    facts = replace(FACTS, privacy=SITES if record else (), client=client_plan())
    text = card(protected, facts)

    assert "north" not in text
    assert "south" not in text
    assert "fine-tuned by clients, drawn from 1000, over 6 rounds" in text
    assert "It does not hold against the coordinator" in text


def test_a_refused_int8_model_is_stated() -> None:
    text = card(int8_accepted=False)

    assert "int8 model was refused: it lost more than 0.01" in text
    assert 'precision="fp32"' in text


def test_names_cannot_break_out_of_a_table_or_become_html() -> None:
    columns = {"<img src=x>": Column(type="text"), "a\n\n# b": Column(type="label")}
    config = msgspec.structs.replace(CONFIG, data=Contract(columns=columns))
    hostile = "<img src=y>|a\\|[go](http://x)\n# c"
    facts = replace(FACTS, sites=("north", "south", hostile))
    text = card(config, facts)

    assert "<img" not in text
    assert "](http" not in text
    assert "\n# b" not in text
    assert "\n# c" not in text
    assert "heart, bone\\|joint" in text


def test_every_table_row_has_as_many_cells_as_its_head() -> None:
    config, facts = private()
    hostile = replace(SITES[0], site="a|b\\|c\nd", engine="|", ledger="|x")
    facts = replace(facts, privacy=(*SITES, hostile), sites=(*facts.sites, hostile.site))
    for block in re.findall(r"(?:^\|.*\n)+", card(config, facts), flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
