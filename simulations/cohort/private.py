"""DP-SGD of many clients at once; the numbers are those of client/tuning/private.py.

    Locals ─► alike: one classifier, one set of trained tensors, one clipping
           ─► cohorts of about ROWS rows a step ─► steps ─► Learned, or that client's error

One step of a cohort, for all of its clients:

    B_k   a Poisson sample of client k's records, from k's own randomness
    g_r   one backward pass over the records of all B_k    grouped_private.py
    S_k   Σ_{r in B_k} clipped g_r                         the rows of a matrix (K, P)
    S_k + σ_k C_k N(0, 1), / (q n)_k, + FedProx, optimiser, masks

Every client has its own plan, C, noise, accountant and checks, in the order in which fit_private
draws and makes them: with the same key the samples and the noise are the same. A client whose
batch is empty takes a step of noise alone; one that is refused leaves the others alone.

What is simulated is the arithmetic of a guarantee. No real record is protected by it: noise may
come from a seed, and the ledger is gone when the run is over (population/books.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from anabranch.client.local import Learned, Local, require_frozen, train_alone
from anabranch.client.tuning.active import Active, only
from anabranch.client.tuning.classifier import Classifier
from anabranch.client.tuning.clipping import clipping_factors, total_norms, within
from anabranch.client.tuning.known import unknown_tensors
from anabranch.client.tuning.lora import HEAD, trainable_parameters
from anabranch.client.tuning.per_record import Ghost, Matrix, PerRecord
from anabranch.client.tuning.private import (
    NOISE_ALONE,
    PrivateFit,
    require_as_planned,
    trained_or_silent,
)
from anabranch.client.tuning.training import make_optimizer
from anabranch.protocols.adapter import Adapter
from anabranch.protocols.errors import AnabranchError, IncompatibleAdapter
from anabranch.protocols.schedule import learning_rate_factor
from anabranch.simulations.cohort.grouped_private import GroupedGradients, grouped_gradients
from anabranch.simulations.cohort.private_member import Member, cohorts_of
from anabranch.simulations.cohort.private_records import (
    Chunk,
    Records,
    Values,
    chunk_limit,
)
from anabranch.simulations.cohort.steps import failed

log = logging.getLogger(__name__)


def can_batch(local: Local) -> str | None:
    """Return why a private round must be trained alone, or None if it can be batched."""
    classifier, round = local.classifier, local.private
    if round is None:
        return "it is not a private round"
    if round.plan.together is not None:
        return "its noise is added in a secure sum"
    if round.engine != "fast":
        return f'privacy.engine = "{round.engine}": cohorts have gradients of their own'
    if classifier.merged:
        return "the adapter is merged into the base"
    parameters = trainable_parameters(classifier)
    if len({(p.dtype, p.device) for p in parameters.values()}) != 1:
        return "the trained tensors are of several types or devices"
    unknown = unknown_tensors(classifier, parameters)
    if unknown:
        return f"no grouped per-record gradients for the layers of {', '.join(unknown)}"
    return None


def train_private_cohort(locals: Sequence[Local]) -> list[Learned | AnabranchError]:
    """Return what came of every private Local, in order; an error is that client's alone.

    Equal to `train_alone` of each to 1e-5, given the same randomness. What `can_batch` refuses is
    trained alone.
    """
    results: dict[int, Learned | AnabranchError] = {}
    members: list[Member] = []
    reasons: dict[tuple[int, str | None], str | None] = {}
    for place, local in enumerate(locals):
        engine = None if local.private is None else local.private.engine
        key = id(local.classifier), engine  # all that can_batch looks at
        if key not in reasons:
            reasons[key] = can_batch(local)
        try:
            if reasons[key] is None:
                members.append(Member.of(place, local))
            else:
                results[place] = train_alone(local)
        except AnabranchError as error:
            results[place] = error
    for cohort in cohorts_of(members):
        results |= _train(cohort)
    return [results[place] for place in range(len(locals))]


def _train(members: Sequence[Member]) -> dict[int, Learned | AnabranchError]:
    """Train one cohort; an error that is nobody's own is everybody's."""
    first = members[0].local
    try:
        with only(first.classifier, first.part, first.kept):
            done = _Cohort(members).run()
        require_frozen(first.classifier)
    except AnabranchError as error:
        return {member.place: error for member in members}
    return done


class _Cohort:
    """The matrices of one cohort, and its steps."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self.classifier: Classifier = members[0].local.classifier
        self.clipping = members[0].round.plan.clipping
        shapes, names = self.classifier.spec.shapes, members[0].masks
        starts = [member.local.start for member in members]
        self.trained = Values({name: shapes[name] for name in names}, starts)
        self.fixed = Values({n: s for n, s in shapes.items() if n not in names}, starts)
        device = self.classifier.device
        self.trained.to(device)
        self.fixed.to(device)
        self.values = self.trained.rows
        self.start = self.values.clone()
        self.gradient = torch.zeros_like(self.values)
        self.masked = {n for m in members for n, mask in m.masks.items() if mask is not None}
        self.frozen = self._frozen() if self.masked else None
        column = [[m.expected_batch, m.local.proximal_mu] for m in members]
        self.expected, self.mu = torch.tensor(column).to(self.values).unsqueeze(2).unbind(1)
        self.records = Records([m.local for m in members], device)
        self.limit = chunk_limit(self.trained.size, self.records.tokens)
        self.optimizers = list(self._optimizers())

    def _frozen(self) -> Tensor:
        """Return where values are NOT trained, (K, P) bool."""
        frozen = torch.zeros(self.values.shape, dtype=torch.bool)
        for row, member in zip(frozen, self.members, strict=True):
            for slot, part in zip(self.trained.slots, self.trained.parts(row), strict=True):
                mask = member.masks[slot.name]
                if mask is not None:
                    part.copy_(torch.from_numpy(~mask))
        return frozen.to(self.values.device)

    def _optimizers(self) -> Iterator[tuple[torch.optim.Optimizer, list[float], Member]]:
        """Yield one optimiser for each run of clients of one pace, its rates, and one of them."""
        cut = next((s.start for s in self.trained.slots if s.name.startswith(f"{HEAD}.")), None)
        at = 0
        for pace, run in groupby(self.members, key=lambda member: member.pace):
            alike = list(run)
            rows = slice(at, at + len(alike))
            at += len(alike)
            halves = {"rest": slice(0, cut), f"{HEAD}.all": slice(cut, None)}
            if cut is None:
                del halves[f"{HEAD}.all"]
            vectors = {}
            for name, columns in halves.items():
                if self.values[rows, columns].numel():
                    vectors[name] = nn.Parameter(self.values[rows, columns])
                    vectors[name].grad = self.gradient[rows, columns]
            optimizer = make_optimizer(vectors, pace[0])
            yield optimizer, [group["lr"] for group in optimizer.param_groups], alike[0]

    def run(self) -> dict[int, Learned | AnabranchError]:
        """Take every step of every client; return what came of each, by its place."""
        results: dict[int, Learned | AnabranchError] = {}
        longest = max(member.local.steps for member in self.members)
        with grouped_gradients(self.classifier, self.trained, self.fixed, self.masked) as gradients:
            for at in range(longest):
                self._step(gradients, at)
                for k, member in enumerate(self.members):
                    if member.local.steps == at + 1:
                        results[member.place] = self._finish(k)
        return results

    @torch.no_grad()
    def _step(self, gradients: GroupedGradients, at: int) -> None:
        """Take step `at` of every client that has one."""
        active = [k for k, member in enumerate(self.members) if member.local.steps > at]
        samples = {k: self.members[k].sample() for k in active}
        self.gradient.zero_()
        inside = [0.0] * len(self.members)
        gradients.refresh()
        for chunk in self.records.chunks(samples, self.limit):
            with torch.enable_grad():
                found = gradients.gradients(chunk)
            self._add(found, chunk, inside)
        for k in active:
            self.members[k].release(self.gradient[k], inside[k])
        if self.frozen is not None:
            self.gradient.masked_fill_(self.frozen, 0.0)
        self.gradient.div_(self.expected)
        if bool(self.mu.any()):
            self.gradient.addcmul_(self.values - self.start, self.mu)
        self._descend(at)
        if self.frozen is not None:
            torch.where(self.frozen, self.start, self.values, out=self.values)

    def _add(self, found: PerRecord, chunk: Chunk, inside: list[float]) -> None:
        """Add clipped gradients to their clients' sums; with adaptive clipping, count to C."""
        apart = self.clipping == "per-layer"
        self._mask(found, chunk)
        blocks = found.blocks(self.trained.slots, packed=not apart)
        norms = torch.stack([block.norms() for _, block in blocks])
        whole = total_norms(norms)
        if not bool(whole.isfinite().all()):  # no bound holds for it: it counts as 0
            bad = ~whole.isfinite()
            blocks = [(at, block.without(bad)) for at, block in blocks]
            norms, whole = norms.masked_fill(bad, 0.0), whole.masked_fill(bad, 0.0)
        bounds = torch.tensor([member.norm for member in self.members]).to(norms)[chunk.owner]
        factors = clipping_factors(self.clipping, norms if apart else whole, bounds)
        reached = set(chunk.owner[whole > 0].tolist())
        for client, start, stop in chunk.segments:
            of, total = slice(start, stop), self.gradient[client]
            for i, (at, block) in enumerate(blocks):
                _rows(block, of).add(total[at], (factors[i] if apart else factors)[of])
            if self.clipping == "adaptive":
                inside[client] += float(within(factors[of]))
            member = self.members[client]
            member.learned = member.learned or client in reached

    def _mask(self, found: PerRecord, chunk: Chunk) -> None:
        """Set the gradients of ranks that a client does not train to zero, before any norm."""
        if self.frozen is None:
            return
        for slot in self.trained.slots:
            if slot.name in self.masked:
                part = found.parts[slot.name]
                assert isinstance(part, Matrix)  # no ghosts of masked tensors
                part.rows.masked_fill_(self.frozen[:, slot.start : slot.stop][chunk.owner], 0.0)

    def _descend(self, at: int) -> None:
        """Let the optimisers step."""
        for optimizer, rates, member in self.optimizers:
            training, steps, first = member.pace
            step = min(first + at, steps - 1)  # beyond it nobody of this pace has a step
            factor = learning_rate_factor(step, steps, training.warmup, training.schedule)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.step()

    def _finish(self, k: int) -> Learned | AnabranchError:
        """Return what a client learned after its last step, if it may be told."""
        member = self.members[k]
        local, plan = member.local, member.round.plan
        tensors = self._tensors(k, self.trained.rows)
        try:
            require_as_planned(member.accountant.history, plan.spend(local.steps))
            after = local.start
            if self._trained(k, tensors):
                arrays = {name: tensor.cpu().numpy().copy() for name, tensor in tensors.items()}
                after = Adapter(local.start.spec, arrays)
        except IncompatibleAdapter as error:  # not finite
            return failed(local, error)
        except AnabranchError as error:
            return error
        if member.drawn and not member.learned:
            log.warning("%s: %s", local.name, NOISE_ALONE)
        spend = plan.spend(local.steps)
        fit = PrivateFit(spend=spend, engine="fast", clipping_norm=member.norm)
        return Learned(after=after, steps=local.steps, private=fit)

    def _tensors(self, k: int, rows: Tensor) -> dict[str, Tensor]:
        """Return the adapter of a client, `rows` those of what is trained: views."""
        found: dict[str, Tensor] = {}
        for group, row in ((self.trained, rows[k]), (self.fixed, self.fixed.rows[k])):
            names = (slot.name for slot in group.slots)
            found |= zip(names, group.parts(row), strict=True)
        return found

    def _trained(self, k: int, tensors: Mapping[str, Tensor]) -> bool:
        member, before = self.members[k], self._tensors(k, self.start)
        own = {name: mask for name, mask in member.masks.items() if mask is not None}
        device = self.values.device
        active = Active(
            parameters={
                name: nn.Parameter(tensors[name], requires_grad=False) for name in member.masks
            },
            start={name: before[name] for name in member.masks},
            masks={name: torch.from_numpy(mask).to(device) for name, mask in own.items()},
        )
        return trained_or_silent(active, tensors, member.local.tells == "nothing")


def _rows(block: Matrix | Ghost, of: slice) -> Matrix | Ghost:
    """Return the gradients of some of the records."""
    if isinstance(block, Matrix):
        return Matrix(block.rows[of])
    return Ghost(block.inputs[of], block.errors[of])
