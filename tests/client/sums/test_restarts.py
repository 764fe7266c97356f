"""A site that is started anew, or killed, between its training and the end of a secure sum."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from anabranch.client.flower import NO_LIMITS
from anabranch.client.models import Models
from anabranch.client.site import Site
from anabranch.client.sums.given import InFile, InMemory
from anabranch.client.sums.participant import PARTICIPANTS, Participant
from anabranch.client.sums.terms import summed, vector_of
from anabranch.protocols.adapter import Delta
from anabranch.protocols.errors import ProtocolError, RunError
from anabranch.protocols.messages import Assignment
from anabranch.protocols.secagg import contribution
from anabranch.protocols.secagg.coordinator import Aggregation
from anabranch.protocols.secagg.member import Answer
from anabranch.protocols.secagg.messages import Invite, Request
from anabranch.server.evaluation import initial_adapter
from anabranch.server.flower import Peer, Question
from anabranch.server.sums.terms import roster_of, terms_of
from tests import secure_cases
from tests.client.killing import Killed, Life, living, new_site
from tests.runs import table_run
from tests.secure_cases import secured

RUN = secured(table_run(("local_epochs = 2", "local_steps = 2")), range=64.0, value_bits=24)
FIRST = initial_adapter(RUN)
ASSIGNMENT = Assignment(run="r1", round=1, config=RUN)
MODELS = Models()
OTHERS = ("oslo", "paris")


def started(folder: Path) -> Site:
    """Start a site anew: nothing of an earlier process is in memory."""
    PARTICIPANTS.forget("r1")
    return Site(folder, MODELS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a joined site that has trained round 1, and said so."""
    folder = new_site(tmp_path_factory.mktemp("secure") / "north")
    (folder / "identity").mkdir()
    (folder / "identity" / "coordinator.json").write_text("{}")
    report, frame = started(folder).train(ASSIGNMENT, FIRST)
    assert (report.num_examples, frame) == (0, b"")
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "north")


def others() -> dict[str, Participant]:
    """Return two more members, whose deltas are 0."""
    members = {n: Participant(n, Ed25519PrivateKey.generate(), InMemory()) for n in OTHERS}
    arrays = {name: 0 * array for name, array in FIRST.arrays.items()}
    for one in members.values():
        one.keep(ASSIGNMENT, FIRST, Delta(FIRST.spec, arrays, 10, steps=2))
    return members


def invitation(site: Site, members: Mapping[str, Participant], instance: str = "") -> Invite:
    key = site.peer_key("r1", RUN)
    keys = {"north": key, **{name: one.public_key for name, one in members.items()}}
    peers = {name: Peer(name, i, 40, 0, None, key) for i, (name, key) in enumerate(keys.items())}
    question: Question[Any] = Question("train", 1, peers, lambda answer, peer: None)  # type: ignore[arg-type, return-value]
    question.parts = dict.fromkeys(peers, ASSIGNMENT.part)
    secure = RUN.secure_aggregation
    assert secure is not None
    roster = roster_of(peers)
    terms = terms_of(RUN, secure, question, FIRST, sorted(peers), roster, "r1")
    if instance:
        terms = msgspec.structs.replace(terms, instance=instance)
    return Invite(terms=terms, roster=roster)


def carried(site: Site, life: Life | None = None, until: str = "done") -> Aggregation:
    """Carry a sum of the site and two others as far as it comes; the site may die in it."""
    members = others()

    def answer(name: str, request: Request) -> Answer | None:
        if name == "north":
            return answered(site, request, life)
        return members[name].answer(ASSIGNMENT, request, NO_LIMITS, vector_of)

    return secure_cases.carried(invitation(site, members), answer, until)


def answered(site: Site, request: Request, life: Life | None) -> Answer | None:
    try:
        with living(life or Life()):
            return site.secure(ASSIGNMENT, request)
    except Killed:
        return None


def mean(aggregation: Aggregation) -> NDArray[np.float32]:
    (total,) = aggregation.sums
    found = contribution.mean_of(
        total.total,
        aggregation.terms,
        FIRST.spec,
        summed(ASSIGNMENT.part),
        normalize_steps=False,
        by_rank=False,
    )
    assert found.num_examples == 20 + 40
    return np.concatenate([array.reshape(-1) for array in found.arrays.values()])


def started_anew_at(stage: str, folder: Path) -> Site:
    """Start a site anew at a stage of a sum, and fail unless it is lost there."""
    first = carried(started(folder), until=stage)
    anew = started(folder)
    with pytest.raises(ProtocolError, match=r"in no secure sum .*started anew since"):
        anew.secure(ASSIGNMENT, first.requests()["north"])
    return anew


def given(folder: Path) -> dict[int, str]:
    return InFile(folder / "secure" / "given" / "r1").read()


def test_a_site_that_is_started_anew_after_its_training_is_in_the_sum(folder: Path) -> None:
    done = carried(started(folder))

    assert done.stage == "done"
    assert done.sums[0].members == ("north", *OTHERS)
    assert np.abs(mean(done)).max() > 0.01
    assert given(folder) == {1: done.terms.instance}
    assert list((folder / "secure" / "kept").iterdir()) == []


@pytest.mark.parametrize("stage", ["share", "mask"])
def test_started_anew_in_a_sum_it_is_lost_there_and_in_the_next_one(
    folder: Path, stage: str
) -> None:
    anew = started_anew_at(stage, folder)

    assert carried(anew).stage == "done"


@pytest.mark.parametrize("stage", ["agree", "reveal"])
def test_started_anew_after_its_update_was_masked_it_is_in_no_other_sum(
    folder: Path, stage: str
) -> None:
    anew = started_anew_at(stage, folder)

    with pytest.raises(ProtocolError, match="has given its update to a sum already"):
        anew.secure(ASSIGNMENT, invitation(anew, others()))


def test_killed_at_any_write_before_it_says_that_it_trained_it_is_in_the_sum(
    trained: Path, tmp_path: Path
) -> None:
    """The update itself is written by then; killed before: test_killed_site.py."""
    shutil.copytree(trained, tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "secure" / "kept")
    whole = Life()
    shutil.copytree(tmp_path / "whole", tmp_path / "0")
    with living(whole):
        started(tmp_path / "0").train(ASSIGNMENT, FIRST)
    assert whole.writes >= 4
    for at in range(1, whole.writes + 1):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(at))
        with pytest.raises(Killed), living(Life(at=at)):
            started(folder).train(ASSIGNMENT, FIRST)
        started(folder).train(ASSIGNMENT, FIRST)  # the coordinator asks again

        assert carried(started(folder)).stage == "done"


def test_killed_at_any_write_of_a_sum_its_update_is_given_or_in_the_next_one(
    trained: Path, tmp_path: Path
) -> None:
    whole = Life()
    folder = shutil.copytree(trained, tmp_path / "0")
    expected = mean(carried(started(folder), whole))
    assert whole.writes >= 5
    seen = set()
    for at in range(1, whole.writes + 1):
        folder = shutil.copytree(trained, tmp_path / str(at))
        first = carried(started(folder), Life(at=at))
        assert first.stage == "aborted"  # of three, three are needed
        anew = started(folder)

        seen.add(bool(given(folder)))
        if given(folder):
            for instance in ("", first.terms.instance):  # another sum; and the same one again
                again = invitation(anew, others(), instance)
                with pytest.raises(ProtocolError, match="has given its update to a sum already"):
                    anew.secure(ASSIGNMENT, again)
        else:
            np.testing.assert_allclose(mean(carried(anew)), expected, atol=1e-5)
    assert seen == {False, True}


def test_the_next_round_takes_the_place_of_the_one_that_waited(folder: Path) -> None:
    second = msgspec.structs.replace(ASSIGNMENT, round=2)
    started(folder).train(second, FIRST)
    anew = started(folder)

    with pytest.raises(ProtocolError, match="keeps no delta of this round"):
        anew.secure(ASSIGNMENT, invitation(anew, others()))


def test_an_answer_that_is_not_kept_any_more_is_not_summed(folder: Path) -> None:
    shutil.rmtree(folder / "answers")
    anew = started(folder)

    with pytest.raises(ProtocolError, match="keeps no delta of this round"):
        anew.secure(ASSIGNMENT, invitation(anew, others()))


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("secure/kept/r1", r"secure/kept/r1 in the site's folder .*cannot be read"),
        ("answers/*/frame", r"answers/.*/frame in the site's folder: not what was written"),
    ],
)
def test_what_cannot_be_read_is_not_summed(folder: Path, file: str, said: str) -> None:
    (damaged,) = folder.glob(file)
    written = damaged.read_bytes()
    damaged.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))
    anew = started(folder)

    with pytest.raises(RunError, match=said):
        anew.secure(ASSIGNMENT, invitation(anew, others()))


def test_the_record_is_the_owners_alone_and_holds_no_update(folder: Path) -> None:
    record = folder / "secure" / "kept" / "r1"

    assert record.stat().st_mode & 0o777 == 0o600
    said = msgspec.json.decode(record.read_bytes())
    assert sorted(said) == ["assignment", "key", "model", "spec"]
    assert (folder / "answers" / said["key"] / "frame").exists()
