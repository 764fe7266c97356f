"""The private adapter: what it is pulled to, where it lives, and that nobody sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.client import personal
from anabranch.client.models import Models
from anabranch.client.site import Site
from anabranch.client.tuning.bases import load_classifier
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.lora import load_adapter, merged_weights, read_adapter
from anabranch.protocols import wire
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.config import RunConfig, parse
from anabranch.protocols.errors import ConfigError, ModelError, ProtocolError
from anabranch.protocols.messages import Assignment
from anabranch.protocols.part import Part
from tests.runs import PRIVATE, TEXT_RUN, table_run, table_text, write_site, write_table

HELD_OUT = ("local_epochs = 2", "local_epochs = 2\nholdout = 0.25")


def beside_run(*replacements: tuple[str, str], extra: str = "", **fields: float) -> RunConfig:
    table = {"rank": 2, "pull": 0.1, "local_epochs": 3} | fields
    lines = "\n".join(f"{name} = {value}" for name, value in table.items())
    return table_run(*replacements, extra=f"\n[personal]\n{lines}\n{extra}")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    data = write_table(tmp_path / "records.csv", n=80)
    return Site(write_site(tmp_path / "north", "north", data), Models())


def start(config: RunConfig, seed: int | None = None) -> Adapter:
    adapter = read_adapter(load_classifier(config))
    if seed is None:
        return adapter
    rng = np.random.default_rng(seed)
    arrays = {
        name: a + rng.normal(0, 0.3, a.shape).astype(np.float32)
        for name, a in adapter.arrays.items()
    }
    return Adapter(adapter.spec, arrays)


def asked(config: RunConfig, number: int = 1, run: str = "r1") -> Assignment:
    return Assignment(run=run, round=number, config=config)


def wide(config: RunConfig) -> Classifier:
    return load_classifier(config, lora=personal.wider(config, None))


def own(site: Site, config: RunConfig, run: str = "r1") -> Adapter:
    found = personal.private_adapter(site.folder, run).load(wide(config).spec)
    assert found is not None
    return found


# Laws


@given(seed=st.integers(0, 2**32), pull=st.floats(0, 10), gauge=st.floats(0.2, 5))
def test_the_penalty_is_the_distance_of_effective_weights(
    seed: int, pull: float, gauge: float
) -> None:
    config = beside_run()
    shared = start(config, seed=seed)
    plain, classifier = load_classifier(config), wide(config)
    rng = np.random.default_rng(seed)
    values = {
        name: rng.normal(0, 0.5, shape).astype(np.float32)
        for name, shape in classifier.spec.tensors
    }
    private = Adapter(classifier.spec, values)
    load_adapter(plain, shared)
    load_adapter(classifier, personal.beside(classifier.spec, shared, private, rng))
    v, w = merged_weights(classifier), merged_weights(plain)
    expected = pull / 2 * sum(float((v[name] - w[name]).double().square().sum()) for name in w)

    penalty = personal.ditto(classifier, shared, pull)
    before = float(penalty().detach())
    with torch.no_grad():  # C <- C / g, D <- g D says the same
        for name, p in classifier.base.named_parameters():
            if name.endswith("lora_A.weight"):
                p[3:] /= gauge
            if name.endswith("lora_B.weight"):
                p[:, 3:] *= gauge

    assert before == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert float(penalty().detach()) == pytest.approx(before, rel=1e-4, abs=1e-6)


def test_without_private_values_the_model_is_the_shared_one() -> None:
    config = beside_run()
    shared = start(config, seed=1)
    plain, classifier = load_classifier(config), wide(config)
    load_adapter(plain, shared)
    begin = personal.beside(classifier.spec, shared, None, np.random.default_rng(0))
    load_adapter(classifier, begin)

    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(classifier(x, None), plain(x, None))
    assert float(personal.ditto(classifier, shared, 1.0)().detach()) == 0
    for _, a, b in classifier.spec.factors():
        bound = 1 / np.sqrt(begin.arrays[a].shape[1])
        assert 0 < abs(begin.arrays[a][3:]).max() <= bound
        assert not begin.arrays[b][:, 3:].any()


def test_the_wider_adapter_has_the_same_scaling() -> None:
    config = beside_run(rank=5)
    lora = personal.wider(config, None)

    assert lora.rank == 8
    assert lora.alpha / lora.rank == pytest.approx(config.lora.alpha / config.lora.rank)
    assert personal.wider(config, 2).rank == 5


# A round


@pytest.mark.parametrize("privacy", ["", PRIVATE])
def test_the_frame_is_the_same_with_and_without_a_private_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, privacy: str
) -> None:
    if privacy:
        reproducible_noise(monkeypatch)
    data = write_table(tmp_path / "records.csv")
    steps = ("local_epochs = 2", "local_steps = 3")
    frames = []
    for name, config in (
        ("a", beside_run(steps, extra=privacy)),
        ("b", table_run(steps, extra=privacy)),
    ):
        one = Site(write_site(tmp_path / name, "north", data), Models())
        adapter = start(config, seed=0)
        frames.append([one.train(asked(config, number), adapter)[1] for number in (1, 2)])

    assert frames[0] == frames[1]
    assert (tmp_path / "a" / "personal" / "r1.adapter").exists()
    assert not (tmp_path / "b" / "personal").exists()


def reproducible_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    from anabranch.client.tuning.randomness import Randomness

    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        Randomness,
        "fresh",
        classmethod(lambda cls: cls.reproducible(generator.manual_seed(0))),
    )


def test_the_private_adapter_goes_on_from_round_to_round_and_process_to_process(
    tmp_path: Path,
) -> None:
    config = beside_run()
    data = write_table(tmp_path / "records.csv")
    one, other = (Site(write_site(tmp_path / n, "north", data), Models()) for n in ("a", "b"))
    for site in (one, other):
        site.train(asked(config), start(config))
    first = own(one, config)
    again = Site(other.folder, Models())

    one.train(asked(config, 2), start(config, seed=1))
    again.train(asked(config, 2), start(config, seed=1))

    second = own(one, config)
    for name, array in second.arrays.items():
        np.testing.assert_array_equal(array, own(again, config).arrays[name])
        assert (array != first.arrays[name]).any()


def test_only_private_values_are_kept(site: Site) -> None:
    config = beside_run()
    adapter = start(config, seed=0)

    site.train(asked(config), adapter)

    kept = own(site, config)
    part = Part(ranks=(3, 4))
    assert all(array.any() for array in part.take(kept.spec, kept.arrays).values())
    for name, array in kept.only(part).arrays.items():
        np.testing.assert_array_equal(array, kept.arrays[name])


def test_metrics_of_the_private_model_come_with_those_of_the_shared_one(site: Site) -> None:
    config = beside_run(HELD_OUT, local_epochs=30)
    adapter = start(config)

    before = site.evaluate(asked(config), adapter)
    site.train(asked(config), adapter)
    after = site.evaluate(asked(config), adapter)

    assert not {name for name in before.metrics if name.startswith("personal_")}
    assert set(after.metrics) == set(before.metrics) | {f"personal_{n}" for n in before.metrics}
    assert {n: after.metrics[n] for n in before.metrics} == before.metrics
    assert after.metrics["personal_loss"] < 0.7 * after.metrics["loss"]


def trained_loss(tmp_path: Path, name: str, pull: float) -> tuple[float, float]:
    """Return (loss on the local records, distance ‖v − w‖) after a round with this pull."""
    config = beside_run(
        ("learning_rate = 0.05", 'learning_rate = 0.05\noptimizer = "sgd"\nmomentum = 0.0'),
        ("batch_size = 8", "batch_size = 80\nmax_grad_norm = 1e9"),
        pull=pull,
        local_epochs=200,
    )
    data = write_table(tmp_path / f"{name}.csv", n=80)
    site = Site(write_site(tmp_path / name, "north", data), Models())
    shared = start(config, seed=0)
    site.train(asked(config), shared)
    classifier = wide(config)
    rng = np.random.default_rng(0)
    load_adapter(classifier, personal.beside(classifier.spec, shared, own(site, config), rng))
    records, _ = site.records(config)
    with torch.no_grad():
        logits = classifier(torch.from_numpy(records.inputs), None)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(records.labels))
        distance = (2 * personal.ditto(classifier, shared, 1.0)()).sqrt()
    return float(loss), float(distance)


def test_a_strong_pull_gives_the_shared_model_and_none_fits_the_local_records(
    tmp_path: Path,
) -> None:
    free, some, strong = (
        trained_loss(tmp_path, name, pull) for name, pull in (("f", 0.0), ("s", 0.3), ("t", 15.0))
    )

    assert free[0] < some[0] < strong[0]
    assert free[1] > some[1] > strong[1]
    assert strong[1] < 0.05 * free[1]


def test_a_private_adapter_that_diverges_stays_as_it_was_and_the_round_goes_on(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    config = beside_run(
        ("learning_rate = 0.05", 'learning_rate = 0.05\noptimizer = "sgd"'),
        ("batch_size = 8", "batch_size = 8\nmax_grad_norm = 1e30"),
        pull=1e12,
    )

    report, frame = site.train(asked(config), start(config, seed=0))

    assert report.steps > 0
    assert wire.decode_delta(frame, start(config).spec).norm() > 0
    assert "leaves its private adapter as it was" in caplog.text
    assert not (site.folder / "personal" / "r1.adapter").exists()


def test_a_machine_with_a_limit_has_a_private_adapter_within_it(site: Site) -> None:
    file = site.folder / "site.toml"
    file.write_text(file.read_text() + "max_rank = 3\n")
    config = beside_run(rank=7)
    weak = Site(site.folder, Models())

    weak.train(asked(config), start(config))

    kept = wire.decode_adapter((weak.folder / "personal" / "r1.adapter").read_bytes())
    assert kept.spec.rank == 3 + 3


def test_a_base_without_layers_to_adapt_has_a_private_head(site: Site) -> None:
    config = beside_run(('base = "mlp"', 'base = "logistic"'))

    site.train(asked(config), start(config))

    kept = wire.decode_adapter((site.folder / "personal" / "r1.adapter").read_bytes())
    assert kept.spec.rank == 0
    assert kept.arrays["head.weight"].any()


def test_text_runs_with_a_private_adapter_too(tmp_path: Path) -> None:
    data = tmp_path / "records.csv"
    rows = [
        f"{'beat pulse' if i % 2 else 'joint marrow'} {i},{'heart' if i % 2 else 'bone'}"
        for i in range(12)
    ]
    data.write_text("text,y\n" + "\n".join(rows) + "\n")
    text = TEXT_RUN.replace("learning_rate = 0.001", "learning_rate = 0.01\nholdout = 0.3")
    config = parse(text + "\n[personal]\nrank = 1\nlocal_epochs = 4\n", source="run.toml")
    site = Site(write_site(tmp_path / "north", "north", data), Models())
    adapter = start(config)

    site.train(asked(config), adapter)
    metrics: dict[str, Any] = site.evaluate(asked(config), adapter).metrics

    assert metrics["personal_loss"] < metrics["loss"]


# Refusals


def test_a_damaged_private_adapter_is_refused_with_what_to_do(site: Site) -> None:
    config = beside_run(HELD_OUT)
    site.train(asked(config), start(config))
    file = site.folder / "personal" / "r1.adapter"
    file.write_bytes(file.read_bytes()[:-1])

    for action in (site.train, site.evaluate):
        with pytest.raises(ModelError, match=r"personal/r1\.adapter in the site's folder cannot"):
            action(asked(config, 2), start(config))

    file.unlink()
    site.train(asked(config, 2), start(config))


@pytest.mark.parametrize(
    ("old", "new", "head"),
    [("rounds = 2", 'rounds = 2\nmethod = "fedsa"', ""), ("", "", 'head = "local"\n')],
)
def test_a_private_adapter_beside_a_model_of_ones_own_is_refused(
    old: str, new: str, head: str
) -> None:
    text = table_text((old, new)) if old else table_text()

    with pytest.raises(ConfigError, match=r"personal\.rank is for models that all sites share"):
        parse(f"{text}\n[personal]\nrank = 2\n{head}", source="run.toml")


@pytest.mark.parametrize("run", ["r1.kept", "r1.KEPT"])
def test_no_run_can_write_what_another_run_has_kept(site: Site, run: str) -> None:
    """Its private adapter, trained without noise, would be the kept tensors of run r1."""
    config = beside_run()

    with pytest.raises(ProtocolError, match=r"a name that does not end in '\.kept'"):
        site.train(asked(config, run=run), start(config))
    assert not (site.folder / "personal").exists()
