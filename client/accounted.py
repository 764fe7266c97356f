"""A site's privacy: what its rounds and sums cost, and what of an error may leave."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from anabranch.client.data.records import Records
from anabranch.client.ledger import Ledger
from anabranch.client.one_round import Asked
from anabranch.client.private_round import Books, PrivateRound, open_round
from anabranch.client.question import Reserving
from anabranch.client.refusals import without_folders
from anabranch.client.site_file import SiteFile, ledger_of, witness_folder
from anabranch.client.sums.noised import NoisedSum, Rounds, noised_sum
from anabranch.client.tuning.randomness import Randomness
from anabranch.protocols.config import RunConfig
from anabranch.protocols.errors import PrivacyError
from anabranch.protocols.messages import Assignment
from anabranch.protocols.secagg.agreed_noise import noise_of, values_of
from anabranch.protocols.spec import AdapterSpec

log = logging.getLogger(__name__)


class Accounted:
    """A site as one that accounts for what it spends on its records."""

    name: str
    folder: Path
    _file: SiteFile

    def records(self, config: RunConfig) -> tuple[Records, Records]:
        """Return (training, held-out) records."""
        raise NotImplementedError

    @property
    def ledger(self) -> Ledger:
        """Return the site's privacy ledger."""
        return ledger_of(self.folder, self._file)

    def _reserve(
        self,
        assignment: Assignment,
        rows: Sequence[bytes],
        asked: Asked | None,
        spec: AdapterSpec,
    ) -> PrivateRound:
        """Plan and reserve a private round; an error's text leaves without the site's paths."""
        books = self.books if asked is None else Reserving(self.ledger, asked.attempt)
        try:
            return open_round(
                assignment,
                rows,
                folder=self.folder,
                ledger=books,
                budget=self._file.budget,
                randomness=self._randomness(assignment),
                spec=spec,
            )
        except PrivacyError as error:
            raise self._outward(error) from error

    def _noised(
        self, assignment: Assignment, spec: AdapterSpec, masked: Rounds
    ) -> NoisedSum | None:
        """Return what charges a contribution whose noise the members make; None: they do not."""
        if noise_of(assignment.config, values_of(spec)) is None:
            return None
        return noised_sum(
            assignment.config,
            spec,
            books=self.books,
            rows=self.records(assignment.config)[0].identities(),
            budget=self._file.budget,
            masked=masked,
        )

    @property
    def books(self) -> Books:
        """Return where a private round is reserved and settled: the site's ledger."""
        return self.ledger

    def _randomness(self, assignment: Assignment) -> Randomness | None:
        """Return where the noise of a private round comes from; None: the operating system."""
        return None

    def _outward(self, error: PrivacyError) -> PrivacyError:
        """Return an error that does not say where files lie; the log has all of it."""
        witnesses = witness_folder(self._file)
        text = without_folders(str(error), [self.folder, *([witnesses] if witnesses else [])])
        if text == str(error):
            return error
        log.warning("%s: %s", self.name, error)
        return PrivacyError(text)
